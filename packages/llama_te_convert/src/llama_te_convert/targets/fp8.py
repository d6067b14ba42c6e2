"""Hugging Face checkpoints with weights in FP8, in the layout that serving engines read.

The layout is that of compressed-tensors' "float-quantized" format: a linear layer's `weight` in float8_e4m3fn and its
`weight_scale`, float32 [1], by which it is multiplied; activations get a scale for each token while the model runs.

- Shape and names of the scale: https://github.com/vllm-project/compressed-tensors,
  `quantization/lifecycle/initialize.py` (an expected shape of 1 for the strategy "tensor").
- How vLLM reads it: https://github.com/vllm-project/vllm, `model_executor/layers/quantization/compressed_tensors/`
  (`schemes/compressed_tensors_w8a8_fp8.py`), where the layers that it fuses, queries with keys and values and gate with
  up, are quantized once more unless they have one scale. So here they share theirs.

Weights that a model held in FP8 alone come back bit for bit. Its checkpoint has w = dtype(q · s), with FP8 numbers q
and one scale s, which is not in the checkpoint. There are at most 126 magnitudes then, so that the search for s needs
them alone, whatever the size of the tensor.
"""

from __future__ import annotations

import functools
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..layout.row_ranges import Output, Target, outputs, read
from ..sources.tensor_source import CheckpointError, TensorInfo, TensorSource
from ..sources.torch_tensors import as_bytes, as_tensor, dtype_name, torch_dtype

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_MAGNITUDES = torch.arange(1, 127, dtype=torch.uint8).view(_FP8).float()  # all that it has but zero, ascending
_LARGEST_FLOAT = torch.finfo(torch.float32).max
_SCALE = TensorInfo("float32", (1,))

_LINEAR = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.\d+\.)"
    r"(?:self_attn\.(?:(?P<qkv>[qkv])|o)_proj|mlp\.(?:(?P<gate_up>gate|up)|down)_proj)\.weight"
)
_HEADS = ("lm_head", "score", "qa_outputs")

# Bits of float32, which have the order of the numbers.
_SMALLEST_SCALE = 0x00800000  # the least normal number
_INFINITY = 0x7F800000
_MANTISSA = 0x007FFFFF
_CHUNK = 2**20  # numbers looked at in one go


def fp8_quantization_config(ignore: Sequence[str] = _HEADS) -> dict[str, Any]:
    """The `quantization_config` of `config.json` that goes with `fp8_outputs`.

    Args:
        ignore: Names of linear layers that are not quantized.
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


def fp8_outputs(targets: list[Target], source: TensorSource) -> list[Output]:
    """The targets with the linear weights of the decoder in FP8, each followed by its scale; others as they are.

    Weights are read twice, in parts: for the scale, when one of the group that shares it is first asked for, and to be
    written. Dequantized, as dtype(q · scale), they are the weights again bit for bit where any scale achieves that; if
    one does for queries, keys and values, or for gate and up, they have it in common. Others are rounded to nearest,
    with the scale that makes the largest magnitude of the group 448.

    Args:
        targets: All tensors of the Hugging Face layout.
        source: What they are made of.

    Raises:
        CheckpointError: There is no such weight, or one is no floating-point matrix; in `Output.parts` also if one has
            numbers that are not finite.
    """
    groups: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        if match := _LINEAR.fullmatch(target.name):
            if not target.info.is_floating_point or target.info.itemsize < 2 or len(target.info.shape) != 2:
                raise CheckpointError(
                    f"{target.name} is {target.info.dtype} {list(target.info.shape)}: only matrices of floating-point "
                    "numbers of 16 bits or more are put into FP8."
                )
            fused = "qkv" if match["qkv"] else "gate_up" if match["gate_up"] else target.name
            groups[match["layer"] + fused].append(target)
    if not groups:
        raise CheckpointError("no tensor is a linear weight of a decoder in the Hugging Face layout: nothing for FP8.")
    scales_of = {
        target.name: scales for group in groups.values() for scales in [_Scales(group, source)] for target in group
    }
    made = []
    for target, unchanged in zip(targets, outputs(targets, source), strict=True):
        scales = scales_of.get(target.name)
        if scales is None:
            made.append(unchanged)
            continue
        weight = functools.partial(_quantized, target, source, scales)
        scale = functools.partial(_scale, target, scales)
        made.append(Output(target.name, TensorInfo(dtype_name(_FP8), target.info.shape), weight))
        made.append(Output(f"{target.name}_scale", _SCALE, scale))
    return made


def _quantized(target: Target, source: TensorSource, scales: _Scales) -> Iterator[memoryview]:
    scale = scales.of(target)
    for numbers in _numbers(target, source):
        yield as_bytes(quantize(numbers, scale))


def _scale(target: Target, scales: _Scales) -> Iterator[memoryview]:
    yield as_bytes(torch.tensor([scales.of(target)], dtype=torch.float32))


def _numbers(target: Target, source: TensorSource) -> Iterator[torch.Tensor]:
    """A weight's elements in order, a few at a time: what is made of them takes several times their memory."""
    for part in read(target, source):
        yield from as_tensor(part, target.info.dtype).split(_CHUNK)


