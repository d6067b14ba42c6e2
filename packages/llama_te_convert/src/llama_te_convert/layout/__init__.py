"""Which tensors of one layout make which tensors of the other."""
