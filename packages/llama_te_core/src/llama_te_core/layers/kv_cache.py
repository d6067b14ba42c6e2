"""The interface of a key/value cache, and the search for the installed one.

The package llama_te_infer holds the caches and registers itself under an entry point. This package does not import it.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ..compat.entry_points import installed_function
from ..compat.transformer_engine import is_inference_params

ENTRY_POINT_GROUP = "llama_te_core.kv_cache"


@dataclasses.dataclass(frozen=True)
class UnreadColumns:
    """The first columns of a batch, before the layers store their keys and values.

    A pass that only may be continued stores nothing: the cache that it returns holds the arguments of the pass. The
    model computes them again, with the cache, when a continuation comes.

    Args:
        arguments: Of `NVLlamaModel.forward`; tensors are copies without gradients.
        rows: Rows of the batch.
        width: Columns of the batch.
    """

    arguments: dict[str, Any]
    rows: int
    width: int

    @classmethod
    def copy_of(cls, arguments: dict[str, Any], rows: int, width: int) -> UnreadColumns:
        """Copy the tensors, since the caller may write to them before the continuation."""
        copies = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        return cls(copies, rows, width)


@runtime_checkable
class KVCache(Protocol):
    """Keys and values of the tokens seen so far, for every layer.

    It includes the part of `te.InferenceParams` that Transformer Engine's layers use.

    Attributes:
        unread: Columns that the model must compute before it computes others; `None` almost always.
    """

    batch_size: int
    max_batch_size: int
    max_sequence_length: int
    num_heads_kv: int
    head_dim_k: int
    dtype: torch.dtype
    has_fixed_dtype: bool
    unread: UnreadColumns | None

    def convert(self, dtype: torch.dtype) -> None:
        """Convert all keys and values to another dtype."""
        ...

    def begin_step(self, attention_mask: torch.Tensor | None, batch_size: int, width: int) -> list[int]:
        """Make room for the next `width` columns of a batch; return the number of new tokens of each row.

        Args:
            attention_mask: [batch_size, columns], nonzero for tokens. It covers the earlier and the new columns, or the
                new columns alone. `None`: all new columns are tokens.
            batch_size: Rows of the batch.
            width: New columns.
        """
        ...

    def decode(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Compute the whole step of one new column, if the cache has a faster way than the model's layers.

        The model calls this without gradients, and only when it needs the logits alone.

        Args:
            model: The `NVLlamaForCausalLM`, in evaluation mode.
            input_ids: int64 [batch_size, 1].
            attention_mask: See `begin_step`.

        Returns:
            Logits [batch_size, 1, V] after the whole step. `None`, without a begun step, where the layers must compute.
        """
        ...

    def allocate_memory(self, layer_number: int) -> None:
        """Allocate the memory of a layer ahead of its first use."""
        ...

    def longest(self) -> int:
        """Return the number of tokens of the longest row, the current step included."""
        ...

    def get_seqlens_pre_step(self) -> torch.Tensor:
        """Return the number of tokens of each row before the current step, int32 [max_batch_size] on the device."""
        ...

    def repeat_rows(self, copies: int) -> None:
        """Replace each row by `copies` rows with the same content."""
        ...

    def padded_places(self, width: int) -> torch.Tensor | None:
        """Return the place of each packed token of the current step in a padded batch whose rows begin with tokens.

        Args:
            width: Columns of the padded batch, at least the new tokens of the longest row.

        Returns:
            int64 [tokens], places in the flattened batch [rows * width]; `None` if the tokens fill the batch.
        """
        ...

    def step(self, layer_number: int, new_k: torch.Tensor, new_v: torch.Tensor, qkv_format: str) -> Any:
        """Store a layer's new keys and values, once in a step, and return the arguments of TE's attention (see TE)."""
        ...

    @property
    def fuses_rope(self) -> bool:
        """Whether `append_rope` is one kernel here, which replaces Transformer Engine's own rotation."""
        ...

    def append_rope(self, layer_number: int, qkv: torch.Tensor, angles: torch.Tensor, qkv_format: str) -> torch.Tensor:
        """Rotate the current step's queries and keys by their positions, and store keys and values.

        Args:
            layer_number: The layer.
            qkv: The fused projection's output, [T, K, G, D] ("thd") or [B, S, K, G, D] ("bshd"): for each of K
                key/value heads its query heads, its key and its value.
            angles: float32 [positions, 1, 1, D].
            qkv_format: "thd" or "bshd".

        Returns:
            The rotated queries, [T, heads, D] or [B, S, heads, D].
        """
        ...

    def keys_and_values(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values as [batch, keys, K, D], with at least the keys of the longest row."""
        ...


def computing_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of the keys and values that layers with such weights compute, which autocast changes."""
    device_type = weight.device.type
    # Autocast leaves float64 alone, and does not know every device.
    is_cast = weight.dtype != torch.float64 and torch.amp.is_autocast_available(device_type)
    if is_cast and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def check_cache(cache: Any, batch_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    """Refuse a cache that does not fit the model or the batch, before any layer writes to it.

    An `InferenceParams` of Transformer Engine becomes a `KVCache` first: the same object, with storage of
    llama_te_infer.

    Raises:
        TypeError: The object is not a `KVCache`.
        ValueError: The cache has other heads, another dtype or too few rows. Or it is Transformer Engine's and has
            content, or a cache manager of another class.
    """
    if is_inference_params(cache) and not isinstance(cache, KVCache):
        adopt = installed_function(ENTRY_POINT_GROUP, "transformer_engine")
        if adopt is not None:
            adopt(cache)
    if not isinstance(cache, KVCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}: the layers need llama_te_infer.InferenceParams, which takes "
            "the arguments of Transformer Engine's class of that name "
            "(or llama_te_infer.inference_params_for(model, ...); pip install llama-te-infer). Leave past_key_values "
            "out of the first pass to get one in the outputs."
        )
    if (cache.num_heads_kv, cache.head_dim_k) != (num_kv_heads, head_dim):
        raise ValueError(
            f"the cache has num_heads_kv={cache.num_heads_kv} and head_dim_k={cache.head_dim_k}, but the model has "
            f"{num_kv_heads} key/value heads of size {head_dim}: make the cache for this model."
        )
    if cache.dtype != dtype and not cache.has_fixed_dtype:
        cache.convert(dtype)
    if cache.dtype != dtype:
        raise ValueError(f"the cache has dtype={cache.dtype}, but the layers compute in {dtype}: use the same.")
    if batch_size > cache.max_batch_size:
        raise ValueError(
            f"a batch of {batch_size} rows (beams and returned sequences are rows too) does not fit the cache with "
            f"max_batch_size={cache.max_batch_size}: make it larger."
        )
    return cache


def copy_into(cache: KVCache, keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Fill an empty cache with the keys and values of another one.

    Args:
        cache: The empty cache.
        keys_and_values: For each layer [B, K, L, D] with rotated keys, all of them tokens.
    """
    rows, _, columns, _ = keys_and_values[0][0].shape
    cache.begin_step(None, rows, columns)
    for number, layer in enumerate(keys_and_values, 1):
        cache.allocate_memory(number)
        key_BLKD, value_BLKD = (tensor.to(cache.dtype).transpose(1, 2) for tensor in layer)
        cache.step(number, key_BLKD, value_BLKD, "bshd")


@functools.cache
def default_cache_factory() -> Callable[..., KVCache] | None:
    """Return the installed function that makes caches; without one, warn and return `None`.

    The function takes a model, `batch_size` and `max_length`: the tokens of the longest row, or `None` for a cache that
    grows.
    """
    factory: Callable[..., KVCache] | None = installed_function(ENTRY_POINT_GROUP, "default")
    if factory is not None:
        return factory
    warnings.warn(
        "llama-te-infer is not installed. So generate runs without a key/value cache and reads the whole text again "
        "for each token, and past_key_values of outputs are None: pip install llama-te-infer, or pass use_cache=False.",
        stacklevel=2,
    )
    return None
