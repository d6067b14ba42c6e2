"""How a cache stores keys and values: as the layers compute them, or in FP8.

In FP8 each token's key of each head, and each value, has a scale of its own, a power of two. A number is the product of
its e4m3 number and the scale. So what a token has in the cache depends on nothing but the token, and what attention
reads is exact in bfloat16: a cached prefix, another batch or another kernel changes nothing.

Shapes: N tokens, B rows, P pages, S tokens of a page, K key/value heads, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.library import name_of
from .names import FP8_NAMES, KV_CACHE_DTYPES

LayerMemory = tuple[torch.Tensor, ...]
"""The memory of a layer: keys and values [pages, S, K, D] or [rows, L, K, D]; for FP8 their scales [pages, K, S]."""

# The scale's byte is E8M0: the exponent plus 127, or 255 for NaN.
_BIAS, _NAN = 127, 255
# With lesser scales some products would be subnormal in bfloat16, with greater ones infinite.
_LEAST_EXPONENT, _GREATEST_EXPONENT = -117, 119
_GREATEST = 448  # of e4m3
_BITS, _SHARE = 9, 0.875  # 448 is 0.875 * 2^9
_TAKES_FP8 = (torch.bfloat16, torch.float32, torch.float64)  # in float16 not every product is exact


@dataclass(frozen=True)
class CacheFormat:
    """The format of keys and values.

    Attributes:
        dtype: In which the layers compute keys and values, and attention reads them.
        is_fp8: Whether the memory holds FP8 numbers and their scales, instead of numbers of `dtype`.
    """

    dtype: torch.dtype
    is_fp8: bool = False

    @property
    def has_operators(self) -> bool:
        """Whether the compiled operators know the format, where they take `dtype`."""
        return not self.is_fp8 or self.dtype == torch.bfloat16

    def token_bytes(self, kv_heads: int, head_dim_k: int, head_dim_v: int | None = None) -> int:
        """Return the bytes of a token's keys and values in one layer."""
        numbers = kv_heads * (head_dim_k + (head_dim_k if head_dim_v is None else head_dim_v))
        return numbers + 2 * kv_heads if self.is_fp8 else numbers * self.dtype.itemsize

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    def allocate(self, shape: tuple[int, int, int, int], head_dim_v: int, device: torch.device) -> LayerMemory:
        """Allocate the memory of a layer whose keys have a shape."""
        dtype = torch.float8_e4m3fn if self.is_fp8 else self.dtype
        # Zeros, not empty: attention multiplies the memory behind a row's tokens by 0, and 0 times NaN is NaN.
        keys = torch.zeros(shape, dtype=dtype, device=device)
        values = torch.zeros((*shape[:-1], head_dim_v), dtype=dtype, device=device)
        if not self.is_fp8:
            return keys, values
        pages, page_size, kv_heads, _ = shape
        scales = [torch.zeros(pages, kv_heads, page_size, dtype=torch.uint8, device=device) for _ in range(2)]
        return keys, values, *scales

    def converted(self, memory: LayerMemory) -> LayerMemory:
        """Return the memory of a layer that another dtype was computed in; FP8 numbers stay as they are."""
        return memory if self.is_fp8 else tuple(tensor.to(self.dtype) for tensor in memory)

    def write(self, memory: LayerMemory, slot_N: torch.Tensor, key_NKD: torch.Tensor, value_NKD: torch.Tensor) -> None:
        """Store the keys and values of tokens.

        Args:
            memory: Of a layer.
            slot_N: int64, the index of each token in the flattened memory.
            key_NKD: Of `dtype`.
            value_NKD: Likewise.
        """
        keys, values, *scales = memory
        if not self.is_fp8:
            keys.flatten(0, 1).index_copy_(0, slot_N, key_NKD)
            values.flatten(0, 1).index_copy_(0, slot_N, value_NKD)
            return
        page_N, place_N = slot_N // keys.shape[1], slot_N % keys.shape[1]
        for pages, scale_PKS, new_NKD in zip((keys, values), scales, (key_NKD, value_NKD), strict=True):
            fp8_NKD, scale_NK = quantize(new_NKD)
            as_bytes(pages).flatten(0, 1).index_copy_(0, slot_N, as_bytes(fp8_NKD))
            scale_PKS[page_N, :, place_N] = scale_NK

    def read(self, memory: LayerMemory, page_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of pages, [B, P, S, K, D] of `dtype`."""
        keys, values, *scales = memory
        if not self.is_fp8:
            return keys[page_BP], values[page_BP]
        key_BPSKD, value_BPSKD = (
            widened(
                as_bytes(pages)[page_BP].view(torch.float8_e4m3fn), scale_PKS[page_BP].transpose(-1, -2), self.dtype
            )
            for pages, scale_PKS in zip((keys, values), scales, strict=True)
        )
        return key_BPSKD, value_BPSKD


def cache_format(kv_cache_dtype: str, dtype: torch.dtype) -> CacheFormat:
    """Return the format that a user names.

    Args:
        kv_cache_dtype: One of `KV_CACHE_DTYPES`.
        dtype: In which the model's layers compute keys and values.

    Raises:
        ValueError: The name is unknown, or the model does not compute so.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        allowed = ", ".join(map(repr, KV_CACHE_DTYPES))
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} is not known: use one of {allowed}.")
    if kv_cache_dtype in FP8_NAMES:
        if dtype not in _TAKES_FP8:
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r}, but the layers compute in {name_of(dtype)}, in which FP8 numbers "
                "times their scales are not exact: load the model with dtype=torch.bfloat16, or use 'auto'."
            )
        return CacheFormat(dtype, is_fp8=True)
    if kv_cache_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise ValueError(
            f"kv_cache_dtype='bfloat16', but the layers compute in {name_of(dtype)}: load the model with "
            "dtype=torch.bfloat16, or use 'auto', the dtype of the layers."
        )
    return CacheFormat(dtype)


