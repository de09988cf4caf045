"""Layers stacked into pipeline stages."""
