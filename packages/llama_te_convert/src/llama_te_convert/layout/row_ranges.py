"""What a conversion makes: every tensor of the target as row ranges of the source's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..sources.tensor_source import CheckpointError, TensorInfo, TensorSource, parts
from .mapping import LLAMA, Piece, Row, Sizes, Step, check_rows, is_computed, plan


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of a tensor of the source."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Target:
    """A tensor to be made: these row ranges, one behind the other.

    Attributes:
        name: Its name.
        info: Its dtype and shape.
        ranges: Where its rows come from.
    """

    name: str
    info: TensorInfo
    ranges: tuple[RowRange, ...]


@dataclass(frozen=True)
class HeadSizes:
    """What the mapping needs of a configuration: see `mapping.Sizes`."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any], path: str) -> HeadSizes:
        """From the content of a `config.json`, with the defaults that transformers has.

        Args:
            config: The content.
            path: Of the checkpoint, for messages.

        Raises:
            CheckpointError: They are missing, or no sizes.
        """
        heads: Any = config.get("num_attention_heads")
        groups: Any = config.get("num_key_value_heads") or heads
        size: Any = config.get("head_dim")
        hidden: Any = config.get("hidden_size")
        if size is None and _is_size(hidden) and _is_size(heads):
            size = hidden // heads
        if not all(map(_is_size, (heads, groups, size))) or heads % groups:
            raise CheckpointError(
                f"the configuration of {path} has num_attention_heads={heads!r}, "
                f"num_key_value_heads={groups!r} and head_dim={size!r}: these are no sizes of a Llama."
            )
        return cls(heads, groups, size)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def targets(
    source: TensorSource,
    sizes: Sizes,
    *,
    to_te: bool,
    dtype: str | None = None,
    table: tuple[Row, ...] = LLAMA,
) -> list[Target]:
    """All tensors of the other layout.

    Args:
        source: The checkpoint's tensors.
        sizes: Heads and their size.
        to_te: Whether the source has the Hugging Face layout (else the Transformer Engine layout).
        dtype: What floating-point tensors become; as they are by default.
        table: The rows to use.

    Raises:
        CheckpointError: The tensors are not those of a checkpoint that the table knows, or do not fit the sizes.
    """
    try:
        steps = plan((name for name in source.tensors if not is_computed(name)), to_te=to_te, table=table)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    made = []
    for step in steps:
        names, made_names = (step.hf, (step.te,)) if to_te else ((step.te,), step.hf)
        infos = [source.tensors[name] for name in names]
        try:
            pieces = _pieces(step, infos, sizes, to_te)
        except ValueError as error:
            described = ", ".join(f"{name} {list(info.shape)}" for name, info in zip(names, infos, strict=True))
            raise CheckpointError(f"{described}: cannot make {', '.join(made_names)} of them: {error}.") from error
        first = infos[0]
        cast_dtype = dtype if dtype is not None and first.is_floating_point else first.dtype
        taken: list[list[RowRange]] = [[] for _ in made_names]
        at = 0
        for part, start, stop in pieces:
            if to_te:
                taken[0].append(RowRange(step.hf[part], start, stop))
            else:
                taken[part].append(RowRange(step.te, at, at + stop - start))
            at += stop - start
        for name, ranges in zip(made_names, taken, strict=True):
            rows = sum(each.stop - each.start for each in ranges)
            shape = (rows, *first.shape[1:]) if first.shape else ()
            made.append(Target(name, TensorInfo(cast_dtype, shape), tuple(ranges)))
    return made


def _pieces(step: Step, infos: list[TensorInfo], sizes: Sizes, to_te: bool) -> list[Piece]:
    if len({(info.dtype, info.shape[1:]) for info in infos}) != 1:
        raise ValueError("they must have one dtype and one size of rows")
    pieces = step.layout.pieces(sum(info.rows for info in infos), sizes)
    if to_te:
        check_rows(pieces, [info.rows for info in infos])
    return pieces


def read(target: Target, source: TensorSource) -> Iterator[memoryview]:
    """The bytes of a target in parts, in its dtype; a part may be overwritten when the next one is asked for.

    Raises:
        CheckpointError: A file cannot be read.
    """
    for rows in target.ranges:
        info = source.tensors[rows.name]
        for start, stop in parts(info, rows.start, rows.stop):
            data = source.read(rows.name, start, stop)
            if info.dtype != target.info.dtype:
                from ..sources.torch_tensors import cast  # torch takes seconds to import: only for those who cast

                data = cast(data, info.dtype, target.info.dtype)
            yield data


@dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        name: Its name.
        info: Its dtype and shape.
        parts: Begins to give its bytes in parts; a part may be overwritten when the next one is asked for. Raises
            `CheckpointError` if they cannot be read.
    """

    name: str
    info: TensorInfo
    parts: Callable[[], Iterator[memoryview]]


def outputs(targets: list[Target], source: TensorSource) -> list[Output]:
    """The targets, ready to be written."""
    return [Output(target.name, target.info, functools.partial(read, target, source)) for target in targets]