def quantize(number_xD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round heads to FP8, as the compiled operators do: see `widen_pages`.

    Args:
        number_xD: [..., D].

    Returns:
        float8_e4m3fn [..., D] and the scales, uint8 [...]. A head with NaN or infinity becomes NaN as a whole. Numbers
        beyond 448 * 2^119 become this number.
    """
    number_xD = number_xD.float()
    greatest_x = number_xD.abs().amax(-1)
    is_finite_x = greatest_x.isfinite()
    mantissa_x, exponent_x = greatest_x.where(is_finite_x, 0).frexp()
    exponent_x = (exponent_x - _BITS + (mantissa_x > _SHARE)).clamp(_LEAST_EXPONENT, _GREATEST_EXPONENT)
    exponent_x = exponent_x.where(greatest_x > 0, 0)
    scaled_xD = (number_xD * power_of_two(_BIAS - exponent_x)[..., None]).clamp(-_GREATEST, _GREATEST)
    fp8_xD = scaled_xD.where(is_finite_x[..., None], torch.nan).to(torch.float8_e4m3fn)
    return fp8_xD, (exponent_x + _BIAS).where(is_finite_x, _NAN).to(torch.uint8)


def widened(fp8_xD: torch.Tensor, scale_x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return FP8 heads as numbers of a dtype.

    Args:
        fp8_xD: float8_e4m3fn [..., D].
        scale_x: uint8 [...].
        dtype: Of the result; in bfloat16 and wider ones it is exact.
    """
    return (fp8_xD.float() * power_of_two(scale_x)[..., None]).to(dtype)


def power_of_two(byte_x: torch.Tensor) -> torch.Tensor:
    """Return 2^(byte - 127) in float32, and 0 for the byte 0 of memory without tokens. 255 gives infinity."""
    return (byte_x.int() << 23).view(torch.float32)  # the bits of a float32 number's exponent


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return FP8 memory as bytes, since PyTorch does not index and fill FP8 numbers on every device."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
