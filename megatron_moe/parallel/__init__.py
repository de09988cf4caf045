"""Who am I among the ranks, and how ranks talk."""
