"""Comparison of two checkpoints, of either layout, in memory that does not grow with their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..layout.row_ranges import ConvertedTensor
from ..sources.checkpoint import Checkpoint
from ..sources.tensor_source import TensorSource
from ..sources.torch_tensors import torch_dtype
from .comparison import Comparison, ConfigDifference, Difference
from .finite import values_that_are_not_finite
from .hf_view import HFView
from .scan import TensorPair, scan, scan_with_tolerance

# Largest relative error of one rounding to each dtype: half of its last bit.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
    torch.float8_e4m3fn: 2**-4,
    torch.float8_e5m2: 2**-3,
}


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerances: Mapping[torch.dtype, float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare two checkpoints, each of either layout, tensor by tensor under their Hugging Face names.

    Without tolerances, bits are compared: a NaN's payload and the sign of a zero count, and another dtype is a
    difference. With tolerances, values are compared. Checkpoint a is the expected one. An element of b may differ by
    the tolerance of the coarser of the two dtypes (the one with fewer bits of precision) times the largest finite
    magnitude of a's tensor. With `TOLERANCES`, b may thus be a after one rounding to another dtype. Elements near zero
    may differ by as much as large ones, because a matrix product adds the errors up. NaN equals NaN, an infinity equals
    only itself, and tensors that are not floating-point must be equal.

    A checkpoint with tied embeddings and no `lm_head.weight` is compared as if it stored its embeddings there. The
    configurations must describe the same model, with transformers' defaults for missing fields. Fields about storing or
    running the checkpoint do not count. Tying of the embeddings counts, since it changes how the model trains.

    The notes name each tensor with NaNs or infinities, in either checkpoint. They are no difference in themselves.

    Args:
        a: An open checkpoint.
        b: Another one.
        tolerances: Largest relative error by dtype, such as `TOLERANCES`; `None` compares bits.
        progress: Called repeatedly with the bytes of a that are compared, and at the end with all bytes of a.

    Raises:
        CheckpointError: A checkpoint cannot be read or contradicts itself, or `tolerances` lacks a dtype.
    """
    left, right = HFView(a), HFView(b)
    left.add_tied_head(right)
    right.add_tied_head(left)
    count = _ByteCount(a.source, progress)
    differences = []
    names = list(dict.fromkeys([*left.tensors, *right.tensors]))
    for name in names:
        difference = _compare_tensor(name, left, right, tolerances, count)
        if difference is not None:
            differences.append(difference)
    count.finish()
    return Comparison(
        a=a.path,
        b=b.path,
        tensors=len(names),
        bytes=count.bytes,
        bitwise=tolerances is None,
        differences=tuple(differences),
        config=tuple(_config_differences(left.fields, right.fields)),
        notes=(
            *(note for view in (left, right) if (note := view.note()) is not None),
            *(f"{each.path}: {text}" for each in (a, b) for text in values_that_are_not_finite(each.source)),
        ),
    )


class _ByteCount:
    """Counts the compared bytes of a, and reports the progress."""

    def __init__(self, source: TensorSource, progress: Callable[[int], None] | None) -> None:
        self.bytes = 0
        self._total = sum(info.nbytes for info in source.tensors.values())
        self._progress = progress

    def add(self, count: int) -> None:
        self.bytes += count
        if self._progress is not None:
            # A tied head is compared in addition to the stored tensors.
            self._progress(min(self.bytes, self._total))

    def finish(self) -> None:
        """Report all bytes, including tensors whose values were not compared."""
        if self._progress is not None:
            self._progress(self._total)


def _compare_tensor(
    name: str, left: HFView, right: HFView, tolerances: Mapping[torch.dtype, float] | None, count: _ByteCount
) -> Difference | None:
    a, b = left.tensors.get(name), right.tensors.get(name)
    if a is None or b is None:
        return Difference(name, "only in b" if a is None else "only in a", _described(a), _described(b))
    if a.info.shape != b.info.shape:
        return Difference(name, "shape", _described(a), _described(b))
    floating = a.info.is_floating_point and b.info.is_floating_point
    if a.info.dtype != b.info.dtype and (tolerances is None or not floating):
        return Difference(name, "dtype", _described(a), _described(b))
    pair = TensorPair(left.source, a, right.source, b)
    if tolerances is None or not floating:
        values = scan(pair, None, count.add)
    else:
        values = scan_with_tolerance(pair, _tolerance((a.info.dtype, b.info.dtype), tolerances), count.add)
    return None if values is None else Difference(name, "values", _described(a), _described(b), values)


def _described(tensor: ConvertedTensor | None) -> str | None:
    return None if tensor is None else f"{tensor.info.dtype} {list(tensor.info.shape)}"


def _tolerance(dtypes: tuple[str, str], tolerances: Mapping[torch.dtype, float]) -> float:
    coarser = max(dtypes, key=lambda dtype: torch.finfo(torch_dtype(dtype)).eps)
    tolerance = tolerances.get(torch_dtype(coarser))
    if tolerance is None or not 0 <= tolerance < math.inf:
        raise CheckpointError(
            f"the tolerance for {coarser} is {tolerance}, but must be a number from 0: give one for each dtype of the "
            "checkpoints."
        )
    return tolerance


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[ConfigDifference]:
    for name in sorted({*a, *b}, key=str):
        first, second = a.get(name), b.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _config_differences(first, second, f"{prefix}{name}.")
        elif first != second:
            yield ConfigDifference(f"{prefix}{name}", first, second)
