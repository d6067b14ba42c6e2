"""The conversion rules of each architecture: which Hugging Face tensors make which Transformer Engine tensor.

Both directions use the same rules, so a conversion and its reverse cannot disagree. `{layer}` stands for a layer's
number. Names are relative to the decoder; `model.` or `transformer.` may precede them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from .row_order import InterleavedQKV, RowOrder, Stacked, Unchanged

LAYER = "layers.{layer}."
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Prefixes(NamedTuple):
    """The prefix of the decoder's names in each layout."""

    te: str
    hf: str


@dataclass(frozen=True)
class Rule:
    """A Transformer Engine tensor and the Hugging Face tensors that make it.

    Attributes:
        te: Name of the Transformer Engine tensor.
        hf: Names of the Hugging Face tensors, in the order that `row_order` counts them.
        row_order: How the rows of the Hugging Face tensors line up.
        decoder: Prefixes of the decoder, where they differ between the layouts. Only the tensors of a task head have
            them, since only some heads have models with two prefixes.
    """

    te: str
    hf: tuple[str, ...]
    row_order: RowOrder
    decoder: Prefixes | None = None


LLAMA: tuple[Rule, ...] = (
    Rule("embed_tokens.weight", ("embed_tokens.weight",), Unchanged()),
    Rule(
        LAYER + "self_attention.layernorm_qkv.layer_norm_weight",
        (LAYER + "input_layernorm.weight",),
        Unchanged(),
    ),
    Rule(
        LAYER + "self_attention.layernorm_qkv.weight",
        tuple(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        InterleavedQKV(),
    ),
    Rule(LAYER + "self_attention.proj.weight", (LAYER + "self_attn.o_proj.weight",), Unchanged()),
    Rule(LAYER + "layernorm_mlp.layer_norm_weight", (LAYER + "post_attention_layernorm.weight",), Unchanged()),
    Rule(
        LAYER + "layernorm_mlp.fc1_weight",
        (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        Stacked(2),
    ),
    Rule(LAYER + "layernorm_mlp.fc2_weight", (LAYER + "mlp.down_proj.weight",), Unchanged()),
    Rule("norm.weight", ("norm.weight",), Unchanged()),
    *(
        Rule(name, (name,), Unchanged())
        for name in ("lm_head.weight", "score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias")
    ),
)
# The tensors of a Llama. In question answering, transformers calls only a Llama's decoder `transformer`.
MISTRAL: tuple[Rule, ...] = tuple(
    dataclasses.replace(rule, decoder=Prefixes(te="transformer.", hf="model.")) if "qa_outputs" in rule.te else rule
    for rule in LLAMA
)


def is_computed(name: str) -> bool:
    """Whether a tensor is a buffer of an old checkpoint that transformers now computes from the configuration."""
    return name.endswith("rotary_emb.inv_freq")
