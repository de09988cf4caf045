"""Checkpoints of Megatron-LM and Megatron-Core, whose pickles only a confined child process opens."""
