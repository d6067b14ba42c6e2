"""Steps of decoding for the batch in a cache of `generate`: the engine's kernels, in place of the model's layers.

Shapes: B rows, R rows of the cache, P pages of a row, V vocabulary.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ..kv_cache.managers import PagedKVCacheManager
from ..ops import library
from ..ops.checks import name_of
from .fused import FusedDecode, StepRows, takes_fused_decode, weights_of

if TYPE_CHECKING:
    from ..generate.inference_params import InferenceParams

IMPLEMENTATIONS = ("auto", "fused", "layers")

_LAYER_PARAMETERS = (
    "self_attention.layernorm_qkv.layer_norm_weight",
    "self_attention.layernorm_qkv.weight",
    "self_attention.proj.weight",
    "layernorm_mlp.layer_norm_weight",
    "layernorm_mlp.fc1_weight",
    "layernorm_mlp.fc2_weight",
)


class BatchDecode:
    """Steps of one token for each row. On a GPU each is the launch of a CUDA graph, captured at the first one.

    It is made for one number of rows, reads weights where they lie, and writes to the cache's memory: see `is_for`.

    Args:
        model: An `NVLlamaForCausalLM` in which `decode_problem` finds none.
        cache: Holds a batch, and this object.

    Attributes:
        rows: B.
    """

    # Not in inference mode, whose tensors could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, cache: InferenceParams) -> None:
        manager, length_R = cache.cache_manager, cache.pre_step_seqlens
        self.rows = cache.batch_size
        self._state = StepRows(
            torch.zeros(self.rows, dtype=torch.int64, device=length_R.device),
            length_R,
            manager.page_table if isinstance(manager, PagedKVCacheManager) else None,
        )
        self._addresses = _addresses(model, cache)
        # A reference back to its owner would leave the cache's memory to Python's garbage collector.
        self._step = FusedDecode(model, weakref.proxy(cache), self.rows)

    def is_for(self, model: Any, cache: InferenceParams) -> bool:
        """Whether it would compute this batch, with this model, from where weights, keys and values are now."""
        return self.rows == cache.batch_size and self._addresses == _addresses(model, cache)

    def __call__(self, token_B1: torch.Tensor) -> torch.Tensor:
        """Store the tokens' keys and values; returns logits [B, 1, V]. The cache has begun the step."""
        with torch.cuda.device_of(self._state.token_R):
            self._state.token_R.copy_(token_B1[:, 0])
            return self._step(self._state, self.rows)[:, None].clone()  # the next step writes to the same memory


def choose_decode(current: BatchDecode | None, model: Any, cache: InferenceParams) -> BatchDecode | None:
    """What computes the steps of the batch that a cache holds; `None` for the model's layers.

    Args:
        current: What was chosen for an earlier prompt; it is kept where it is as good.
        model: An `NVLlamaForCausalLM`.
        cache: Whose `decode_implementation` decides.

    Raises:
        RuntimeError: decode_implementation="fused", and the kernels cannot compute these steps.
    """
    wanted = cache.decode_implementation
    # On a CPU the kernels are PyTorch, one operation after the other: nothing is gained.
    if wanted == "layers" or (wanted == "auto" and cache.device.type != "cuda"):
        return None
    problem = decode_problem(model, cache)
    if problem is None:
        return current if current is not None and current.is_for(model, cache) else BatchDecode(model, cache)
    if wanted == "fused":
        raise RuntimeError(
            f"decode_implementation='fused', but {problem}. Use 'auto' or 'layers' to compute steps of one token by "
            "the model's layers."
        )
    _warn_once(problem)
    return None


def decode_problem(model: Any, cache: InferenceParams) -> str | None:
    """Why the kernels cannot compute steps of the batch in a cache: one line, or `None` where they can."""
    decoder = model.model
    for name, module in model.named_modules():
        # The model's own forward pass is what asks; all below it would be left out.
        if module is not model and (_hooks(module) or "forward" in vars(module)):
            return f"{name} has hooks or a forward pass of its own"
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"model.layers.{index}.{name}" for index in range(len(decoder.layers)) for name in _LAYER_PARAMETERS}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if others := sorted(parameters.keys() ^ names):
        return f"the model has parameters of its own kind, such as {others[0]}"
    device = cache.pre_step_seqlens.device
    if elsewhere := [name for name, parameter in parameters.items() if parameter.device != device]:
        return f"{elsewhere[0]} is on {parameters[elsewhere[0]].device} and the cache on {device}"
    if not decoder.rotary_angles.are_fixed(cache.max_sequence_length):
        rope_type = decoder.rotary_angles.rope_type
        return f"with rope_type={rope_type!r} angles change within max_sequence_length={cache.max_sequence_length}"
    if library.available(device.type) and cache.batch_size > (most := library.limits().max_decode_rows):
        return f"the batch has {cache.batch_size} rows, and the kernels take {most}"
    page_size = cache.page_size if cache.is_paged else None
    if not takes_fused_decode(model, cache.batch_size, page_size):
        pages = "" if page_size is None else f", pages of {page_size} tokens"
        return (
            f"there are no kernels for this model ({name_of(cache.dtype)}, heads of {cache.head_dim_k}{pages}"
            "; docs/kernels.md has what they take, python -m llama_te_infer.info what runs here)"
        )
    return None


def _hooks(module: Any) -> list[Any]:
    """What users have registered on a module; the layers' own hooks are about the cache, and so left out here too."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", "") != "llama_te_core.layers.te"]


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"Steps of one token are computed by the model's layers, since {problem}.", stacklevel=2)


def _addresses(model: Any, cache: InferenceParams) -> list[int]:
    """Where all that lies that a step reads and that may be replaced."""
    tensors = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    for layer in model.model.layers:
        for part in weights_of(layer) or ():
            tensors += part if isinstance(part, tuple) else [part]
    tensors += [tensor for pair in cache.cache_manager.cache.values() for tensor in pair]
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]
