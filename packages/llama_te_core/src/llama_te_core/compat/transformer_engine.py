"""Names of Transformer Engine (TE) that its documentation does not promise. Checked against TE 2.20.

Importing this module imports neither torch nor TE.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# The key of the FP32 weight in the state that TE's FusedAdam keeps of a parameter.
MASTER_WEIGHT = "master_param"

# Classes of quantized tensors whose `dequantize` gives a kernel the address of the host's memory, if they are there.
_DEQUANTIZED_ON_A_GPU_ALONE = ("Float8BlockwiseQTensor", "MXFP8Tensor", "NVFP4Tensor")

# Attributes of the tensors that delayed scaling keeps for one direction, "fwd" or "bwd".
_DIRECTIONS = ("fwd", "bwd")
_SCALING_TENSORS = ("scale", "amax_history")
# TE counts three tensors for each product: its input, its weight and its output.
_TENSORS_OF_A_PRODUCT = 3


def transformer_engine() -> Any:
    """Import and return the module `transformer_engine.pytorch`.

    An import statement would not do: transformers refuses code of a hub that has one for a package that is not
    installed.
    """
    return importlib.import_module("transformer_engine.pytorch")


def make_recipe(name: str, **settings: Any) -> Any:
    """Make a quantization recipe of TE by the name of its class, such as "DelayedScaling"."""
    return getattr(importlib.import_module("transformer_engine.common.recipe"), name)(**settings)


def debug_features() -> Path:
    """Return the folder of TE's features for nvdlfw-inspect. TE documents the path in its examples alone."""
    return Path(transformer_engine().__file__).parents[1] / "debug" / "features"


def is_module_of_transformer_engine(module: nn.Module) -> bool:
    """Tell whether TE defines the class of a module, without importing TE."""
    return type(module).__module__.startswith("transformer_engine")


def is_inference_params(value: object) -> bool:
    """Tell whether an object is an `InferenceParams` of TE, or of a class derived from it, without importing TE."""
    return any(
        cls.__name__ == "InferenceParams" and cls.__module__.startswith("transformer_engine")
        for cls in type(value).__mro__
    )


def is_quantized(tensor: torch.Tensor) -> bool:
    """Tell whether TE holds a tensor in a quantized format only. TE is not imported."""
    # A package without its compiled parts imports, but has no tensors.
    return isinstance(tensor, getattr(sys.modules.get("transformer_engine.pytorch"), "QuantizedTensor", ()))


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in an ordinary dtype, on its device; one that TE does not hold quantized stays as it is."""
    if not is_quantized(tensor):
        return tensor
    quantized: Any = tensor
    if tensor.device.type == "cpu" and type(tensor).__name__ in _DEQUANTIZED_ON_A_GPU_ALONE:
        quantized = quantized.to("cuda")
    values: torch.Tensor = quantized.dequantize()
    return values.to(tensor.device)


def fp8_parts(parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the storage of a parameter in FP8 (E4M3) with one scale; `None` for any other format.

    Returns:
        The values, float8_e4m3fn of the parameter's shape, and the float32 [1] that multiplies them; no copies.
    """
    import torch

    if not isinstance(parameter, getattr(sys.modules.get("transformer_engine.pytorch"), "Float8Tensor", ())):
        return None
    storage: Any = parameter
    values, scale = storage._data, storage._scale_inv
    if storage._fp8_dtype.name != "kFloat8E4M3" or values is None or scale is None or scale.numel() != 1:
        return None
    return values.view(torch.float8_e4m3fn), scale.view(1)


def held_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold the values of a quantized tensor in a forward pass.

    TE also makes transposed copies for the backward pass, and leaves them out again. They are not among the result.
    """
    import torch

    return [
        part
        for name, part in vars(tensor).items()
        if isinstance(part, torch.Tensor) and "transpose" not in name and "columnwise" not in name
    ]


def share_scale(parameter: torch.Tensor, group: Any) -> None:
    """Let TE look for the largest value of a quantized tensor over the processes of a group.

    TE sets the same attribute when FSDP gathers such a weight for the first time.
    """
    quantized: Any = parameter
    quantized.amax_reduction_group = group


def set_softmax_scale(layer: nn.Module, softmax_scale: float) -> None:
    """Set the factor on query·key in a `te.TransformerLayer`, which has no argument for it (default: D**-0.5)."""
    attention: Any = layer
    for module in attention.self_attention.core_attention.modules():
        if hasattr(module, "softmax_scale"):
            module.softmax_scale = softmax_scale


def computes_quantized() -> bool:
    """Tell whether a `te.autocast` is active: TE's layers compute quantized products then. TE is not imported."""
    state = getattr(sys.modules.get("transformer_engine.pytorch.quantization"), "FP8GlobalStateManager", None)
    return state is not None and bool(state.is_fp8_enabled())


