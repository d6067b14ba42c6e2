"""The models: configuration, decoder, heads, and what a checkpoint holds beside its tensors."""
