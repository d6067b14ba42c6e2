"""Names of torch that its documentation does not promise. Checked against torch 2.8 to 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree
from torch.utils._device import DeviceContext

# `fully_shard` gives a module a class of this prefix and the name of its own class.
FSDP_CLASS_PREFIX = "FSDP"


def chosen_device() -> torch.device | None:
    """Return the device of `with torch.device(...)` or `torch.set_default_device`; `None` without either.

    `torch.get_default_device` returns the CPU in both cases: for a CPU that someone chose, and for no choice.
    """
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext):
            device: torch.device = mode.device
            return device
    return None


def fp8_product(
    value_BK: torch.Tensor,
    weight_KN: torch.Tensor,
    value_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    output_BN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply float8_e4m3fn matrices. Either each has one scale, or rows and columns have scales.

    Its public name, `torch.nn.functional.scaled_mm`, came with torch 2.10, and takes no output.

    Args:
        value_BK: Rows.
        weight_KN: Columns, contiguous; K and N are multiples of 16.
        value_scale: float32 [1], or [B, 1] of the rows.
        weight_scale: float32 [1], or [1, N] of the columns.
        dtype: Of the result: bfloat16.
        output_BN: Receives the result.
    """
    # Sums as TE's forward passes have them: the tensor cores' own, which are shorter than float32.
    return torch._scaled_mm(
        value_BK,
        weight_KN,
        scale_a=value_scale,
        scale_b=weight_scale,
        out_dtype=dtype,
        use_fast_accum=True,
        out=output_BN,
    )


def placement_of_two_halves() -> Placement:
    """Return the placement of a tensor of two halves by rows: each process holds its share of both halves."""
    return _StridedShard(0, split_factor=2)


def local_range(
    tensor: torch.Tensor, like: DTensor, placements: list[Placement] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the size and the offset of this process's part of a whole tensor, for each dimension.

    Args:
        tensor: Gives the shape of the whole.
        like: Gives the mesh, and the placements where none are given.
        placements: One for each dimension of the mesh.
    """
    size, offset = compute_local_shape_and_global_offset(
        tensor.shape, like.device_mesh, like.placements if placements is None else placements
    )
    return tuple(size), tuple(offset)


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to the leaves of nested dicts and lists, and return the same nest of results."""
    return _pytree.tree_map(function, tree, *others)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    inner: Any = module
    while hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod
    result: nn.Module = inner
    return result


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return all hooks on a module's forward pass, those before it and those after it."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def is_data_parallel_replica(module: nn.Module) -> bool:
    """Return whether `nn.DataParallel` made this copy of a module for one forward pass."""
    return bool(getattr(module, "_is_replica", False))


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Let the device stop with a message if a bool [] is false. Nothing waits for the device."""
    # On a GPU torch copies the message into a buffer of 256 bytes, and refuses a longer one.
    torch._assert_async(condition, message.encode()[:250].decode(errors="ignore"))


def hook_numbers(module: nn.Module) -> tuple[Any, ...]:
    """Return the numbers of all hooks on a module's forward pass. torch gives no number twice."""
    return (*module._forward_hooks, *module._forward_pre_hooks)


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a module itself, without those of its children."""
    tensors: list[torch.Tensor] = [tensor for tensor in module._parameters.values() if tensor is not None]
    if module._buffers:
        tensors += [tensor for tensor in module._buffers.values() if tensor is not None]
    return tensors


def children_of(module: nn.Module) -> list[nn.Module]:
    """Return the children of a module: `Module.children()` without its checks, in a fraction of the time."""
    return [child for child in module._modules.values() if child is not None]


def tensor_state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the identity of a tensor's storage, the address of its data, and its version.

    The version counts the writes that autograd has seen. Tensors of inference mode count none: theirs is -1. A tensor
    that only wraps others has no storage of its own; its identity and address are 0.
    """
    version = -1 if tensor.is_inference() else tensor._version
    try:
        address = tensor.data_ptr()
        # Transformer Engine's quantized tensors make an empty storage for each call.
        return tensor.untyped_storage()._cdata if address else 0, address, version
    except (NotImplementedError, RuntimeError):
        return 0, 0, version


def storage_reference(tensor: torch.Tensor) -> object:
    """Return an object that keeps the identity of a tensor's storage, though not its memory, from being used again."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def after_each_optimizer_step(function: Callable[[Optimizer], None]) -> None:
    """Call a function after each step of any optimizer of the process."""
    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: function(optimizer))


def step_unless(optimizer: torch.optim.Optimizer, failed: torch.Tensor) -> None:
    """Take an optimizer's step, but change neither weights nor its state where a flag on the device is 1.

    torch's fused optimizers read the flag in their kernels, as they do for `torch.amp.GradScaler`. For other optimizers
    the host reads it: on a CPU that costs nothing, and on a GPU it waits for the step's gradients. Transformer Engine's
    FusedAdam needs this on a GPU, since its kernels for quantized weights always update.

    Args:
        optimizer: Its gradients are there.
        failed: float32 [], 0 or 1.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        reads_flag: Any = optimizer
        reads_flag.found_inf = failed
        optimizer.step()
    elif not failed:
        optimizer.step()


def start_memory_recording() -> None:
    """Record each allocation on the GPU from now on."""
    torch.cuda.memory._record_memory_history()


def stop_memory_recording(file: str) -> None:
    """Write the recorded allocations to a file for pytorch.org/memory_viz, and stop recording."""
    torch.cuda.memory._dump_snapshot(file)
    torch.cuda.memory._record_memory_history(enabled=None)
