"""Parallelism, applied to a model from outside: tensor, context, and data parallelism over one mesh."""
