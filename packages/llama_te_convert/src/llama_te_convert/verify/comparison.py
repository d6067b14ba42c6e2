"""The report of a comparison: which tensors and configuration fields differ, where, and by how much."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .report_text import bytes_text


@dataclass(frozen=True)
class ValueDifference:
    """How the values of two tensors differ.

    Attributes:
        elements: Number of elements that differ, or that differ by more than `allowed`.
        of: Number of elements.
        largest: Largest absolute difference of such elements. Infinite if one of the two is not finite; 0 if only the
            bits differ, as for two zeros or two NaNs.
        index: Position of the largest difference, in the tensor of the Hugging Face layout.
        a: Value at that position in a.
        b: Value at that position in b.
        a_bits: Bits of the value in a, as in "0x3f80".
        b_bits: Bits of the value in b.
        allowed: Largest absolute difference that was allowed; `None` if bits were compared.
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
        a: Its dtype and shape in a, as in "bfloat16 [64, 32]"; `None` if a lacks it.
        b: Its dtype and shape in b; `None` if b lacks it.
        values: How the values differ, for the kind "values".
    """

    name: str
    kind: str
    a: str | None
    b: str | None
    values: ValueDifference | None = None

    def line(self) -> str:
        """The difference as a line of text."""
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
    """A configuration field that differs. A nested field has a name such as `rope_parameters.factor`."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """The report of `compare`.

    Attributes:
        a: Location of the first checkpoint.
        b: Location of the second checkpoint.
        tensors: Number of tensors in either checkpoint, by Hugging Face names.
        bytes: Bytes of the tensors of a whose values were compared.
        bitwise: Whether bits were compared (otherwise values, with a tolerance).
        differences: Tensors that differ.
        config: Configuration fields that differ.
        notes: Oddities of one checkpoint that are not differences.
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
        """Whether no tensor and no configuration field differs."""
        return not self.differences and not self.config

    def lines(self) -> list[str]:
        """The report as text, with every tensor and field that differs."""
        how = "bit for bit" if self.bitwise else "within the tolerance"
        verdict = (
            f"equal {how}: {self.tensors} tensors, {bytes_text(self.bytes)}, and the configuration"
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
        """The report as JSON types. JSON has no infinity and no NaN, so these become strings."""
        plain = _json(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return {"equal": self.equal, **plain}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
