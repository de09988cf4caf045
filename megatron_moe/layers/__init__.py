"""Transformer parts, split over tensor and context parallel ranks."""
