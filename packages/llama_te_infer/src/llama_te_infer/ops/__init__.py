"""The compiled operators."""