def paged_attention(
    query_THD: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    cu_new: torch.Tensor,
    cu_all: torch.Tensor,
    page_table: torch.Tensor,
    *,
    most_new: int,
    most_keys: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Compute causal attention of packed queries over paged keys and values by cuDNN, without TE's modules.

    `te.TransformerLayer` computes the same; its modules take a millisecond of the host's time before they call this.
    cuDNN plans once for each power of two of T from 1024 on, and of the rows from 32 on.

    Args:
        query_THD: bfloat16 or float16 [T, heads, D] of packed rows: the rotated queries of each row's last tokens.
        key_pages: [pages, page size, key/value heads, D].
        value_pages: Likewise.
        cu_new: int32 [rows + 1], running sums of the rows' queries.
        cu_all: int32 [rows + 1], running sums of the rows' tokens in the pages, those of the queries included.
        page_table: int32 [rows, pages of a row]. cuDNN plans for a power of two of rows, so there must be as many
            rows of memory; see `planned_rows`.
        most_new: The largest number of queries of a row.
        most_keys: Most tokens of a row. A part of the plan, so it should not change from call to call.
        softmax_scale: The factor on query·key.

    Returns:
        [T, heads, D].

    Raises:
        RuntimeError: TE or cuDNN cannot compute this.
    """
    module = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    output: torch.Tensor = module.fused_attn_fwd(
        is_training=False,
        max_seqlen_q=most_new,
        max_seqlen_kv=most_keys,
        cu_seqlens_q=cu_new,
        cu_seqlens_kv=cu_all,
        q=query_THD,
        k=key_pages,
        v=value_pages,
        fake_dtype=query_THD.dtype,
        fused_attention_backend=module.FusedAttnBackend["F16_arbitrary_seqlen"],
        cu_seqlens_q_padded=cu_new,
        cu_seqlens_kv_padded=cu_all,
        page_table_k=page_table,
        page_table_v=page_table,
        attn_scale=softmax_scale,
        qkv_layout="paged_kv_thd_bshd_bshd",
        o_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        window_size=(-1, 0),
        bottom_right_diagonal=True,
    )[0]
    return output


def planned_rows(rows: int) -> int:
    """Return how many rows cuDNN's plan of `paged_attention` has for a number of rows. TE decides it."""
    return max(32, 1 << (rows - 1).bit_length()) if rows <= 512 else -(-rows // 512) * 512


def quantizes_new_weights() -> bool:
    """Tell whether a `te.quantized_model_init` is active: modules then quantize their weights when they are built."""
    state = importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager
    return bool(state.with_fp8_parameters())


def context_ranks(layer: nn.Module) -> int:
    """Return how many processes share each sequence in a `te.TransformerLayer`.

    `layer.set_context_parallel_group` decides it; without a call there is one.
    """
    attention: Any = layer
    return int(attention.self_attention.cp_size)


def holds_quantized_weights(module: nn.Module) -> bool:
    """Tell whether a module was built under `te.quantized_model_init`."""
    return bool(getattr(module, "primary_weights_in_fp8", False))


def quantize_in_place(module: nn.Module) -> None:
    """Quantize the weights of a module that `holds_quantized_weights`, from the values that they have now.

    TE quantizes a weight when it initialises it. So TE initialises each weight here with the value that is there.
    """
    own: Any = module
    initialisers = {name: meta.init_fn for name, meta in own.param_init_meta.items()}
    for meta in own.param_init_meta.values():
        meta.init_fn = _keep_value
    own.reset_parameters()
    for name, init_fn in initialisers.items():
        own.param_init_meta[name].init_fn = init_fn


def _keep_value(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def delayed_scaling_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copy what delayed scaling keeps in one module to the host.

    TE's own `get_extra_state` has the same values as a pickle, which TE loads only where an environment variable
    allows it.

    Returns:
        "scale_fwd" and "scale_bwd" [N], "amax_history_fwd" and "amax_history_bwd" [steps, N], float32; empty where the
        module does not scale so, or has not computed yet.
    """
    meta = getattr(module, "fp8_meta", {})
    return {
        f"{name}_{direction}": getattr(meta[f"scaling_{direction}"], name).detach().cpu().clone()
        for direction, name in _scaling_tensors()
        if hasattr(meta.get(f"scaling_{direction}"), "amax_history")
    }


def set_delayed_scaling_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Set what `delayed_scaling_state` returned; a module that is none of TE's stays as it is."""
    own: Any = module
    if not hasattr(own, "fp8_meta"):
        return
    recipe = make_recipe("DelayedScaling", amax_history_len=state["amax_history_fwd"].shape[0])
    own.fp8_meta["recipe"] = recipe
    own.fp8_meta["num_gemms"] = state["scale_fwd"].numel() // _TENSORS_OF_A_PRODUCT
    own.init_fp8_meta_tensors(recipe)
    for direction, name in _scaling_tensors():
        getattr(own.fp8_meta[f"scaling_{direction}"], name).copy_(state[f"{name}_{direction}"])


def _scaling_tensors() -> Iterator[tuple[str, str]]:
    return ((direction, name) for direction in _DIRECTIONS for name in _SCALING_TENSORS)


def fused_adam(
    groups: list[dict[str, Any]],
    keeps_master: Callable[[torch.Tensor], bool],
    first_values: Mapping[torch.Tensor, torch.Tensor],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Make TE's FusedAdam with its state in place and FP32 master weights.

    Args:
        groups: Parameter groups.
        keeps_master: Tells whether a parameter needs a master weight.
        first_values: The float32 values of master weights, by parameter; others begin with the parameter's value.
        options: Other arguments of `FusedAdam`.
    """
    optimizer: Any = transformer_engine().optimizers.FusedAdam(groups, **options, master_weights=True)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.initialize_state(parameter, store_param_remainders=False)
        if not keeps_master(parameter):
            del optimizer.state[parameter][MASTER_WEIGHT]
        elif parameter in first_values:
            optimizer.set_scaled_state(parameter, MASTER_WEIGHT, first_values[parameter])
    result: torch.optim.Optimizer = optimizer
    return result
