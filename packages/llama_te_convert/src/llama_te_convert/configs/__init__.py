"""Configurations: which architectures convert, and their `config.json` in each layout."""
