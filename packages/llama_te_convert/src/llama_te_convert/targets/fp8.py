"""Hugging Face checkpoints with FP8 weights, in the layout that serving engines read.

The layout is compressed-tensors' "float-quantized" format. A linear layer has `weight` in float8_e4m3fn and
`weight_scale`, float32 [1], which multiplies it. The engine scales activations for each token while the model runs.

- Shape and names of the scale: https://github.com/vllm-project/compressed-tensors,
  `quantization/lifecycle/initialize.py` (an expected shape of 1 for the strategy "tensor").
- vLLM's reader: https://github.com/vllm-project/vllm, `model_executor/layers/quantization/compressed_tensors/`
  (`schemes/compressed_tensors_w8a8_fp8.py`). vLLM fuses query, key and value, and gate and up, and quantizes them a
  second time unless they have one scale. So these weights share their scale here.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from ..layout.row_ranges import ConvertedTensor
from ..layout.tensor_info import TensorInfo
from ..sources.tensor_source import TensorSource
from ..sources.torch_tensors import as_bytes, as_tensor, dtype_name, torch_dtype
from .fp8_scale import FP8, FP8_MAX, MAGNITUDES, exact_scale, quantize
from .stream import TensorStream, read_chunks, stream

_LARGEST_FLOAT = torch.finfo(torch.float32).max
_SCALE = TensorInfo("float32", (1,))

_LINEAR = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.\d+\.)"
    r"(?:self_attn\.(?:(?P<qkv>[qkv])|o)_proj|mlp\.(?:(?P<gate_up>gate|up)|down)_proj)\.weight"
)
_HEADS = ("lm_head", "score", "qa_outputs")
_BLOCK = 2**20  # elements to compute with at once: the intermediate results take several times their memory


def fp8_quantization_config(ignore: Sequence[str] = _HEADS) -> dict[str, Any]:
    """The `quantization_config` in the `config.json` of a checkpoint with the tensors of `fp8_streams`.

    Args:
        ignore: Names of linear layers that stay unquantized.
    """
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "tensor", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def fp8_streams(tensors: Sequence[ConvertedTensor], source: TensorSource) -> list[TensorStream]:
    """Stream the tensors with the decoder's linear weights in FP8, each followed by its scale.

    A weight is read twice in chunks: once to find the scale, when the first weight of its group is written, and once to
    write it. The scale gives the weights back bit for bit, as dtype(q · scale), if any scale does that; query, key and
    value weights share it, as do gate and up, if one scale does it for all of them. Otherwise the weights are rounded
    to the nearest FP8 numbers, with the scale that maps the group's largest magnitude to 448.

    Args:
        tensors: All tensors of the Hugging Face layout.
        source: The checkpoint that they are read from.

    Raises:
        CheckpointError: There is no linear weight, or one is not a floating-point matrix. `TensorStream.chunks` also
            raises it for a weight with numbers that are not finite.
    """
    groups: dict[str, list[ConvertedTensor]] = defaultdict(list)
    for tensor in tensors:
        if match := _LINEAR.fullmatch(tensor.name):
            if not tensor.info.is_floating_point or tensor.info.itemsize < 2 or len(tensor.info.shape) != 2:
                raise CheckpointError(
                    f"{tensor.name} is {tensor.info.dtype} {list(tensor.info.shape)}: only matrices of floating-point "
                    "numbers with 16 bits or more can be written in FP8."
                )
            fused = "qkv" if match["qkv"] else "gate_up" if match["gate_up"] else tensor.name
            groups[match["layer"] + fused].append(tensor)
    if not groups:
        raise CheckpointError("no tensor is a linear weight of a decoder in the Hugging Face layout: nothing for FP8.")
    scales_of = {
        tensor.name: scales for group in groups.values() for scales in [_GroupScales(group, source)] for tensor in group
    }
    streams = []
    for tensor in tensors:
        scales = scales_of.get(tensor.name)
        if scales is None:
            streams.append(stream(tensor, source))
            continue
        weight = functools.partial(_weight_chunks, tensor, source, scales)
        scale = functools.partial(_scale_chunks, tensor, scales)
        streams.append(TensorStream(tensor.name, TensorInfo(dtype_name(FP8), tensor.info.shape), weight))
        streams.append(TensorStream(f"{tensor.name}_scale", _SCALE, scale))
    return streams


def _weight_chunks(tensor: ConvertedTensor, source: TensorSource, scales: _GroupScales) -> Iterator[memoryview]:
    scale = scales.of(tensor)
    for block in _blocks(tensor, source):
        yield as_bytes(quantize(block, scale))


def _scale_chunks(tensor: ConvertedTensor, scales: _GroupScales) -> Iterator[memoryview]:
    yield as_bytes(torch.tensor([scales.of(tensor)], dtype=torch.float32))


def _blocks(tensor: ConvertedTensor, source: TensorSource) -> Iterator[torch.Tensor]:
    """The elements of a weight in order, at most `_BLOCK` at a time."""
    for chunk in read_chunks(tensor, source):
        yield from as_tensor(chunk, tensor.info.dtype).split(_BLOCK)


class _GroupScales:
    """The scales of weights that engines fuse. The first thread that asks for one finds them all."""

    def __init__(self, group: list[ConvertedTensor], source: TensorSource) -> None:
        self._group = group
        self._source = source
        self._lock = threading.Lock()
        self._found: dict[str, float] = {}

    def of(self, tensor: ConvertedTensor) -> float:
        """The scale of one of the weights.

        Raises:
            CheckpointError: A weight cannot be read, or is not finite.
        """
        with self._lock:
            if not self._found:
                self._found = self._find()
            return self._found[tensor.name]

    def _find(self) -> dict[str, float]:
        names = [tensor.name for tensor in self._group]
        dtypes = [_compared_dtype(torch_dtype(tensor.info.dtype)) for tensor in self._group]
        found = [_magnitudes(tensor, self._source) for tensor in self._group]
        largest = max(most for most, _ in found)
        each = [magnitudes for _, magnitudes in found]
        if len(set(dtypes)) == 1 and all(magnitudes is not None for magnitudes in each):
            together = torch.cat([magnitudes for magnitudes in each if magnitudes is not None]).unique()
            if (scale := exact_scale(together, dtypes[0])) is not None:
                return dict.fromkeys(names, scale)
        rounding = max(largest / FP8_MAX, torch.finfo(torch.float32).tiny)
        # Any scale gives zeros back. A weight of zeros takes the group's, since engines use the largest of a group.
        alone = [
            exact_scale(magnitudes, dtype) if magnitudes is not None and len(magnitudes) else None
            for magnitudes, dtype in zip(each, dtypes, strict=True)
        ]
        return {name: rounding if scale is None else scale for name, scale in zip(names, alone, strict=True)}


def _compared_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is compared: the products with a scale are float32."""
    return torch.float32 if dtype.itemsize > 4 else dtype


