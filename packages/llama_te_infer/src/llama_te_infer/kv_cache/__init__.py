"""Key/value caches: their memory, and the interface that the layers call. Nothing here computes the model."""
