"""Reads a training run's documents and makes its batches."""
