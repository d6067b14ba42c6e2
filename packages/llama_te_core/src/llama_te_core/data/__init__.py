"""Batches for training: packing, collators and labels."""
