"""Arithmetic on one rank: every fused operation beside its plain PyTorch twin."""
