"""Plans each layer's precision: checks it, makes the contexts of a forward pass, and gives the multiple of tokens.

`NVLlamaConfig.layer_precision` names a precision for each layer, "fp8", "fp4" or `None`. The model takes a Transformer
Engine (TE) recipe, which defines the scaling of a precision's numbers. Importing this module does not import TE.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from ..compat.transformer_engine import transformer_engine
from .recipes import FP8_FORWARD_MULTIPLE, FP8_TOKEN_MULTIPLE, check_recipe, recipe_name, recipe_token_multiple

LayerPrecision = str | None
LAYER_PRECISIONS = ("fp8", "fp4", None)


def check_layer_precision(layer_precision: Sequence[LayerPrecision] | None, num_layers: int) -> None:
    """Refuse a `layer_precision` that does not describe `num_layers` layers.

    Raises:
        ValueError: `layer_precision` is not a list, its length is wrong, or an entry is not "fp8", "fp4" or None.
    """
    if layer_precision is None:
        return
    if not isinstance(layer_precision, (list, tuple)):
        raise ValueError(f"layer_precision={layer_precision!r} is not a list: give one entry for each layer.")
    if len(layer_precision) != num_layers:
        raise ValueError(
            f"layer_precision has {len(layer_precision)} entries, but num_hidden_layers={num_layers}: "
            "give one entry for each layer."
        )
    for layer, entry in enumerate(layer_precision):
        if entry not in LAYER_PRECISIONS:
            raise ValueError(f"layer_precision[{layer}]={entry!r} is not known: use 'fp8', 'fp4' or None.")


class PrecisionPlan:
    """The precision of each layer of one model.

    Args:
        layer_precision: One entry per layer, or `None` for the weights' own dtype everywhere.
        fp8_recipe: TE recipe of the "fp8" layers; `None` takes TE's default for the GPU.
        fp4_recipe: TE recipe of the "fp4" layers.
        num_layers: Number of decoder layers.

    Raises:
        RuntimeError: The recipes and `layer_precision` do not fit together.
    """

    def __init__(
        self,
        layer_precision: Sequence[LayerPrecision] | None,
        fp8_recipe: Any | None,
        fp4_recipe: Any | None,
        num_layers: int,
    ) -> None:
        if layer_precision is None and fp4_recipe is not None:
            other = "fp8_recipe and fp4_recipe are given" if fp8_recipe is not None else "fp4_recipe is given"
            raise RuntimeError(
                f"{other} without layer_precision: say in the configuration which layers are 'fp8' and which 'fp4', "
                f"for example layer_precision=['fp4'] * {num_layers}."
            )
        if layer_precision is None and fp8_recipe is not None:
            warnings.warn(
                "fp8_recipe is given without layer_precision: every layer runs in FP8. "
                f"Set layer_precision=['fp8'] * {num_layers} in the configuration to say so.",
                stacklevel=3,
            )
            layer_precision = ["fp8"] * num_layers
        if layer_precision is not None and "fp4" in layer_precision and fp4_recipe is None:
            layer = list(layer_precision).index("fp4")
            raise RuntimeError(
                f"layer_precision[{layer}]='fp4' needs fp4_recipe: pass a recipe such as "
                "transformer_engine.common.recipe.NVFP4BlockScaling() to the model."
            )
        self.layers = list(layer_precision) if layer_precision is not None else [None] * num_layers
        self._recipes = {"fp8": fp8_recipe, "fp4": fp4_recipe}
        self.explicit = fp8_recipe is not None or fp4_recipe is not None
        self.quantized = any(entry is not None for entry in self.layers)

    def has_delayed_scaling(self) -> bool:
        """Tell whether any layer uses delayed scaling."""
        used = [precision for precision in self._recipes if precision in self.layers]
        recipes = [self._recipes[precision] for precision in used]
        if None in recipes:
            recipes.append(transformer_engine().get_default_recipe())
        return any(recipe_name(recipe) == "DelayedScaling" for recipe in recipes)

    def check(self, capability: tuple[int, int] | None, device_name: str) -> None:
        """Refuse a precision that the layers' device cannot compute in, before any kernel runs.

        Args:
            capability: Compute capability of the GPU; `None` where the layers do not run on Transformer Engine.
            device_name: The name of the device for the message.

        Raises:
            RuntimeError: See `check_recipe`.
        """
        for precision in ("fp8", "fp4"):
            if precision not in self.layers:
                continue
            if capability is not None and self._recipes[precision] is None:
                self._recipes[precision] = transformer_engine().get_default_recipe()
            check_recipe(self._recipes[precision], capability, device_name)

    def token_multiple(self) -> int:
        """Return the multiple that a forward pass's number of tokens must be (1 where nothing is quantized)."""
        if not self.quantized:
            return 1
        used = [recipe for precision, recipe in self._recipes.items() if precision in self.layers]
        return max(recipe_token_multiple(recipe_name(recipe)) for recipe in used)

    def check_tokens(self, tokens: int, grad: bool, ranks: int = 1) -> None:
        """Refuse a number of tokens that quantized products cannot take, or that processes cannot share.

        Args:
            tokens: Tokens in this forward pass, padding included.
            grad: Whether a backward pass may follow.
            ranks: Tensor ranks that share the tokens between the layers.

        Raises:
            ValueError: The number is no such multiple. The message has the number to pad to.
        """
        multiple = self.token_multiple()
        if multiple == FP8_TOKEN_MULTIPLE and not grad:
            multiple = FP8_FORWARD_MULTIPLE
        multiple *= ranks
        if tokens % multiple:
            layers = " ".join(["/".join(sorted({entry for entry in self.layers if entry})), "layers"]).strip()
            split = f" on {ranks} tensor ranks" if ranks > 1 else ""
            raise ValueError(
                f"{tokens} tokens in this forward pass, but {layers}{split} take multiples of {multiple}: pad to "
                f"{-(-tokens // multiple) * multiple} (DataCollatorWithFlattening(pad_to_multiple_of={multiple})). "
                "With attn_input_format='thd', padded batches and generation need no padding."
            )

    def forward_context(self, layer: int) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward pass of layer `layer`."""
        if not self.quantized:
            return contextlib.nullcontext()
        te = transformer_engine()
        precision = self.layers[layer]
        if precision is None:
            return te.autocast(enabled=False)
        return te.autocast(enabled=True, recipe=self._recipes[precision])

    def model_context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context around all layers.

        TE updates the scales of delayed scaling when the outermost context closes. Without this context, TE would
        update them after every layer, and each update would advance every layer's history of maxima.
        """
        if not self.quantized:
            return contextlib.nullcontext()
        te = transformer_engine()
        first = next(entry for entry in self.layers if entry is not None)
        return te.autocast(enabled=True, recipe=self._recipes[first])

    def init_context(self, layer: int, quantized_weights: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which layer `layer` is built.

        Args:
            layer: Index of the layer.
            quantized_weights: `use_quantized_model_init` of the configuration.
        """
        precision = self.layers[layer]
        if not quantized_weights or precision is None:
            return contextlib.nullcontext()
        te = transformer_engine()
        return te.quantized_model_init(enabled=True, recipe=self._recipes[precision])
