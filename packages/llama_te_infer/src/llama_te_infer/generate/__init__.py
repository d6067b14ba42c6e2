"""The cache for transformers' `generate`."""
