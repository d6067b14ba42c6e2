"""Number formats: the precision of each layer, Transformer Engine's recipes, and the state of delayed scaling."""
