"""Quantizers of other libraries, which look for `nn.Linear` modules and would miss most weights of a decoder layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

QUANTIZE_OTHERWISE = (
    "quantizers of other libraries replace nn.Linear modules, and the decoder layers fuse most of their products into "
    "others. For FP8 weights, set layer_precision=['fp8'] * num_hidden_layers and use_quantized_model_init=True. "
    "For another format, quantize the model as transformers' Llama (llama_te_convert.convert_llama_te_to_hf)."
)

_LIBRARIES = ("torchao", "bitsandbytes", "optimum", "hqq", "compressed_tensors")


class OutputProjection(nn.Linear):
    """The layer's one plain linear module. It refuses a weight that another library quantized."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and _is_quantized_by_others(value):
            raise TypeError(f"{type(value).__name__} for an output projection alone is refused: {QUANTIZE_OTHERWISE}")
        super().__setattr__(name, value)


class Head(nn.Linear):
    """A language-model head. It warns of a weight that another library quantized, since the layers stay as they are."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and _is_quantized_by_others(value):
            warnings.warn(
                f"{type(value).__name__} quantizes the head alone, and the decoder layers stay as they are: "
                f"{QUANTIZE_OTHERWISE}",
                stacklevel=2,
            )
        super().__setattr__(name, value)


def _is_quantized_by_others(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    kinds = (type(value), type(value.data))
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in kinds)
