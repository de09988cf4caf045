"""How tokens travel to the ranks that hold their experts, and home."""
