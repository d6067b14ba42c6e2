"""Comparison of two checkpoints, of either layout, in memory that does not grow with their tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..layout.mapping import Row, is_computed
from ..layout.row_ranges import HeadSizes, RowRange, Target, targets
from ..sources.tensor_source import Checkpoint, CheckpointError, TensorInfo, TensorSource
from ..sources.torch_tensors import as_tensor, torch_dtype
from .inspection import model_fields, size_text, steps_of

# Largest relative error of one rounding to each dtype: half of its last bit.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
    torch.float8_e4m3fn: 2**-4,
    torch.float8_e5m2: 2**-3,
}
# Elements that are compared at once. Small, because they are looked at as float64.
_BLOCK = 2**19
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ValueDifference:
    """How the values of two tensors differ.

    Attributes:
        elements: Number of elements that differ (by more than is allowed).
        of: Number of elements.
        largest: Largest absolute difference of such elements. Infinite where one of them is no number; 0 where two
            zeros or two NaNs differ in their bits.
        index: Where that is, in the tensor as Hugging Face has it.
        a: Value there.
        b: Value there.
        a_bits: The bits of that value, as in "0x3f80".
        b_bits: Likewise.
        allowed: Largest absolute difference that was allowed; `None` when bits were compared.
    """

    elements: int
    of: int
    largest: float
    index: tuple[int, ...]
    a: float
    b: float
    a_bits: str
    b_bits: str
    allowed: float | None


@dataclass(frozen=True)
class Difference:
    """A tensor that differs.

    Attributes:
        name: Its Hugging Face name.
        kind: "only in a", "only in b", "shape", "dtype" or "values".
        a: Its dtype and shape in a, as in "bfloat16 [64, 32]"; `None` if it is not there.
        b: Likewise.
        values: How the values differ, for that kind.
    """

    name: str
    kind: str
    a: str | None
    b: str | None
    values: ValueDifference | None = None

    def line(self) -> str:
        """A line for people."""
        if self.values is None:
            return f"{self.name}: {self.a or 'not there'} in a, {self.b or 'not there'} in b"
        found = self.values
        a, b = (
            (f"{found.a!r}", f"{found.b!r}")
            if found.largest > 0
            else (f"{found.a!r} ({found.a_bits})", f"{found.b!r} ({found.b_bits})")
        )
        by = "" if found.allowed is None else f" by more than {found.allowed:.4g}"
        return (
            f"{self.name}: {found.elements} of {found.of} elements differ{by}, most at {list(found.index)}: "
            f"{a} in a, {b} in b, which is {found.largest:.4g} apart"
        )


@dataclass(frozen=True)
class ConfigDifference:
    """A field of the configuration that differs; a field within another has a name such as `rope_parameters.factor`."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
        a: Where the first checkpoint is.
        b: Where the second is.
        tensors: Number of tensors, by Hugging Face names, in either of them.
        bytes: Bytes of those of a whose values were compared.
        bitwise: Whether bits were compared (else values, with a tolerance).
        differences: Tensors that differ.
        config: Fields of the configuration that differ.
        notes: What is odd about one of the checkpoints, but no difference.
    """

    a: str
    b: str
    tensors: int
    bytes: int
    bitwise: bool
    differences: tuple[Difference, ...]
    config: tuple[ConfigDifference, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and not self.config

    def lines(self) -> list[str]:
        """A text for people, with every tensor and field that differs."""
        how = "bit for bit" if self.bitwise else "within the tolerance"
        verdict = (
            f"equal {how}: {self.tensors} tensors, {size_text(self.bytes)}, and the configuration"
            if self.equal
            else f"different: {len(self.differences)} of {self.tensors} tensors and {len(self.config)} fields of the "
            "configuration"
        )
        return [
            f"a: {self.a}",
            f"b: {self.b}",
            verdict,
            *(f"  {difference.line()}" for difference in self.differences),
            *(f"  configuration, {field.name}: {field.a!r} in a, {field.b!r} in b" for field in self.config),
            *(f"note: {note}" for note in self.notes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types; JSON has no infinity and no NaN, so those are texts."""
        plain = _json(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return {"equal": self.equal, **plain}


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerances: Mapping[torch.dtype, float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare two checkpoints, each of either layout, tensor by tensor under their Hugging Face names.

    Without tolerances bits are compared: a NaN's payload and the sign of a zero count, and another dtype is a
    difference of its own. With them values are: a is taken for what b should be, and an element may be off by the
    tolerance of the coarser of the two dtypes (the one with fewer bits of precision), times the largest finite absolute
    value of a's tensor. With `TOLERANCES` b may thus be a after one rounding to another dtype. Elements near zero may
    be off by as much as large ones: a product adds them up, so that is the error that counts. NaN equals NaN there, an
    infinity equals itself alone, and tensors that are not of floating point must be the same.

    A checkpoint with tied embeddings and no `lm_head.weight` has its embeddings there. The configurations must describe
    the same model, with transformers' defaults for what they do not say; how they are stored or run does not count.
    Whether embeddings are tied counts, since it tells how the model goes on training.

    Args:
        a: An open checkpoint.
        b: Another one.
        tolerances: Largest relative error by dtype, such as `TOLERANCES`; `None` compares bits.
        progress: Called now and then with the number of bytes of a that are done; at the end with that of all.

    Raises:
        CheckpointError: A checkpoint cannot be read or contradicts itself, or `tolerances` has no entry for a dtype.
    """
    left, right = _View(a), _View(b)
    left.tie(right)
    right.tie(left)
    count = _Count(a.source, progress)
    differences = []
    names = list(dict.fromkeys([*left.targets, *right.targets]))
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
        notes=tuple(note for view in (left, right) if (note := view.note()) is not None),
    )


# --- checkpoints under Hugging Face names -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """The tensors of a source that the mapping has rules for."""

    tensors: Mapping[str, TensorInfo]
    source: TensorSource
    concurrent: bool = False

    def read(self, name: str, start: int, stop: int) -> memoryview:
        return self.source.read(name, start, stop)

    def close(self) -> None:
        self.source.close()


class _View:
    """A checkpoint's tensors under their Hugging Face names, as rows of what is stored."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from ..configs.architectures import architecture_of

        self.checkpoint = checkpoint
        self.source = checkpoint.source
        self.fields = model_fields(checkpoint)
        infos = {name: info for name, info in self.source.tensors.items() if not is_computed(name)}
        table = architecture_of(checkpoint.config).table
        ruled = steps_of(infos, table, is_te=True) if checkpoint.is_te else {}
        known = {name: info for name, info in infos.items() if name in ruled}
        self.targets = {target.name: target for target in self._split(known, table)}
        for name, info in infos.items():
            if name in known:
                continue
            if name in self.targets:
                raise CheckpointError(
                    f"{checkpoint.path} has {name} twice: under that name, and within another tensor. Remove one."
                )
            self.targets[name] = Target(name, info, (RowRange(name, 0, info.rows),))

    def _split(self, known: Mapping[str, TensorInfo], table: tuple[Row, ...]) -> list[Target]:
        sizes = HeadSizes(*(self.fields[field.name] for field in dataclasses.fields(HeadSizes)))
        try:
            return targets(_Known(known, self.source), sizes, to_te=False, table=table) if known else []
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from error

    @property
    def _embeddings(self) -> Target | None:
        """What the head is tied to, if it is."""
        if self.fields["tie_word_embeddings"] is not True:
            return None
        return next((each for name, each in self.targets.items() if name.endswith("embed_tokens.weight")), None)

    def tie(self, other: _View) -> None:
        """Give a head that is tied and not stored its name, where the other one has it."""
        embeddings = self._embeddings
        if embeddings is not None and _HEAD not in self.targets and _HEAD in other.targets:
            self.targets[_HEAD] = dataclasses.replace(embeddings, name=_HEAD)

    def note(self) -> str | None:
        """What is said of a head that the configuration ties, but that is another tensor."""
        embeddings, head = self._embeddings, self.targets.get(_HEAD)
        if embeddings is None or head is None:
            return None
        same = embeddings.info == head.info and (
            embeddings.ranges == head.ranges
            or _scan(_Pair(self.source, embeddings, self.source, head), None, lambda count: None) is None
        )
        if same:
            return None
        return (
            f"{self.checkpoint.path} has tied embeddings by its configuration, but its {_HEAD} is not "
            f"{embeddings.name}: set tie_word_embeddings to false there, or remove {_HEAD}."
        )


# --- tensors ----------------------------------------------------------------------------------------------------------


class _Count:
    """Bytes of a that are compared, and are done: what is left out counts as done at the end."""

    def __init__(self, source: TensorSource, progress: Callable[[int], None] | None) -> None:
        self.bytes = 0
        self._total = sum(info.nbytes for info in source.tensors.values())
        self._progress = progress

    def add(self, count: int) -> None:
        self.bytes += count
        if self._progress is not None:
            # A tied head is compared besides what is stored.
            self._progress(min(self.bytes, self._total))

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total)


def _compare_tensor(
    name: str, left: _View, right: _View, tolerances: Mapping[torch.dtype, float] | None, count: _Count
) -> Difference | None:
    a, b = left.targets.get(name), right.targets.get(name)
    if a is None or b is None:
        return Difference(name, "only in b" if a is None else "only in a", _described(a), _described(b))
    if a.info.shape != b.info.shape:
        return Difference(name, "shape", _described(a), _described(b))
    floating = a.info.is_floating_point and b.info.is_floating_point
    if a.info.dtype != b.info.dtype and (tolerances is None or not floating):
        return Difference(name, "dtype", _described(a), _described(b))
    pair = _Pair(left.source, a, right.source, b)
    if tolerances is None or not floating:
        values = _scan(pair, None, count.add)
    else:
        values = _scan_with_tolerance(pair, _tolerance((a.info.dtype, b.info.dtype), tolerances), count.add)
    return None if values is None else Difference(name, "values", _described(a), _described(b), values)


def _described(target: Target | None) -> str | None:
    return None if target is None else f"{target.info.dtype} {list(target.info.shape)}"


def _tolerance(dtypes: tuple[str, str], tolerances: Mapping[torch.dtype, float]) -> float:
    coarser = max(dtypes, key=lambda dtype: torch.finfo(torch_dtype(dtype)).eps)
    tolerance = tolerances.get(torch_dtype(coarser))
    if tolerance is None or not 0 <= tolerance < math.inf:
        raise CheckpointError(
            f"the tolerance for {coarser} is {tolerance}, but must be a number from 0: give one for each dtype that "
            "the checkpoints have."
        )
    return tolerance


@dataclass(frozen=True)
class _Pair:
    """Two tensors of one shape."""

    a_source: TensorSource
    a: Target
    b_source: TensorSource
    b: Target

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The same rows of both, in order, each flat, and the place of their first element."""
        row = math.prod(self.a.info.shape[1:])
        at = 0
        for a, b in _aligned(self.a.ranges, self.b.ranges, max(1, _BLOCK // max(1, row))):
            a_rows = as_tensor(self.a_source.read(a.name, a.start, a.stop), self.a.info.dtype)
            if self.a_source is self.b_source:
                a_rows = a_rows.clone()  # the next read may take its memory
            b_rows = as_tensor(self.b_source.read(b.name, b.start, b.stop), self.b.info.dtype)
            yield at * row, a_rows, b_rows
            at += a.stop - a.start


def _aligned(a: tuple[RowRange, ...], b: tuple[RowRange, ...], most: int) -> Iterator[tuple[RowRange, RowRange]]:
    """Two lists of ranges of the same number of rows, cut so that they go together."""
    a_left, b_left = ([each for each in ranges[::-1] if each.stop > each.start] for ranges in (a, b))
    while a_left:
        first, second = a_left.pop(), b_left.pop()
        rows = min(first.stop - first.start, second.stop - second.start, most)
        for each, left in ((first, a_left), (second, b_left)):
            if each.start + rows < each.stop:
                left.append(RowRange(each.name, each.start + rows, each.stop))
        yield (
            RowRange(first.name, first.start, first.start + rows),
            RowRange(second.name, second.start, second.start + rows),
        )


def _scan(pair: _Pair, allowed: float | None, add: Callable[[int], None]) -> ValueDifference | None:
    """The elements that differ in their bits, or are further apart than is allowed."""
    elements, largest = 0, -1.0
    worst: tuple[int, torch.Tensor, torch.Tensor] | None = None
    for at, a, b in pair.blocks():
        add(a.nbytes)
        if _same_bits(a, b):
            continue
        if allowed is None:
            where = (_bits(a) != _bits(b)).nonzero().view(-1)
            gaps = _gaps(_picked(a, where), _picked(b, where))
        else:
            gaps = _gaps(a, b)
            where = (gaps > allowed).nonzero().view(-1)
            gaps = gaps[where]
        if len(where) == 0:
            continue
        elements += len(where)
        place = int(gaps.argmax())
        if float(gaps[place]) > largest:
            largest = float(gaps[place])
            one = where[place : place + 1]
            worst = at + int(one), _picked(a, one), _picked(b, one)
    if worst is None:
        return None
    flat, a_value, b_value = worst
    return ValueDifference(
        elements=elements,
        of=math.prod(pair.a.info.shape),
        largest=largest,
        index=_index(flat, pair.a.info.shape),
        a=a_value.item(),
        b=b_value.item(),
        a_bits=_bits_text(a_value),
        b_bits=_bits_text(b_value),
        allowed=allowed,
    )


def _scan_with_tolerance(pair: _Pair, tolerance: float, add: Callable[[int], None]) -> ValueDifference | None:
    scale = gap = 0.0
    for _, a, b in pair.blocks():
        add(a.nbytes)
        if a.numel() == 0:
            continue
        sizes = a.to(torch.float64).abs()
        scale = max(scale, float(torch.where(sizes.isfinite(), sizes, 0.0).max()))
        if not _same_bits(a, b):
            gap = max(gap, float(_gaps(a, b).max()))
    if gap <= tolerance * scale:
        return None
    # Only now the scale is known; tensors that differ are few.
    return _scan(pair, tolerance * scale, lambda count: None)


def _gaps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute differences; infinite between a NaN and a number, and 0 between NaNs and between equal infinities."""
    # The difference of two float32 or smaller numbers is rounded in float64 only where that is of no account.
    a, b = a.to(torch.float64), b.to(torch.float64)
    gaps = (a - b).abs()
    gaps = torch.where(a.isnan() != b.isnan(), math.inf, gaps)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, gaps)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _picked(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return _bits(tensor)[where].view(tensor.dtype)  # torch does not index every dtype


def _bits_text(value: torch.Tensor) -> str:
    size = value.dtype.itemsize
    return f"0x{int(_bits(value)) & (1 << 8 * size) - 1:0{2 * size}x}"


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))


# --- configurations ---------------------------------------------------------------------------------------------------


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[ConfigDifference]:
    for name in sorted({*a, *b}, key=str):
        first, second = a.get(name), b.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _config_differences(first, second, f"{prefix}{name}.")
        elif first != second:
            yield ConfigDifference(f"{prefix}{name}", first, second)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
