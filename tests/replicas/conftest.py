"""The tiny model of the server's tests."""

from serving.conftest import byte_tokenizer, make_engine

__all__ = ["byte_tokenizer", "make_engine"]
