"""Sparse Mixture-of-Experts Transformers that train the same on any parallel layout."""
