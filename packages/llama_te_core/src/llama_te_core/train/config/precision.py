"""The section `precision` of a configuration."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...compat.transformer_engine import make_recipe
from ...precision.recipes import recipe_token_multiple
from .bounds import at_least

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PrecisionConfig:
    """The number formats of products, weights and gradients.

    Attributes:
        compute: The format that layers compute in. fp8, mxfp8 and nvfp4 are for the layers' matrix products, and need
            Transformer Engine; everything outside of the layers computes in bf16 then.
        fp8_recipe: The scales of fp8 tensors: from earlier steps' maxima (delayed), from their own maximum (current),
            or in blocks (block).
        weights: Dtype of the weights, and of AdamW's two states for each. fp32 weights are cast for computing.
        reduce: Dtype in which processes sum gradients.
        bf16_first_layers: The number of first layers that always compute in bf16.
        bf16_last_layers: The number of last layers that always compute in bf16.
        quantized_weights: Keep the weights of fp8 layers in FP8, in which FSDP gathers them, and in fp32 in the
            optimizer. With current or delayed scaling.
    """

    compute: Literal["bf16", "fp32", "fp8", "mxfp8", "nvfp4"] = "bf16"
    fp8_recipe: Literal["delayed", "current", "block"] = "current"
    weights: Literal["bf16", "fp32"] = "fp32"
    reduce: Literal["bf16", "fp32"] = "fp32"
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    quantized_weights: bool = False

    def __post_init__(self) -> None:
        at_least("precision.bf16_first_layers", self.bf16_first_layers, 0)
        at_least("precision.bf16_last_layers", self.bf16_last_layers, 0)
        if self.compute == "fp32" and self.weights == "bf16":
            raise ValueError(
                "precision.compute='fp32', but precision.weights='bf16': weights with fewer bits than the products "
                "gain nothing. Use weights='fp32', or compute='bf16'."
            )
        if self.quantized_weights and (self.compute != "fp8" or self.fp8_recipe == "block" or self.weights != "fp32"):
            raise ValueError(
                f"precision.quantized_weights=True, but compute={self.compute!r}, fp8_recipe={self.fp8_recipe!r} and "
                f"weights={self.weights!r}: it needs compute='fp8' with one scale for each weight (fp8_recipe "
                "'current' or 'delayed'), and weights='fp32' for the optimizer. Change them, or use "
                "quantized_weights=False."
            )

    @property
    def is_quantized(self) -> bool:
        """Whether layers compute in FP8 or FP4."""
        return self.compute in ("fp8", "mxfp8", "nvfp4")

    @property
    def token_multiple(self) -> int:
        """The divisor of the number of tokens of a forward pass."""
        return 1 if self.recipe is None else recipe_token_multiple(self.recipe)

    @property
    def recipe(self) -> str | None:
        """Transformer Engine's name of the recipe; `None` without quantized layers."""
        if self.compute == "fp8":
            names = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
            return names[self.fp8_recipe]
        return {"mxfp8": "MXFP8BlockScaling", "nvfp4": "NVFP4BlockScaling"}.get(self.compute)

    @property
    def weights_dtype(self) -> "torch.dtype":
        """The dtype of weights and optimizer."""
        return _dtype(self.weights)

    @property
    def reduce_dtype(self) -> "torch.dtype":
        """The dtype in which processes sum gradients."""
        return _dtype(self.reduce)

    @property
    def compute_dtype(self) -> "torch.dtype":
        """The dtype of products that are not quantized."""
        return _dtype("fp32" if self.compute == "fp32" else "bf16")

    def layer_precision(self, num_layers: int) -> list[str | None] | None:
        """Return `NVLlamaConfig.layer_precision` for a number of layers.

        Raises:
            ValueError: The layers in BF16 leave no layer for `compute`.
        """
        if not self.is_quantized:
            return None
        quantized = num_layers - self.bf16_first_layers - self.bf16_last_layers
        if quantized < 1:
            raise ValueError(
                f"precision.bf16_first_layers={self.bf16_first_layers} and bf16_last_layers={self.bf16_last_layers} "
                f"leave none of {num_layers} layers for {self.compute}: lower them, or use compute='bf16'."
            )
        name = "fp4" if self.compute == "nvfp4" else "fp8"
        return [None] * self.bf16_first_layers + [name] * quantized + [None] * self.bf16_last_layers

    def recipes(self) -> dict[str, Any]:
        """Return the models' argument `fp8_recipe` or `fp4_recipe`; none without quantized layers. Imports TE."""
        if self.recipe is None:
            return {}
        argument = "fp4_recipe" if self.compute == "nvfp4" else "fp8_recipe"
        return {argument: make_recipe(self.recipe)}


def _dtype(name: Literal["bf16", "fp32"]) -> "torch.dtype":
    import torch  # here, since it takes a second

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
