"""Hugging Face names and shapes: checkpoints out of the project and into it, one tensor in memory at a time."""
