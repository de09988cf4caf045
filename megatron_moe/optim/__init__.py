"""Gradients to weights."""
