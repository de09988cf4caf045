"""Which stage runs which microbatch when."""
