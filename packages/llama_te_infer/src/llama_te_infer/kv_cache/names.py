"""The names of a cache's dtypes, as vLLM has them. Importing this module does not import torch."""

FP8_NAMES = ("fp8", "fp8_e4m3")
KV_CACHE_DTYPES = ("auto", "bfloat16", *FP8_NAMES)
