"""Transformer Engine's quantization recipes: the GPUs that support them, and the token counts that they accept.

Importing this module imports neither torch nor Transformer Engine.
"""

from __future__ import annotations

from typing import Any

# Lowest compute capability for each recipe, from the checks of TE 2.20: plain FP8 products exist on Ada (8.9), block
# scaling needs Hopper, and the microscaling formats need Blackwell.
LOWEST_CAPABILITY = {
    "DelayedScaling": (8, 9),
    "Float8CurrentScaling": (8, 9),
    "Float8BlockScaling": (9, 0),
    "MXFP8BlockScaling": (10, 0),
    "NVFP4BlockScaling": (10, 0),
}

# The number of tokens must be a multiple of these numbers: 16 for the transposed FP8 products of the backward pass, and
# a whole block for the block formats (`get_align_size_for_quantization` in TE 2.20).
_TOKEN_MULTIPLE = {"MXFP8BlockScaling": 32, "NVFP4BlockScaling": 128}
FP8_TOKEN_MULTIPLE = 16
# The forward product alone takes multiples of 8 (`assert_dim_for_fp8_exec` in TE 2.20).
FP8_FORWARD_MULTIPLE = 8


def recipe_name(recipe: Any) -> str:
    """Return the name of the TE recipe class of `recipe`; for a derived class, the name of TE's base class."""
    if recipe is None:
        return "FP8"
    for cls in type(recipe).__mro__:
        if cls.__name__ in LOWEST_CAPABILITY:
            return cls.__name__
    return type(recipe).__name__


def recipe_token_multiple(name: str) -> int:
    """Return the multiple that the number of tokens must be under this recipe, with a backward pass."""
    return _TOKEN_MULTIPLE.get(name, FP8_TOKEN_MULTIPLE)


def check_recipe(recipe: Any, capability: tuple[int, int] | None, device_name: str) -> None:
    """Refuse a recipe that the device cannot compute with.

    Args:
        recipe: A `transformer_engine.common.recipe.Recipe`; `None` for TE's default recipe.
        capability: Compute capability of the GPU; `None` where the layers do not run on Transformer Engine.
        device_name: The name of the device for the message.

    Raises:
        RuntimeError: The device does not support the recipe. The message names both, and the nearest recipe that works.
    """
    name = recipe_name(recipe)
    if capability is None:
        raise RuntimeError(
            f"{name} needs Transformer Engine layers on an NVIDIA GPU, but the layers here run on {device_name}. "
            "The nearest that works there is no recipe at all: the weights' own dtype (layer_precision=None)."
        )
    needed = LOWEST_CAPABILITY.get(name)
    if needed is None or capability >= needed:
        return
    nearest = "no recipe at all: bfloat16 (layer_precision=None)"
    for candidate in ("Float8BlockScaling", "Float8CurrentScaling"):
        if capability >= LOWEST_CAPABILITY[candidate]:
            nearest = candidate
            break
    raise RuntimeError(
        f"{name} needs compute capability {needed[0]}.{needed[1]} or higher, but {device_name} has "
        f"{capability[0]}.{capability[1]}. The nearest that works there: {nearest}."
    )
