"""Configuration of a Llama model whose layers have Transformer Engine's parameter layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ..checkpoint_format import AUTO_MAP, FIELDS, MODEL_TYPE, check_values, config_fields, config_text
from ..layers.rope import check_rope_type
from ..precision.plan import check_layer_precision
from .remote_code import write_remote_code

ATTENTION_FORMATS = ("thd", "bshd")
MASK_TYPES = ("padding_causal", "causal")
LAYER_IMPLEMENTATIONS = ("auto", "transformer_engine", "reference")


class NVLlamaConfig(LlamaConfig):
    """`LlamaConfig` with the fields of Transformer Engine (TE) layers.

    Every field of `transformers.LlamaConfig` keeps its name and meaning.

    Args:
        attn_input_format: `"thd"` runs the layers on packed tokens (the model packs and unpacks padded batches),
            `"bshd"` on padded batches.
        self_attn_mask_type: `"padding_causal"`, or `"causal"` to leave padding to the caller. Packed tokens always
            use `"padding_causal"`.
        layer_precision: One entry per layer, `"fp8"`, `"fp4"` or `None` (the weights' own dtype). `None` for the
            whole list leaves it to the model's `fp8_recipe` argument.
        use_quantized_model_init: Keep the weights of "fp8" and "fp4" layers in that format only
            (`te.quantized_model_init`), without a high-precision copy.
        layer_implementation: `"transformer_engine"`, `"reference"` (plain PyTorch, any device) or `"auto"`, which
            takes Transformer Engine where it can run. It describes this process, so checkpoints do not contain it.
        source_model_type: The `model_type` of the Hugging Face architecture to which the model converts back.

    Raises:
        ValueError: A field has a value that Llama on Transformer Engine does not know.
    """

    model_type = MODEL_TYPE
    # A plain Llama's plans name modules that the decoder layers do not have.
    base_model_tp_plan = None
    base_model_pp_plan = None

    attn_input_format: str = FIELDS["attn_input_format"]
    self_attn_mask_type: str = FIELDS["self_attn_mask_type"]
    layer_precision: list[str | None] | None = FIELDS["layer_precision"]
    use_quantized_model_init: bool = FIELDS["use_quantized_model_init"]
    layer_implementation: str = "auto"
    source_model_type: str = FIELDS["source_model_type"]

    def __post_init__(self, **kwargs: Any) -> None:
        check_values(vars(self))  # before one size divides another
        super().__post_init__(**kwargs)
        self.check()
        self.auto_map = dict(AUTO_MAP)

    def check(self) -> None:
        """Refuse values that Llama on Transformer Engine does not know.

        Models call this too, since code may set fields after construction.

        Raises:
            ValueError: A field has a wrong value. The message names the field, its value and the allowed values.
        """
        check_values(vars(self))
        _check_choice("attn_input_format", self.attn_input_format, ATTENTION_FORMATS)
        _check_choice("self_attn_mask_type", self.self_attn_mask_type, MASK_TYPES)
        _check_choice("layer_implementation", self.layer_implementation, LAYER_IMPLEMENTATIONS)
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True is not supported: Transformer Engine layers of a Llama have no biases. "
                    "Use a checkpoint without them."
                )
        if self.hidden_act != "silu":
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported: the layers compute SwiGLU, so it must be 'silu'."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
        check_layer_precision(self.layer_precision, self.num_hidden_layers)
        if isinstance(self.rope_parameters, dict):
            check_rope_type(self.rope_parameters.get("rope_type", "default"))

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json`, of this layout or of a plain Hugging Face Llama.

        Raises:
            ValueError: The configuration is of another architecture.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found not in (cls.model_type, "llama"):
            raise ValueError(
                f"model_type={found!r} in {args[0] if args else 'the configuration'!r}: NVLlamaConfig reads Llama "
                "checkpoints only ('llama' or 'nv_llama')."
            )
        if config_dict:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the content of a `config.json`."""
        loaded = super().from_dict(config_fields(config_dict), **kwargs)
        # transformers sets these keyword arguments after construction.
        (loaded[0] if isinstance(loaded, tuple) else loaded).check()
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        config_dict = super().to_dict()
        config_dict.pop("layer_implementation", None)
        return config_dict

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the file that `from_pretrained` reads, with the guard against plain Llama classes."""
        text = config_text(json.loads(self.to_json_string(use_diff=use_diff)))
        Path(json_file_path).write_text(text, encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and the code file for `trust_remote_code=True`."""
        os.makedirs(save_directory, exist_ok=True)
        write_remote_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: `auto_map` is always saved and names the installed package, so no source is copied."""


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, allowed))}.")
