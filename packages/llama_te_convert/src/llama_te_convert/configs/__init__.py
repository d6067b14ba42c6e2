"""Configurations of the architectures that convert."""
