"""The tensors that a configuration asks for, compared with those of the checkpoint."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..layout.rules import LAYER, Rule, is_computed
from ..sources.checkpoint import Checkpoint
from .model_fields import ModelSizes
from .report_text import fold, fold_names, layer_of, range_text, ranges_text

_HEADS = {
    "ForCausalLM": ("lm_head.weight",),
    "ForSequenceClassification": ("score.weight",),
    "ForTokenClassification": ("score.weight",),
    "ForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
}
_ALL_HEADS = frozenset(("score.bias", *(name for names in _HEADS.values() for name in names)))


def named_architecture(config: Mapping[str, Any]) -> str | None:
    """The first class in a configuration's field `architectures`."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


class Expectation:
    """The tensors that a configuration asks for.

    A broken configuration may ask for absurdly many layers, so only layers that the checkpoint has are enumerated.

    Args:
        checkpoint: An open checkpoint of either layout.
        fields: The fields of its configuration.
        rules: The rules of its architecture.
    """

    def __init__(self, checkpoint: Checkpoint, fields: Mapping[str, Any], rules: Sequence[Rule]) -> None:
        sizes = ModelSizes.of(fields)
        self.infos = {name: info for name, info in checkpoint.source.tensors.items() if not is_computed(name)}
        self.layers = sizes.layers
        self.prefix = _prefix(self.infos)
        self.found = sorted({layer for name in self.infos if (layer := layer_of(name)) is not None})
        hf_shapes = _hf_shapes(sizes, fields)
        self.shapes = _te_shapes(hf_shapes, rules) if checkpoint.is_te else hf_shapes
        generic = [name for rule in rules for name in ((rule.te,) if checkpoint.is_te else rule.hf)]
        self.per_layer = [name for name in generic if name.startswith(LAYER)]
        self.once = [self.prefix + name for name in generic if not name.startswith(LAYER) and name not in _ALL_HEADS]
        architecture = named_architecture(checkpoint.config) or ""
        self.heads = next((names for end, names in _HEADS.items() if architecture.endswith(end)), ())
        if sizes.tied:
            self.heads = tuple(name for name in self.heads if name != "lm_head.weight")

    def problems(self) -> list[str]:
        """One sentence for each group of missing tensors, missing or extra layers, and wrong shapes."""
        return [*self._missing(), *self._layers(), *self._wrong_shapes()]

    def _full(self, generic: str, layer: int | None) -> str:
        return generic if generic in _ALL_HEADS else self.prefix + generic.replace("{layer}", str(layer))

    def _missing(self) -> list[str]:
        needed = [*self.once, *self.heads]
        needed += [self._full(name, layer) for layer in self.found if self._in_range(layer) for name in self.per_layer]
        return [f"{name} is needed, but missing." for name in fold_names(n for n in needed if n not in self.infos)]

    def _in_range(self, layer: int) -> bool:
        return self.layers is None or layer < self.layers

    def _layers(self) -> list[str]:
        if self.layers is None:
            return []
        problems = []
        present = [layer for layer in self.found if self._in_range(layer)]
        edges = [-1, *present, self.layers]
        gaps = [(low + 1, high - 1) for low, high in itertools.pairwise(edges) if high - low > 1]
        if gaps:
            missing = ",".join(range_text(first, last) for first, last in gaps)
            problems.append(f"the configuration has {self.layers} layers, but layers {missing} are missing.")
        beyond = [layer for layer in self.found if not self._in_range(layer)]
        if beyond:
            problems.append(
                f"the checkpoint has layers {ranges_text(beyond)}, but the configuration has {self.layers} layers."
            )
        return problems

    def _wrong_shapes(self) -> list[str]:
        wrong = []
        for generic, shape in self.shapes.items():
            for layer in self.found if generic.startswith(LAYER) else [None]:
                info = self.infos.get(self._full(generic, layer))
                if info is not None and info.shape != shape:
                    wrong.append((self._full(generic, layer), (info.shape, shape)))
        return [
            f"{name} is {list(shape)}, but the configuration asks for {list(wanted)}."
            for name, (shape, wanted) in fold(wrong)
        ]


def _prefix(names: Iterable[str]) -> str:
    """The prefix of the decoder's names."""
    for name in names:
        match = re.match(r"((?:model\.|transformer\.)?)(?:layers\.|embed_tokens\.|norm\.)", name)
        if match is not None:
            return match[1]
    return "model."


def _hf_shapes(sizes: ModelSizes, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that follow from the configuration, by the Hugging Face names of the rules."""
    hidden, mlp, vocabulary, head_dim = sizes.hidden_size, sizes.intermediate_size, sizes.vocabulary, sizes.head_dim
    queries = None if sizes.heads is None or head_dim is None else sizes.heads * head_dim
    keys = None if sizes.key_value_heads is None or head_dim is None else sizes.key_value_heads * head_dim
    names = fields.get("id2label")
    labels = len(names) if isinstance(names, dict) else None
    shapes: dict[str, tuple[int | None, ...]] = {
        "embed_tokens.weight": (vocabulary, hidden),
        LAYER + "input_layernorm.weight": (hidden,),
        LAYER + "self_attn.q_proj.weight": (queries, hidden),
        LAYER + "self_attn.k_proj.weight": (keys, hidden),
        LAYER + "self_attn.v_proj.weight": (keys, hidden),
        LAYER + "self_attn.o_proj.weight": (hidden, queries),
        LAYER + "post_attention_layernorm.weight": (hidden,),
        LAYER + "mlp.gate_proj.weight": (mlp, hidden),
        LAYER + "mlp.up_proj.weight": (mlp, hidden),
        LAYER + "mlp.down_proj.weight": (hidden, mlp),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        "score.weight": (labels, hidden),
        "score.bias": (labels,),
        "qa_outputs.weight": (2, hidden),
        "qa_outputs.bias": (2,),
    }
    known: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        numbers = tuple(number for number in shape if number is not None)
        if len(numbers) == len(shape):
            known[name] = numbers
    return known


def _te_shapes(hf_shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """The shapes by the Transformer Engine names of the rules: the rows of the Hugging Face tensors add up."""
    return {
        rule.te: (sum(hf_shapes[name][0] for name in rule.hf), *hf_shapes[rule.hf[0]][1:])
        for rule in rules
        if all(name in hf_shapes for name in rule.hf)
    }
