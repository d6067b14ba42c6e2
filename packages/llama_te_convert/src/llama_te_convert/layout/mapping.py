"""The tables that say which tensors of a Hugging Face Llama make which tensor of the Transformer Engine layout.

Names are matched in both directions by the same rows, so a conversion and its reverse cannot disagree. `{layer}` stands
for a layer's number. Names are relative to the decoder; `model.` or `transformer.` may stand before them.

Shapes: K key/value heads, G query heads per key/value head, D size of a head, E hidden size, F size of the MLP.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

# torch takes seconds to import, and knowing which rows go where does without it.
if TYPE_CHECKING:
    import torch


class Sizes(Protocol):
    """What the table needs of a configuration."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        ...


class Piece(NamedTuple):
    """Rows [start, stop) of one of a row's Hugging Face tensors, by its place in `Row.hf`."""

    source: int
    start: int
    stop: int


class Layout:
    """How the tensors of a row make one tensor: as row ranges of theirs, one behind the other."""

    def pieces(self, rows: int, sizes: Sizes) -> list[Piece]:
        """The row ranges of the Hugging Face tensors that make a Transformer Engine tensor of `rows` rows.

        Raises:
            ValueError: So many rows cannot be taken apart.
        """
        raise NotImplementedError

    def merge(self, tensors: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """One tensor of the Transformer Engine layout from those of the Hugging Face layout.

        Raises:
            ValueError: They do not have the numbers of rows that the layout needs.
        """
        import torch

        pieces = self.pieces(sum(len(tensor) for tensor in tensors), sizes)
        check_rows(pieces, [len(tensor) for tensor in tensors])
        if len(pieces) == 1:
            return tensors[0]
        return torch.cat([tensors[source][start:stop] for source, start, stop in pieces])

    def split(self, tensor: torch.Tensor, sizes: Sizes) -> list[torch.Tensor]:
        """The reverse of `merge`."""
        import torch

        pieces = self.pieces(len(tensor), sizes)
        if len(pieces) == 1:
            return [tensor]
        parts: list[list[torch.Tensor]] = [[] for _ in range(1 + max(piece.source for piece in pieces))]
        rows = tensor.split([stop - start for _, start, stop in pieces])
        for piece, part in zip(pieces, rows, strict=True):  # each source's pieces come in their order
            parts[piece.source].append(part)
        return [torch.cat(part) for part in parts]


def check_rows(pieces: Sequence[Piece], rows: Sequence[int]) -> None:
    """Refuse tensors whose numbers of rows are not those that `pieces` take.

    Raises:
        ValueError: With both.
    """
    needed = [max((stop for source, _, stop in pieces if source == i), default=0) for i in range(len(rows))]
    if needed != list(rows):
        raise ValueError(f"they have {list(rows)} rows, but {needed} are needed")


class Same(Layout):
    """One tensor, unchanged."""

    def pieces(self, rows: int, sizes: Sizes) -> list[Piece]:
        """All rows of the only tensor."""
        return [Piece(0, 0, rows)]


class InterleavedQKV(Layout):
    """Query, key and value rows, per key/value head: its G query heads, then its key, then its value.

    [K·(G + 2)·D, E] from [K·G·D, E], [K·D, E] and [K·D, E].
    """

    def pieces(self, rows: int, sizes: Sizes) -> list[Piece]:
        """Three for each key/value head."""
        heads, groups, size = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        if rows != (heads + 2 * groups) * size:
            raise ValueError(
                f"{rows} rows of queries, keys and values are not those of {heads} heads and {groups} key/value heads "
                f"of size {size}"
            )
        group = heads // groups * size
        return [
            piece
            for head in range(groups)
            for piece in (
                Piece(0, head * group, (head + 1) * group),
                Piece(1, head * size, (head + 1) * size),
                Piece(2, head * size, (head + 1) * size),
            )
        ]


class Stacked(Layout):
    """Parts of equal size, one after the other along the rows: [2·F, E] from two times [F, E]."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def pieces(self, rows: int, sizes: Sizes) -> list[Piece]:
        """One for each part."""
        if rows % self.parts:
            raise ValueError(f"{rows} rows are not {self.parts} equal parts")
        return [Piece(part, 0, rows // self.parts) for part in range(self.parts)]


class Prefixes(NamedTuple):
    """What stands before the decoder's names in each layout."""

    te: str
    hf: str


@dataclass(frozen=True)
class Row:
    """One row of the table: `hf` names, in order, make the `te` name by `layout`.

    `decoder` is there for the tensor of a head whose models have another prefix in each layout.
    """

    te: str
    hf: tuple[str, ...]
    layout: Layout
    decoder: Prefixes | None = None


_LAYER = "layers.{layer}."
LLAMA: tuple[Row, ...] = (
    Row("embed_tokens.weight", ("embed_tokens.weight",), Same()),
    Row(
        _LAYER + "self_attention.layernorm_qkv.layer_norm_weight",
        (_LAYER + "input_layernorm.weight",),
        Same(),
    ),
    Row(
        _LAYER + "self_attention.layernorm_qkv.weight",
        tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        InterleavedQKV(),
    ),
    Row(_LAYER + "self_attention.proj.weight", (_LAYER + "self_attn.o_proj.weight",), Same()),
    Row(_LAYER + "layernorm_mlp.layer_norm_weight", (_LAYER + "post_attention_layernorm.weight",), Same()),
    Row(
        _LAYER + "layernorm_mlp.fc1_weight",
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        Stacked(2),
    ),
    Row(_LAYER + "layernorm_mlp.fc2_weight", (_LAYER + "mlp.down_proj.weight",), Same()),
    Row("norm.weight", ("norm.weight",), Same()),
    *(
        Row(name, (name,), Same())
        for name in ("lm_head.weight", "score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias")
    ),
)
# The same tensors. transformers calls the decoder of its question answering `transformer` in a Llama alone.
MISTRAL: tuple[Row, ...] = tuple(
    dataclasses.replace(row, decoder=Prefixes(te="transformer.", hf="model.")) if "qa_outputs" in row.te else row
    for row in LLAMA
)


@dataclass(frozen=True)
class Step:
    """One row applied to one layer of one checkpoint: full names on both sides."""

    te: str
    hf: tuple[str, ...]
    layout: Layout


_NAME = re.compile(r"(?P<prefix>(?:model\.|transformer\.)?)(?:layers\.(?P<layer>[0-9]+)\.)?(?P<rest>.*)", re.DOTALL)


def plan(source_names: Iterable[str], *, to_te: bool, table: Sequence[Row] = LLAMA) -> list[Step]:
    """The steps that convert a checkpoint with these tensors.

    Args:
        source_names: All tensor names of the source.
        to_te: Whether the source has the Hugging Face layout (else the Transformer Engine layout).
        table: The rows to use.

    Raises:
        ValueError: With the names of source tensors that no row knows, or that a row needs and the source lacks.
    """
    by_name = {name: row for row in table for name in (row.hf if to_te else (row.te,))}
    names = list(source_names)
    present = set(names)
    decoders = [row.decoder for name in names if (row := by_name.get(name)) is not None and row.decoder is not None]
    prefixes = {decoder.hf if to_te else decoder.te: decoder for decoder in decoders}
    steps: dict[str, Step] = {}
    unknown, missing = [], []
    for name in names:
        match = _NAME.fullmatch(name)
        assert match is not None  # the pattern takes any name
        layer = match["layer"]
        generic = match["rest"] if layer is None else _LAYER + match["rest"]
        row = by_name.get(generic)
        if row is None:
            unknown.append(name)
            continue

        def full(prefix: str, generic_name: str, layer: str | None = layer) -> str:
            return prefix + generic_name.replace("{layer}", str(layer))

        prefix = prefixes.get(match["prefix"], Prefixes(match["prefix"], match["prefix"]))
        step = Step(full(prefix.te, row.te), tuple(full(prefix.hf, part) for part in row.hf), row.layout)
        if step.te not in steps:
            steps[step.te] = step
            missing += [part for part in (step.hf if to_te else ()) if part not in present]
    if unknown or missing:
        raise ValueError(
            "the checkpoint does not have the tensors of a Llama. "
            + _list("No rule for", unknown)
            + _list("Needed but not there", missing)
        )
    return list(steps.values())


def is_computed(name: str) -> bool:
    """Whether old checkpoints keep under this name what transformers computes from the configuration."""
    return name.endswith("rotary_emb.inv_freq")


def check_targets(made: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse a conversion whose results are not exactly the tensors that the target model has.

    Raises:
        ValueError: With the names.
    """
    made, wanted = set(made), set(wanted)
    if made != wanted:
        raise ValueError(
            "the tensors do not fit the target model. "
            + _list("It has no source for", sorted(wanted - made))
            + _list("It has no place for", sorted(made - wanted))
        )


def convert_tensors(
    steps: Iterable[Step], source: Mapping[str, torch.Tensor], sizes: Sizes, *, to_te: bool
) -> dict[str, torch.Tensor]:
    """Apply `steps` to all tensors of `source`; nothing in the result shares memory with it.

    Raises:
        ValueError: A tensor cannot be taken apart as its rule says; with its name and shape.
    """
    import torch

    result = {}
    for step in steps:
        inputs = [source[name] for name in (step.hf if to_te else (step.te,))]
        try:
            outputs = [step.layout.merge(inputs, sizes)] if to_te else step.layout.split(inputs[0], sizes)
        except (RuntimeError, ValueError) as error:
            names = step.hf if to_te else (step.te,)
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in zip(names, inputs, strict=True))
            raise ValueError(f"{shapes}: cannot make {step.te if to_te else step.hf} of them: {error}") from error
        for name, output in zip((step.te,) if to_te else step.hf, outputs, strict=True):
            result[name] = output.clone(memory_format=torch.contiguous_format)
    return result


def _list(title: str, names: Sequence[str], most: int = 8) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title}: {', '.join(names[:most])}{more}. "
