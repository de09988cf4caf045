"""Sparse layers that send no token to an expert: soft mixtures and memories of single cells."""
