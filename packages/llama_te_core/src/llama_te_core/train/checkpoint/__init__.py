"""Saves and loads a training run's checkpoints, and checks its folder."""
