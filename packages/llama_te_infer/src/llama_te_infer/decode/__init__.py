"""The decoding step."""
