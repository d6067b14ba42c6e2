"""Which precision each layer computes in, and whether this machine can do that.

This is the one place that knows about FP8 and FP4: the model asks for a context per layer, and does not look inside.
Names of formats and the compute capabilities they need follow Transformer Engine's `transformer_engine.common.recipe`
and `transformer_engine.pytorch.quantization`.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

LayerPrecision = str | None
LAYER_PRECISIONS = ("fp8", "fp4", None)

# Lowest compute capability for each of TE's recipes, from TE 2.20's own checks: plain FP8 products exist on Ada (8.9),
# block scaling needs Hopper, and the microscaling formats Blackwell.
_LOWEST_CAPABILITY = {
    "DelayedScaling": (8, 9),
    "Float8CurrentScaling": (8, 9),
    "Float8BlockScaling": (9, 0),
    "MXFP8BlockScaling": (10, 0),
    "NVFP4BlockScaling": (10, 0),
}

# What the number of tokens must be a multiple of: TE asks 16 for the transposed FP8 products of the backward pass,
# and a whole block of the scaling formats (`get_align_size_for_quantization` in TE 2.20).
_TOKEN_MULTIPLE = {"MXFP8BlockScaling": 32, "NVFP4BlockScaling": 128}
_FP8_TOKEN_MULTIPLE = 16
# The forward product alone takes multiples of 8 (`assert_dim_for_fp8_exec` in TE 2.20).
_FP8_FORWARD_MULTIPLE = 8

# What TE's modules keep of delayed scaling, for the tensors of the forward and of the backward pass.
_SCALING_TENSORS = [(direction, name) for direction in ("fwd", "bwd") for name in ("scale", "amax_history")]


def transformer_engine() -> Any:
    """The module `transformer_engine.pytorch`.

    Not by a statement, since transformers loads no code from a hub that has one for a package that is not installed.
    """
    return importlib.import_module("transformer_engine.pytorch")


def check_layer_precision(layer_precision: Sequence[LayerPrecision] | None, num_layers: int) -> None:
    """Refuse a `layer_precision` that does not describe `num_layers` layers.

    Raises:
        ValueError: It is no list, its length is wrong, or an entry is not "fp8", "fp4" or None.
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


def recipe_name(recipe: Any) -> str:
    """The name of the TE recipe class that `recipe` is an instance of, or derives from."""
    if recipe is None:
        return "FP8"
    for cls in type(recipe).__mro__:
        if cls.__name__ in _LOWEST_CAPABILITY:
            return cls.__name__
    return type(recipe).__name__


def recipe_token_multiple(name: str) -> int:
    """What the number of tokens must be a multiple of with a recipe of this name, with a backward pass."""
    return _TOKEN_MULTIPLE.get(name, _FP8_TOKEN_MULTIPLE)


def check_recipe(recipe: Any, capability: tuple[int, int] | None, device_name: str) -> None:
    """Refuse a recipe that the device has no arithmetic for.

    Args:
        recipe: A `transformer_engine.common.recipe.Recipe`; `None` for TE's default one.
        capability: Compute capability of the GPU; `None` where the layers do not run on Transformer Engine.
        device_name: What to call the device in the message.

    Raises:
        RuntimeError: With the device, the recipe and the nearest recipe that works there.
    """
    name = recipe_name(recipe)
    if capability is None:
        raise RuntimeError(
            f"{name} needs Transformer Engine layers on an NVIDIA GPU, but the layers here run on {device_name}. "
            "The nearest that works there is no recipe at all: the weights' own dtype (layer_precision=None)."
        )
    needed = _LOWEST_CAPABILITY.get(name)
    if needed is None or capability >= needed:
        return
    nearest = "no recipe at all: bfloat16 (layer_precision=None)"
    for candidate in ("Float8BlockScaling", "Float8CurrentScaling"):
        if capability >= _LOWEST_CAPABILITY[candidate]:
            nearest = candidate
            break
    raise RuntimeError(
        f"{name} needs compute capability {needed[0]}.{needed[1]} or higher, but {device_name} has "
        f"{capability[0]}.{capability[1]}. The nearest that works there: {nearest}."
    )


