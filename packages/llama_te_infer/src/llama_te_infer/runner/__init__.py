"""Launching the steps that the scheduler plans, and reading their results."""
