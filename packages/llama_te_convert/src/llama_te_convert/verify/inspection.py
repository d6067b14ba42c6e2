"""Inspection of a checkpoint: its contents, the tensors that they convert to, and its problems."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..layout.mapping import TensorMapping, map_known_names
from ..layout.rules import is_computed
from ..layout.tensor_info import TensorInfo
from ..sources.checkpoint import Checkpoint
from .expectation import named_architecture
from .finite import values_that_are_not_finite
from .model_fields import ModelSizes, model_fields
from .problems import config_problems, rules_of, tensor_problems
from .report_text import NAME_IN_LAYER, bytes_text, fold


@dataclass(frozen=True)
class DtypeUse:
    """The tensors of one dtype: their number, their elements and their bytes."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint.

    Attributes:
        name: Its name.
        dtype: Its dtype, as in "bfloat16".
        shape: Its shape.
        others: Its tensors in the other layout: the one that it becomes or is part of, or those that it splits into.
            Empty if there is no rule for it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """The report of `inspect`.

    Attributes:
        path: Location of the checkpoint.
        layout: "Hugging Face" or "Transformer Engine".
        architecture: The class that the configuration names.
        sizes: Sizes of the model, from the configuration.
        dtypes: The use of each dtype.
        parameters: Elements of all tensors. A tied tensor counts once if it is stored once.
        bytes: Bytes of all tensors.
        tensors: All tensors, in the checkpoint's order.
        mapping: The Hugging Face tensors that make each Transformer Engine tensor.
        problems: One sentence for each problem.
    """

    path: str
    layout: str
    architecture: str | None
    sizes: ModelSizes
    dtypes: dict[str, DtypeUse]
    parameters: int
    bytes: int
    tensors: tuple[TensorEntry, ...]
    mapping: dict[str, tuple[str, ...]]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report as text. Layers with the same tensors share a line."""
        other = "Hugging Face" if self.layout == "Transformer Engine" else "Transformer Engine"
        return [
            f"{self.path}: {self.architecture or 'no architecture named'}, {self.layout} layout",
            _sizes_line(self.sizes),
            f"{len(self.tensors)} tensors, {self.parameters:,} parameters, {bytes_text(self.bytes)}",
            *(
                f"  {dtype}: {use.tensors} tensors, {use.parameters:,} parameters, {bytes_text(use.bytes)}"
                for dtype, use in self.dtypes.items()
            ),
            f"tensors -> in the {other} layout:",
            *_tensor_lines(self.tensors),
            *([f"{len(self.problems)} wrong:"] if self.problems else ["nothing wrong found"]),
            *(f"  {problem}" for problem in self.problems),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            **dataclasses.asdict(self),
            "tensors": [
                {"name": each.name, "dtype": each.dtype, "shape": list(each.shape), "others": list(each.others)}
                for each in self.tensors
            ],
            "mapping": {te: list(hf) for te, hf in self.mapping.items()},
            "problems": list(self.problems),
        }


def inspect(
    checkpoint: Checkpoint, *, values: bool = False, progress: Callable[[int], None] | None = None
) -> Inspection:
    """Inspect the configuration and the names, shapes and dtypes of a checkpoint's tensors.

    `Inspection.problems` reports a broken configuration and broken tensors.

    Args:
        checkpoint: An open checkpoint, of either layout.
        values: Whether to read the tensors too, and report those with NaNs or infinities.
        progress: Called with the bytes of each part that is read.

    Raises:
        CheckpointError: A file cannot be read; only with `values`.
    """
    problems = []
    try:
        fields = model_fields(checkpoint)
    except CheckpointError as error:
        problems.append(str(error))
        fields = dict(checkpoint.config)  # its valid fields still say which shapes to expect
    infos = checkpoint.source.tensors
    mappings = map_known_names(infos, rules=rules_of(checkpoint), is_te=checkpoint.is_te)
    problems += config_problems(checkpoint)
    problems += tensor_problems(checkpoint, fields)
    if values:
        problems += values_that_are_not_finite(checkpoint.source, progress)
    return Inspection(
        path=checkpoint.path,
        layout="Transformer Engine" if checkpoint.is_te else "Hugging Face",
        architecture=named_architecture(checkpoint.config),
        sizes=ModelSizes.of(fields),
        dtypes=_dtypes(infos.values()),
        parameters=sum(math.prod(info.shape) for info in infos.values()),
        bytes=sum(info.nbytes for info in infos.values()),
        tensors=tuple(
            TensorEntry(name, info.dtype, info.shape, _others(mappings.get(name), checkpoint.is_te))
            for name, info in infos.items()
        ),
        mapping={mapping.te: mapping.hf for mapping in mappings.values()},
        problems=tuple(problems),
    )


def _dtypes(infos: Iterable[TensorInfo]) -> dict[str, DtypeUse]:
    uses: dict[str, DtypeUse] = {}
    for info in infos:
        use = uses.get(info.dtype, DtypeUse(0, 0, 0))
        uses[info.dtype] = DtypeUse(use.tensors + 1, use.parameters + math.prod(info.shape), use.bytes + info.nbytes)
    return uses


def _others(mapping: TensorMapping | None, is_te: bool) -> tuple[str, ...]:
    if mapping is None:
        return ()
    return mapping.hf if is_te else (mapping.te,)


def _sizes_line(sizes: ModelSizes) -> str:
    def text(value: int | None) -> str:
        return "unknown" if value is None else str(value)

    tied = {None: "not said whether embeddings are tied", True: "tied embeddings", False: "untied embeddings"}
    return (
        f"layers {text(sizes.layers)}, hidden size {text(sizes.hidden_size)}, MLP {text(sizes.intermediate_size)}, "
        f"heads {text(sizes.heads)}, key/value heads {text(sizes.key_value_heads)}, head size {text(sizes.head_dim)}, "
        f"vocabulary {text(sizes.vocabulary)}, rope {sizes.rope_type or 'unknown'}, {tied[sizes.tied]}"
    )


def _tensor_lines(tensors: Sequence[TensorEntry]) -> list[str]:
    folded = fold((each.name, (each.dtype, each.shape, _others_text(each))) for each in tensors)
    width = max((len(name) for name, _ in folded), default=0)
    return [f"  {name:<{width}}  {dtype} {list(shape)} -> {others}" for name, (dtype, shape, others) in folded]


def _others_text(entry: TensorEntry) -> str:
    """The names in the other layout, without the layer's prefix that they share with the tensor's own name."""
    if not entry.others:
        return "computed from the configuration" if is_computed(entry.name) else "no rule"
    if entry.others == (entry.name,):
        return "the same"
    match = NAME_IN_LAYER.fullmatch(entry.name)
    shared = "" if match is None else f"{match['before']}{match['layer']}."
    return ", ".join(name.removeprefix(shared) for name in entry.others)