def _magnitudes(tensor: ConvertedTensor, source: TensorSource) -> tuple[float, torch.Tensor | None]:
    """The largest magnitude of a weight, and its distinct positive magnitudes in float32.

    The second is `None` if there are more magnitudes than FP8 has.
    """
    largest = 0.0
    magnitudes: torch.Tensor | None = torch.empty(0)
    for block in _blocks(tensor, source):
        if block.numel() == 0:
            continue
        low, high = (float(end) for end in block.aminmax())
        if not max(-low, high) <= _LARGEST_FLOAT:  # false for NaN too
            raise CheckpointError(f"{tensor.name} has numbers that are not finite, which FP8 cannot hold.")
        largest = max(largest, -low, high)
        if magnitudes is not None:
            magnitudes = torch.cat([magnitudes, _distinct(block)]).unique()
            magnitudes = magnitudes[magnitudes > 0]
            if len(magnitudes) > len(MAGNITUDES):
                magnitudes = None
    return largest, magnitudes


def _distinct(block: torch.Tensor) -> torch.Tensor:
    """The distinct magnitudes of a block, in float32."""
    if block.dtype.itemsize != 2:
        return block.float().abs().unique()
    # Counting the bit patterns is many times faster than sorting the numbers.
    counts = torch.bincount(block.view(torch.int16) & 0x7FFF)
    return counts.nonzero().view(-1).to(torch.int16).view(block.dtype).float()
