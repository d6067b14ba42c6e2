"""Training by many processes."""
