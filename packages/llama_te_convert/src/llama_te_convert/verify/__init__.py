"""Inspection of a checkpoint, and comparison of two: tensors, configurations and logits."""
