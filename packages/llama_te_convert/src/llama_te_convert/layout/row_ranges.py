"""Every tensor of the converted checkpoint as row ranges of the source's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError
from .mapping import TensorMapping, map_names
from .row_order import HeadSizes, PartRange, check_rows
from .rules import LLAMA, Rule, is_computed
from .tensor_info import TensorInfo


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of a source tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor of the converted checkpoint.

    Attributes:
        name: Its name.
        info: Its dtype and shape.
        ranges: The source rows that it consists of, in order.
    """

    name: str
    info: TensorInfo
    ranges: tuple[RowRange, ...]


def converted_tensors(
    infos: Mapping[str, TensorInfo],
    sizes: HeadSizes,
    *,
    to_te: bool,
    dtype: str | None = None,
    rules: tuple[Rule, ...] = LLAMA,
) -> list[ConvertedTensor]:
    """Find the source rows of every tensor of the other layout.

    Args:
        infos: Dtype and shape of each source tensor.
        sizes: Attention sizes of the model.
        to_te: Whether the source has the Hugging Face layout (otherwise the Transformer Engine layout).
        dtype: New dtype of floating-point tensors. `None` keeps theirs.
        rules: The rules of the architecture.

    Raises:
        CheckpointError: The rules do not know the tensors, or the shapes do not fit the sizes.
    """
    try:
        mappings = map_names((name for name in infos if not is_computed(name)), to_te=to_te, rules=rules)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    converted = []
    for mapping in mappings:
        names, made_names = (mapping.hf, (mapping.te,)) if to_te else ((mapping.te,), mapping.hf)
        sources = [infos[name] for name in names]
        try:
            part_ranges = _part_ranges(mapping, sources, sizes, to_te)
        except ValueError as error:
            described = ", ".join(f"{name} {list(info.shape)}" for name, info in zip(names, sources, strict=True))
            raise CheckpointError(f"{described} cannot become {', '.join(made_names)}: {error}.") from error
        first = sources[0]
        new_dtype = dtype if dtype is not None and first.is_floating_point else first.dtype
        ranges: list[list[RowRange]] = [[] for _ in made_names]
        row = 0
        for part, start, stop in part_ranges:
            if to_te:
                ranges[0].append(RowRange(mapping.hf[part], start, stop))
            else:
                ranges[part].append(RowRange(mapping.te, row, row + stop - start))
            row += stop - start
        for name, its_ranges in zip(made_names, ranges, strict=True):
            rows = sum(each.stop - each.start for each in its_ranges)
            shape = (rows, *first.shape[1:]) if first.shape else ()
            converted.append(ConvertedTensor(name, TensorInfo(new_dtype, shape), tuple(its_ranges)))
    return converted


def _part_ranges(
    mapping: TensorMapping, sources: Sequence[TensorInfo], sizes: HeadSizes, to_te: bool
) -> list[PartRange]:
    if len({(info.dtype, info.shape[1:]) for info in sources}) != 1:
        raise ValueError("they must have one dtype and one row shape")
    ranges = mapping.row_order.ranges(sum(info.rows for info in sources), sizes)
    if to_te:
        check_rows(ranges, [info.rows for info in sources])
    return ranges
