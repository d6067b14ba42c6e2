"""Readers of checkpoints, one module for each file format."""
