"""Inspection and comparison of checkpoints."""