class _Scales:
    """The scales of weights that engines fuse, found when the first is asked for, by whichever thread."""

    def __init__(self, targets: list[Target], source: TensorSource) -> None:
        self._targets = targets
        self._source = source
        self._lock = threading.Lock()
        self._found: dict[str, float] = {}

    def of(self, target: Target) -> float:
        """The scale of one of the weights.

        Raises:
            CheckpointError: They cannot be read, or are not finite.
        """
        with self._lock:
            if not self._found:
                self._found = self._find()
            return self._found[target.name]

    def _find(self) -> dict[str, float]:
        names = [target.name for target in self._targets]
        dtypes = [_computed(torch_dtype(target.info.dtype)) for target in self._targets]
        looked_at = [_look(target, self._source) for target in self._targets]
        largest = max(most for most, _ in looked_at)
        each = [magnitudes for _, magnitudes in looked_at]
        if len(set(dtypes)) == 1 and all(magnitudes is not None for magnitudes in each):
            together = torch.cat([magnitudes for magnitudes in each if magnitudes is not None]).unique()
            if (scale := exact_scale(together, dtypes[0])) is not None:
                return dict.fromkeys(names, scale)
        rounding = max(largest / _LARGEST, torch.finfo(torch.float32).tiny)
        # Zeros alone come back with any scale, and engines take a group's largest: it should not be theirs.
        alone = [
            exact_scale(magnitudes, dtype) if magnitudes is not None and len(magnitudes) else None
            for magnitudes, dtype in zip(each, dtypes, strict=True)
        ]
        return {name: rounding if scale is None else scale for name, scale in zip(names, alone, strict=True)}


def _computed(dtype: torch.dtype) -> torch.dtype:
    """What a weight is compared in: products with a scale are float32."""
    return torch.float32 if dtype.itemsize > 4 else dtype


def _look(target: Target, source: TensorSource) -> tuple[float, torch.Tensor | None]:
    """The largest magnitude, and all magnitudes but zero in float32 unless there are more than FP8 has."""
    largest = 0.0
    magnitudes: torch.Tensor | None = torch.empty(0)
    for numbers in _numbers(target, source):
        if numbers.numel() == 0:
            continue
        low, high = (float(end) for end in numbers.aminmax())
        if not max(-low, high) <= _LARGEST_FLOAT:  # nor is NaN
            raise CheckpointError(f"{target.name} has numbers that are not finite, which FP8 cannot hold.")
        largest = max(largest, -low, high)
        if magnitudes is not None:
            magnitudes = torch.cat([magnitudes, _distinct(numbers)]).unique()
            magnitudes = magnitudes[magnitudes > 0]
            if len(magnitudes) > len(_MAGNITUDES):
                magnitudes = None
    return largest, magnitudes


def _distinct(numbers: torch.Tensor) -> torch.Tensor:
    """The magnitudes among numbers, in float32."""
    if numbers.dtype.itemsize != 2:
        return numbers.float().abs().unique()
    # Many times faster than sorting them.
    counts = torch.bincount(numbers.view(torch.int16) & 0x7FFF)
    return counts.nonzero().view(-1).to(torch.int16).view(numbers.dtype).float()


def quantize(weight: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """The nearest weight / scale in FP8."""
    return (weight.float() / scale).clamp_(-_LARGEST, _LARGEST).to(_FP8)


def exact_scale(magnitudes: torch.Tensor, dtype: torch.dtype) -> float | None:
    """A scale with which all magnitudes come back from FP8, dtype(q · scale), as they are; `None` if there is none.

    For each FP8 number that the largest magnitude can stand for, the others follow, since the scale is known to a
    fraction of the distance between FP8 numbers. dtype(q · s) grows with s, so that the scales that bring a magnitude
    back are the float32 numbers between two, which bisection finds whatever is rounded on the way; all magnitudes come
    back with the scales that are between the two of each. (Where magnitudes are so small that `dtype` has them with
    fewer bits, a scale that exists may not be found.)

    Args:
        magnitudes: Distinct positive numbers of `dtype`, in float32.
        dtype: The weights' own.
    """
    if len(magnitudes) > len(_MAGNITUDES):
        return None
    if len(magnitudes) == 0:
        return 1.0
    top_M1 = _MAGNITUDES.flip(0)[:, None]  # the largest first, which leaves the most of FP8's range to small weights
    quantized_MN = quantize(magnitudes, magnitudes.max() / top_M1).float()
    lowest_MN = _first_scale(quantized_MN, magnitudes, dtype, above=False)
    highest_MN = _first_scale(quantized_MN, magnitudes, dtype, above=True) - 1
    lowest_M = lowest_MN.amax(1).clamp(min=_SMALLEST_SCALE)
    highest_M = highest_MN.amin(1).clamp(max=_INFINITY - 1)
    possible_M = (quantized_MN > 0).all(1) & (lowest_M <= highest_M)
    for lowest, highest in zip(lowest_M[possible_M].tolist(), highest_M[possible_M].tolist(), strict=True):
        power_of_two = (lowest + _MANTISSA) & ~_MANTISSA
        bits = power_of_two if power_of_two <= highest else (lowest + highest) // 2
        scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        if torch.equal((quantize(magnitudes, scale).float() * scale).to(dtype).float(), magnitudes):
            return float(scale)
    return None


def _first_scale(quantized_MN: torch.Tensor, wanted_N: torch.Tensor, dtype: torch.dtype, above: bool) -> torch.Tensor:
    """Bits of the first float32 with which a product reaches what is wanted, or is above it."""
    low = torch.zeros(quantized_MN.shape, dtype=torch.int32)  # never enough
    high = torch.full_like(low, _INFINITY)  # always enough
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        made = (quantized_MN * middle.view(torch.float32)).to(dtype).float()
        enough = made > wanted_N if above else made >= wanted_N
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return high
