"""Beside each rank a small process: it tells who died, who hangs and who is slow."""