def calibrate(model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """Let layers with delayed scaling learn their scales from examples, for inference.

    Delayed scaling scales activations by the greatest ones of earlier passes. Training remembers them on the way;
    inference only uses them, and a model that was never trained in FP8 has scales of 1. Here every batch runs through
    the model with gradients in view, which is when TE looks at activations. The last ones of the recipe's
    `amax_history_len` count. Weights stay as they are.

    Args:
        model: A model of this package on a GPU.
        batches: Arguments of the model's forward pass, of texts like those to come.

    Raises:
        ValueError: No layer has delayed scaling, or there is no batch.
    """
    plan = next((module.precision for module in model.modules() if hasattr(module, "precision")), None)
    if plan is None or not plan.has_delayed_scaling():
        raise ValueError(
            "no layer of the model has delayed scaling, the only one with scales to learn: set layer_precision and "
            "pass fp8_recipe=DelayedScaling(), or leave calibrate out."
        )
    count = 0
    with torch.enable_grad():
        for batch in batches:
            model(**batch)
            count += 1
    if count == 0:
        raise ValueError("batches is empty: pass one batch at least, better as many as amax_history_len.")


def scaling_state(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """What delayed scaling has seen of a model's tensors, on the host.

    The model leaves it out of its state dict, since released checkpoints need none; a run that goes on does. TE's
    `get_extra_state` has the same as a pickle, which TE does not load unless an environment variable allows it.

    Returns:
        By the names of TE's modules, scales [N] and the largest values of earlier steps [steps, N] of the N tensors of
        the forward and the backward pass, float32. Modules that do not scale so, or have not computed yet, are left
        out.
    """
    states = {}
    for module_name, module in model.named_modules():
        meta = getattr(module, "fp8_meta", {})
        state = {
            f"{name}_{direction}": getattr(meta[f"scaling_{direction}"], name).detach().cpu().clone()
            for direction, name in _SCALING_TENSORS
            if hasattr(meta.get(f"scaling_{direction}"), "amax_history")
        }
        if state:
            states[module_name] = state
    return states


def set_scaling_state(model: torch.nn.Module, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Go on from what `scaling_state` returned.

    Args:
        model: Of the same kind, on its device. Modules that the state says nothing of, or that are not TE's, stay as
            they are: the first steps find their scales.
        states: What was returned.
    """
    module: Any  # of TE's own base class
    for module_name, module in model.named_modules():
        if module_name not in states or not hasattr(module, "fp8_meta"):
            continue
        state = states[module_name]
        recipes = importlib.import_module("transformer_engine.common.recipe")
        recipe = recipes.DelayedScaling(amax_history_len=state["amax_history_fwd"].shape[0])
        module.fp8_meta["recipe"] = recipe
        module.fp8_meta["num_gemms"] = state["scale_fwd"].numel() // 3  # each has an input, a weight and an output
        module.init_fp8_meta_tensors(recipe)
        for direction, name in _SCALING_TENSORS:
            getattr(module.fp8_meta[f"scaling_{direction}"], name).copy_(state[f"{name}_{direction}"])


class PrecisionPlan:
    """The precision of every layer of one model.

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
        """Whether any layer scales by what it saw before."""
        used = [precision for precision in self._recipes if precision in self.layers]
        recipes = [self._recipes[precision] for precision in used]
        if None in recipes:
            recipes.append(transformer_engine().get_default_recipe())
        return any(recipe_name(recipe) == "DelayedScaling" for recipe in recipes)

    def check(self, on_transformer_engine: bool, device: torch.device | None = None) -> None:
        """Refuse, before any kernel runs, what the layers' device cannot compute.

        Args:
            on_transformer_engine: Whether the layers are TE's.
            device: A CUDA device; the current one by default.

        Raises:
            RuntimeError: See `check_recipe`.
        """
        for precision in ("fp8", "fp4"):
            if precision not in self.layers:
                continue
            recipe = self._recipes[precision]
            if not on_transformer_engine:
                check_recipe(recipe, None, "the reference implementation")
                continue
            if recipe is None:
                te = transformer_engine()
                recipe = self._recipes[precision] = te.get_default_recipe()
            index = device if device is not None and device.type == "cuda" else None
            check_recipe(recipe, torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))

    def token_multiple(self) -> int:
        """The number of tokens in a forward pass must be a multiple of this (1 where nothing is quantized)."""
        if not self.quantized:
            return 1
        used = [recipe for precision, recipe in self._recipes.items() if precision in self.layers]
        return max(recipe_token_multiple(recipe_name(recipe)) for recipe in used)

    def check_tokens(self, tokens: int, grad: bool, ranks: int = 1) -> None:
        """Refuse a number of tokens that the quantized products cannot take, or processes cannot share out.

        Args:
            tokens: Tokens in this forward pass, padding included.
            grad: Whether a backward pass may follow.
            ranks: Tensor ranks that share the tokens between the layers.

        Raises:
            ValueError: With the number to pad to.
        """
        multiple = self.token_multiple()
        if multiple == _FP8_TOKEN_MULTIPLE and not grad:
            multiple = _FP8_FORWARD_MULTIPLE
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
        """The context that layer `layer` runs its forward pass in."""
        if not self.quantized:
            return contextlib.nullcontext()
        te = transformer_engine()
        precision = self.layers[layer]
        if precision is None:
            return te.autocast(enabled=False)
        return te.autocast(enabled=True, recipe=self._recipes[precision])

    def model_context(self) -> contextlib.AbstractContextManager[Any]:
        """The context around all layers.

        TE updates the scales of delayed scaling when the outermost context closes. Without this one that would be
        every layer's own, and each layer's history of maxima would move on once for every layer of the model.
        """
        if not self.quantized:
            return contextlib.nullcontext()
        te = transformer_engine()
        first = next(entry for entry in self.layers if entry is not None)
        return te.autocast(enabled=True, recipe=self._recipes[first])

    def init_context(self, layer: int, quantized_weights: bool) -> contextlib.AbstractContextManager[Any]:
        """The context that layer `layer` is constructed in.

        Args:
            layer: Index of the layer.
            quantized_weights: `use_quantized_model_init` of the configuration.
        """
        precision = self.layers[layer]
        if not quantized_weights or precision is None:
            return contextlib.nullcontext()
        te = transformer_engine()
        return te.quantized_model_init(enabled=True, recipe=self._recipes[precision])
