"""From text to token files (.bin/.idx, Megatron's format) to batches: any sample is computed, none is stored."""
