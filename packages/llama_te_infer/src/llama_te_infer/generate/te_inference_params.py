"""Transformer Engine's own `InferenceParams` as a cache of the models.

TE 2.20's cache managers advance a running sequence by one token whatever its step says, and cut packed queries. So the
object keeps its identity and its sizes, and gets this package's storage and methods.
"""

from __future__ import annotations

from typing import Any

from .inference_params import InferenceParams

_MANAGERS = ("NonPagedKVCacheManager", "PagedKVCacheManager")


class HFInferenceParams(InferenceParams):
    """`InferenceParams` under the name that NVIDIA's Llama 3 recipe gives its cache for `generate`."""


def adopt(params: Any) -> None:
    """Turn an empty `InferenceParams` of Transformer Engine into one of this package, in place.

    Afterwards the object is an instance of its former class and of `llama_te_infer.InferenceParams`, whose methods it
    has. Its former memory is free. llama_te_core finds this function by its entry point.

    Args:
        params: Of TE's class, or of a class derived from it.

    Raises:
        ValueError: The object has sequences already, or a cache manager of another class than TE's two.
    """
    if params.sequences:
        raise ValueError(
            f"past_key_values is Transformer Engine's InferenceParams with {len(params.sequences)} sequences from "
            "other layers: call its reset(), or make another one. The model takes over an empty one."
        )
    manager = type(params.cache_manager).__name__
    if manager not in _MANAGERS:
        raise ValueError(
            f"past_key_values is Transformer Engine's InferenceParams with custom_cache_manager={manager}: the model's "
            "layers do not use it. Leave custom_cache_manager out."
        )
    ours = InferenceParams(
        params.max_batch_size,
        params.max_sequence_length,
        num_heads_kv=params.num_heads_kv,
        head_dim_k=params.head_dim_k,
        dtype=params.dtype,
        head_dim_v=params.head_dim_v,
        is_paged=params.is_paged,
        # TE's class has these attributes only where they mean something.
        total_num_pages=getattr(params, "total_num_pages", None),
        page_size=getattr(params, "page_size", None),
        max_ctx_len=getattr(params, "max_ctx_len", None),
        qkv_format="thd" if params.input_qkv_format == "thd" else "bshd",
        device=params.cu_seqlens_q.device,
    )
    vars(params).update(vars(ours))
    name, module = InferenceParams.__name__, InferenceParams.__module__
    params.__class__ = type(name, (InferenceParams, type(params)), {"__module__": module})
