"""The loop, where everything meets."""
