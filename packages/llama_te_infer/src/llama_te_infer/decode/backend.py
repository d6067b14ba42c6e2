"""The choice between the two backends of a step, which decodes or reads prompts: the kernels, or the model's layers."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol

import torch

from llama_te_core.compat.torch import forward_hooks

from ..kv_cache.engine_cache import EngineCache
from ..kv_cache.step import CacheStep
from ..ops import library
from ..ops.library import name_of
from ..ops.prefill_attention import prefill_attention_problem
from .fused import FusedDecode, takes_fused_decode
from .inputs import StepInputs
from .prefill import FusedPrefill, takes_fused_prefill
from .weights import LAYER_PARAMETERS, LayerWeights, layer_weights

IMPLEMENTATIONS = ("auto", "fused", "layers")


class DecodeBackend(Protocol):
    """One way to compute a decoding step."""

    def __call__(self, inputs: StepInputs, rows: int) -> torch.Tensor:
        """Store keys and values of the first rows' last tokens; return the logits [rows, V] of the tokens that follow.

        Args:
            inputs: Left as they are; the caller counts the stored tokens with `count_step`.
            rows: B.
        """
        ...

    def advance(self, inputs: StepInputs, rows: int) -> None:
        """Compute a step after which each row takes its likeliest token.

        Args:
            inputs: `token_R` gets the tokens, and 1 is added to the rows' `length_R`, both on the device.
            rows: B.
        """
        ...


def check_implementation(decode_implementation: str) -> None:
    """Refuse an unknown `decode_implementation`.

    Raises:
        ValueError: It is unknown.
    """
    if decode_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"decode_implementation={decode_implementation!r} is not known: use 'auto', 'fused' or 'layers'."
        )


def select_backend(
    model: Any, cache: CacheStep, rows: int, decode_implementation: str = "auto", current: FusedDecode | None = None
) -> tuple[FusedDecode | None, str]:
    """Choose how the next decoding steps are computed.

    Args:
        model: An `NVLlamaForCausalLM`.
        cache: Of this model, with the memory of all layers.
        rows: Most rows of a step.
        decode_implementation: "auto", "fused" or "layers".
        current: An earlier choice; it is returned again if it still fits.

    Returns:
        The fused step, or `None` for the model's layers, which `generate` and the engine call each in its own way; and
        the reason.

    Raises:
        RuntimeError: decode_implementation="fused", and the kernels cannot compute these steps.
    """
    if decode_implementation == "layers":
        return None, "decode_implementation='layers'"
    if decode_implementation == "auto" and not gains_from_kernels(cache.device):
        return None, "on a CPU the kernels are PyTorch operations, which gain nothing"
    problem, layers = decode_problem(model, cache, rows)
    if problem is None:
        fits = current is not None and current.is_for(model, cache, rows, layers)
        return current if fits else FusedDecode(model, cache, rows, layers), "the kernels compute this model"
    if decode_implementation == "fused":
        raise RuntimeError(
            f"decode_implementation='fused', but {problem}. Use 'auto' or 'layers' to compute steps of one token by "
            "the model's layers."
        )
    _warn_once("Steps of one token are computed", problem)
    return None, problem


def select_prefill(
    model: Any, cache: EngineCache, decode: FusedDecode | None, current: FusedPrefill | None = None
) -> FusedPrefill | None:
    """Choose how the next prompts are read.

    Args:
        model: An `NVLlamaForCausalLM`.
        cache: Of this model, with the memory of all layers.
        decode: The choice of `select_backend`.
        current: An earlier choice; it is returned again if it still fits.

    Returns:
        The kernels, or `None` for the model's layers.
    """
    if decode is None or not takes_fused_prefill(model, decode):
        return None
    if current is not None and current.decode is decode:
        return current
    heads, rows, most = model.config.num_attention_heads, cache.max_batch_size, cache.max_sequence_length
    problem = prefill_attention_problem(*cache.attended_memory, heads, rows, most, decode.scale)
    if problem is None:
        return FusedPrefill(decode)
    _warn_once("Prompts are read", problem)
    return None


def gains_from_kernels(device: torch.device) -> bool:
    """Return whether fused steps are faster than the layers on this device."""
    return device.type == "cuda"


def has_own_forward(model: Any, module: Any) -> bool:
    """Return whether users have replaced the `forward` of a module of the model, or registered hooks on it.

    The layers' own hooks do not count: they only serve the cache.
    """
    is_own_hook = model.layer_backend.is_own_hook
    forward = vars(module).get("forward")
    # Libraries that wrap `forward` put the bound method back: accelerate's `unwrap_model` does.
    is_replaced = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    return is_replaced or any(not is_own_hook(hook) for hook in forward_hooks(module))


def decode_problem(model: Any, cache: CacheStep, rows: int) -> tuple[str | None, list[LayerWeights]]:
    """Find out whether the kernels can compute steps of this model.

    Returns:
        In one line why they cannot, `None` if they can; and the weights of the layers if they can.
    """
    problem = _structure_problem(model, cache, rows)
    if problem is not None:
        return problem, []
    layers = layer_weights(model)
    if not takes_fused_decode(model, rows, cache.page_size, layers):
        pages = "" if cache.page_size is None else f", pages of {cache.page_size} tokens"
        problem = (
            f"there are no kernels for this model ({name_of(cache.dtype)}, heads of {cache.head_dim_k}{pages}"
            "; docs/internals/kernels.md has what they take, python -m llama_te_infer.info what runs here)"
        )
        return problem, []
    return None, layers


def _structure_problem(model: Any, cache: CacheStep, rows: int) -> str | None:
    """Return in one line what the model or the cache has that the kernels do not know; `None` if nothing."""
    decoder = model.model
    for name, module in model.named_modules():
        # The model's own forward pass calls the step. The step replaces every module below it.
        if module is not model and has_own_forward(model, module):
            return f"{name} has hooks or a forward pass of its own"
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"model.layers.{index}.{name}" for index in range(len(decoder.layers)) for name in LAYER_PARAMETERS}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if others := sorted(parameters.keys() ^ names):
        return f"the model has parameters of its own kind, such as {others[0]}"
    dtype = parameters["model.embed_tokens.weight"].dtype
    if cache.dtype != dtype:
        return f"under autocast the layers compute in {name_of(cache.dtype)} from weights in {name_of(dtype)}"
    device = cache.pre_step_seqlens.device
    if elsewhere := [name for name, parameter in parameters.items() if parameter.device != device]:
        return f"{elsewhere[0]} is on {parameters[elsewhere[0]].device} and the cache on {device}"
    if not decoder.rotary_angles.are_fixed(cache.max_sequence_length):
        rope_type = decoder.rotary_angles.rope_type
        return f"with rope_type={rope_type!r} angles change within max_sequence_length={cache.max_sequence_length}"
    if library.available(device.type) and rows > (most := library.limits().max_decode_rows):
        return f"the batch has {rows} rows, and the kernels take {most}"
    return None


@functools.cache
def _warn_once(what: str, problem: str) -> None:
    warnings.warn(f"{what} by the model's layers, since {problem}.", stacklevel=2)
