"""Runs the steps that the engine plans."""
