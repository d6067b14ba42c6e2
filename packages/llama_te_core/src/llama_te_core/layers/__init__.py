"""The decoder layer, in two implementations, and what goes into it."""
