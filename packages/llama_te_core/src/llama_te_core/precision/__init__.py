"""Number formats: each layer's precision, Transformer Engine's recipes, and the state of delayed scaling."""
