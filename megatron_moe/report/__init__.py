"""What a run did, in pictures and beside simple models."""
