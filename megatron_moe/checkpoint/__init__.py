"""Weights to disk as rectangles, in any split."""
