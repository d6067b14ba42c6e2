"""The compiled operators, one module for each: `from llama_te_infer.ops.linear import linear`.

Importing this package registers the operators `torch.ops.llama_te.*`. `library` says whether kernels are available on
this machine, and which sizes they take.
"""

from . import (
    append_rope,
    decode_attention,
    embed,
    greedy,
    linear,
    quantize_rows,
    reorder,
    rms_norm,
    swiglu,
    widen_pages,
)

__all__ = [
    "append_rope",
    "decode_attention",
    "embed",
    "greedy",
    "linear",
    "quantize_rows",
    "reorder",
    "rms_norm",
    "swiglu",
    "widen_pages",
]
