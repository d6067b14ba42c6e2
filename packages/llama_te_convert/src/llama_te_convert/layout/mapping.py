"""Rules applied to the tensor names of a checkpoint, and to tensors in memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .row_order import HeadSizes, RowOrder, Unchanged
from .rules import LAYER, LLAMA, Prefixes, Rule

# Importing torch takes seconds, and names are matched without it.
if TYPE_CHECKING:
    import torch

_NAME = re.compile(
    r"(?P<prefix>(?:model\.|transformer\.)?)(?:layers\.(?P<layer>0|[1-9][0-9]{0,8})\.)?(?P<rest>.*)", re.DOTALL
)


@dataclass(frozen=True)
class TensorMapping:
    """A rule applied to one layer of one checkpoint: the full names in both layouts.

    Attributes:
        te: Name of the Transformer Engine tensor.
        hf: Names of the Hugging Face tensors that make it.
        row_order: How the rows of the Hugging Face tensors line up.
    """

    te: str
    hf: tuple[str, ...]
    row_order: RowOrder


def map_names(source_names: Iterable[str], *, to_te: bool, rules: Sequence[Rule] = LLAMA) -> list[TensorMapping]:
    """Match the tensors of a checkpoint to those of the other layout.

    Args:
        source_names: All tensor names of the source.
        to_te: Whether the source has the Hugging Face layout (otherwise the Transformer Engine layout).
        rules: The rules of the architecture.

    Raises:
        ValueError: A source tensor has no rule, or a rule needs a tensor that the source lacks. The message names the
            tensors.
    """
    by_name = {name: rule for rule in rules for name in (rule.hf if to_te else (rule.te,))}
    names = list(source_names)
    present = set(names)
    decoders = [rule.decoder for name in names if (rule := by_name.get(name)) is not None and rule.decoder is not None]
    prefixes = {decoder.hf if to_te else decoder.te: decoder for decoder in decoders}
    mappings: dict[str, TensorMapping] = {}
    unknown, missing = [], []
    for name in names:
        match = _NAME.fullmatch(name)
        assert match is not None  # the pattern matches every string
        layer = match["layer"]
        generic = match["rest"] if layer is None else LAYER + match["rest"]
        rule = by_name.get(generic)
        if rule is None:
            unknown.append(name)
            continue

        def full(prefix: str, generic_name: str, layer: str | None = layer) -> str:
            return prefix + generic_name.replace("{layer}", str(layer))

        prefix = prefixes.get(match["prefix"], Prefixes(match["prefix"], match["prefix"]))
        te = full(prefix.te, rule.te)
        if te not in mappings:
            hf = tuple(full(prefix.hf, part) for part in rule.hf)
            mappings[te] = TensorMapping(te, hf, rule.row_order)
            missing += [part for part in (hf if to_te else ()) if part not in present]
    if unknown or missing:
        raise ValueError(
            "the checkpoint does not have the tensors of a Llama. "
            + _list("No rule for", unknown)
            + _list("Needed but missing", missing)
        )
    return list(mappings.values())


def map_known_names(names: Iterable[str], *, is_te: bool, rules: Sequence[Rule]) -> dict[str, TensorMapping]:
    """Match the tensors that have a rule, whatever else the checkpoint has or lacks.

    Args:
        names: Tensor names of a checkpoint.
        is_te: Whether the checkpoint has the Transformer Engine layout (otherwise the Hugging Face layout).
        rules: The rules of the architecture.

    Returns:
        The mapping of each tensor, by its name in the checkpoint. Tensors without a rule are left out.
    """
    # One rule for each Hugging Face name, so that a name is known even if its rule's other tensors are missing.
    single = [dataclasses.replace(rule, hf=(part,), row_order=Unchanged()) for rule in rules for part in rule.hf]
    source_rules = rules if is_te else single
    known = [name for name in names if _has_rule(name, source_rules, is_te)]
    mappings = map_names(known, to_te=not is_te, rules=source_rules)
    if is_te:
        return {mapping.te: mapping for mapping in mappings}
    mappings = map_names([mapping.te for mapping in mappings], to_te=False, rules=rules)
    by_name = {name: mapping for mapping in mappings for name in mapping.hf}
    return {name: by_name[name] for name in known}


def _has_rule(name: str, rules: Sequence[Rule], is_te: bool) -> bool:
    if not name or "\n" in name:  # no model has such names, but a broken file may
        return False
    try:
        map_names([name], to_te=not is_te, rules=rules)
    except ValueError:
        return False
    return True


def check_names(made: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse a conversion that does not make exactly the tensors of the target model.

    Args:
        made: Names of the converted tensors.
        wanted: Names of the target model's tensors.

    Raises:
        ValueError: The message names the tensors that are missing or left over.
    """
    made, wanted = set(made), set(wanted)
    if made != wanted:
        raise ValueError(
            "the tensors do not fit the target model. "
            + _list("It has no source for", sorted(wanted - made))
            + _list("It has no place for", sorted(made - wanted))
        )


def convert_tensors(
    mappings: Iterable[TensorMapping], source: Mapping[str, torch.Tensor], sizes: HeadSizes, *, to_te: bool
) -> dict[str, torch.Tensor]:
    """Convert tensors in memory. The result shares no memory with `source`.

    Args:
        mappings: The names in both layouts.
        source: All source tensors, by name.
        sizes: Attention sizes of the model.
        to_te: Whether `source` has the Hugging Face layout (otherwise the Transformer Engine layout).

    Raises:
        ValueError: The shape of a tensor does not fit its rule. The message has the name and the shape.
    """
    import torch

    result = {}
    for mapping in mappings:
        names, made_names = (mapping.hf, (mapping.te,)) if to_te else ((mapping.te,), mapping.hf)
        inputs = [source[name] for name in names]
        try:
            outputs = [mapping.row_order.merge(inputs, sizes)] if to_te else mapping.row_order.split(inputs[0], sizes)
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in zip(names, inputs, strict=True))
            raise ValueError(f"{shapes} cannot become {', '.join(made_names)}: {error}") from error
        for name, output in zip(made_names, outputs, strict=True):
            result[name] = output.clone(memory_format=torch.contiguous_format)
    return result


def _list(title: str, names: Sequence[str], most: int = 8) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title}: {', '.join(names[:most])}{more}. "
