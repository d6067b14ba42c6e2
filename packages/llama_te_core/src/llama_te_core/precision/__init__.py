"""The precision that each layer computes in."""
