"""Whether layout changes nothing but the time: a tiny model trained on many layouts and compared with one process."""
