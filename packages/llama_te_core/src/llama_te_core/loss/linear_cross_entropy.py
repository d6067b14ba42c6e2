"""Cross entropy behind a language-model head, without the logits of all tokens at once.

Shapes: T tokens, C tokens of a chunk, E hidden size, V vocabulary (this process's shard, if sharded), P processes that
share the vocabulary; M, N and K of any product.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..data.labels import IGNORED_LABEL

# Whether cuBLAS may add a product of 16-bit matrices to a float32 matrix. Older versions of torch refuse it.
_ADDS_TO_FLOAT32 = torch.version.cuda is not None and torch.__version__ >= "2.11"


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = IGNORED_LABEL,
    z_loss: float = 0.0,
    num_items: int | torch.Tensor | None = None,
    chunk_tokens: int = 2048,
    vocabulary_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the mean cross entropy of `hidden @ weight.T` against labels: fuse the head with its loss.

    The forward pass computes logits and their gradients for `chunk_tokens` tokens at a time, so that it multiplies by
    the head once. It rounds logits like `lm_head`, to the dtype that the head computes in: autocast's, or the dtype of
    `hidden` and `weight`. It computes the loss from them in float32 (float64 for float64 logits).

    **Speed.** torch computes the three matrix products. Beside them, two Triton kernels read a chunk's logits twice and
    overwrite them with their gradient. Results are the same bits every time. On other devices, and without Triton
    (which torch's GPU builds include), PyTorch computes the same in more passes.

    **Memory.** In 16 bits a chunk's logits take 2 bytes x chunk_tokens x V while the chunk is computed. The gradient of
    `weight` takes 4 bytes x V x E: it is summed over the chunks in float32, since bfloat16 would round the sum once for
    each chunk. With Llama 3 1B's head, [128256, 2048], these are 0.5 GB and 1.1 GB. From the forward to the backward
    pass, the gradient of `weight` stays, and the gradient of `hidden` in its dtype. The backward pass rounds them one
    after the other, when no other tensor of this function is left. Without the kernels, each logit of a chunk takes 4
    bytes more. Before torch 2.11, a chunk's share of weight's gradient, [V, E] in the head's dtype, comes on top.
    Autocast's copy of the head exists during the forward pass. A tensor that requires no gradient costs nothing, and
    without gradients nothing stays.

    **Sharded vocabulary.** With `vocabulary_group` each process holds some rows of the head, in the order of the
    group's ranks, and calls this with the same hidden and labels. All processes get the same loss. This function sums
    the gradient of `hidden` over the group, so no later code may sum it again. The gradient of `weight` covers the
    process's own rows. All processes must agree on which tensors require gradients.

    Args:
        hidden: Floating point [..., E], the input of the head.
        weight: [V, E] in the same dtype, unless autocast casts both. It must be a plain tensor: pass a `DTensor`'s
            `to_local()`.
        labels: int64 [...]; each token's own label, shifted already (see `next_token_labels`).
        ignore_index: The loss ignores tokens with this label.
        z_loss: Adds this times the mean of logsumexp(logits)², which keeps logits from drifting.
        num_items: Divides the sums instead of the number of labels that count. transformers passes it as
            `num_items_in_batch` where a step has several batches or processes.
        chunk_tokens: Tokens of a chunk.
        vocabulary_group: Processes that share the vocabulary; shards may differ in size.

    Returns:
        The loss, float32 (or float64) []. It can be differentiated once. Where no label counts, it is NaN with
        gradients of zero, or 0 with `num_items`, as in transformers.

    Raises:
        ValueError: Shapes or dtypes do not fit together, an argument is out of its range, or a label is outside the
            vocabulary. For labels on a GPU, a device-side assertion fails instead, since a check here would wait for
            the GPU.
        RuntimeError: In the backward pass: the caller requests a second derivative.
    """
    _check(hidden, weight, labels, z_loss, chunk_tokens)
    labels_T = labels.reshape(-1).to(hidden.device)
    counted_T = labels_T != ignore_index
    total = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        *_targets(labels_T, counted_T, weight.shape[0], vocabulary_group),
        counted_T,
        z_loss,
        chunk_tokens,
        _head_dtype(hidden, weight),
        vocabulary_group,
        torch.is_grad_enabled(),
    )
    if num_items is not None:
        return total / (num_items.to(total.device) if isinstance(num_items, torch.Tensor) else num_items)
    count = counted_T.sum()
    # Do not divide 0 by 0: the gradient would be NaN as well.
    return (total / count.clamp(min=1)).masked_fill(count == 0, math.nan)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses. Autograd divides it later, which keeps gradients in the range of float16."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: torch.Tensor,
        weight_VE: torch.Tensor,
        target_T: torch.Tensor,
        owned_T: torch.Tensor,
        counted_T: torch.Tensor,
        z_loss: float,
        chunk_tokens: int,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        grad_enabled: bool,
    ) -> torch.Tensor:
        hidden_needs_grad, weight_needs_grad = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden_TE.device)
        grad_hidden_TE = hidden_TE.new_empty(hidden_TE.shape) if hidden_needs_grad else None
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=precise) if weight_needs_grad else None
        with torch.autocast(hidden_TE.device.type, enabled=False):
            head_VE = weight_VE.to(dtype)
            for start in range(0, hidden_TE.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                total += _chunk_loss(
                    hidden_TE[chunk].to(dtype),
                    head_VE,
                    target_T[chunk],
                    owned_T[chunk],
                    counted_T[chunk],
                    z_loss,
                    group,
                    None if grad_hidden_TE is None else grad_hidden_TE[chunk],
                    grad_weight_VE,
                )
        if grad_hidden_TE is not None:
            _all_reduce(grad_hidden_TE, dist.ReduceOp.SUM, group)
        ctx.weight_dtype = weight_VE.dtype
        ctx.save_for_backward(grad_hidden_TE, grad_weight_VE)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # torch's `once_differentiable` would allow create_graph=True here, and treat the gradients as constants.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy was differentiated with create_graph=True: it has no second derivative. Take "
                "torch.nn.functional.cross_entropy of the logits for that."
            )
        grad_hidden_TE, grad_weight_VE = ctx.saved_tensors
        if grad_hidden_TE is not None:
            grad_hidden_TE = _scaled(grad_hidden_TE, grad_total, grad_hidden_TE.dtype)
        if grad_weight_VE is not None:
            grad_weight_VE = _scaled(grad_weight_VE, grad_total, ctx.weight_dtype)
        return grad_hidden_TE, grad_weight_VE, *(None,) * 8


def _chunk_loss(
    hidden_CE: torch.Tensor,
    head_VE: torch.Tensor,
    target_C: torch.Tensor,
    owned_C: torch.Tensor,
    counted_C: torch.Tensor,
    z_loss: float,
    group: dist.ProcessGroup | None,
    grad_hidden_CE: torch.Tensor | None,
    grad_weight_VE: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sum of the chunk's losses; write one gradient and add to the other.

    This is a separate function, so that it frees all tensors of a chunk before the next chunk begins.
    """
    statistics, write_gradient = _passes(head_VE.device)
    logits_CV = hidden_CE @ head_VE.T
    own_peak_C, own_sum_C = statistics(logits_CV)
    peak_C = _all_reduce(own_peak_C.clone(), dist.ReduceOp.MAX, group)
    own_target_C = logits_CV.gather(1, target_C[:, None])[:, 0] - peak_C
    own_sums_2C = torch.stack((own_sum_C * (own_peak_C - peak_C).exp(), own_target_C.masked_fill(~owned_C, 0)))
    sum_C, target_logit_C = _all_reduce(own_sums_2C, dist.ReduceOp.SUM, group)
    log_sum_C = sum_C.log()
    logsumexp_C = peak_C + log_sum_C
    loss_C = log_sum_C - target_logit_C + z_loss * logsumexp_C.square()
    if grad_hidden_CE is not None or grad_weight_VE is not None:
        factor_C = ((1 + 2 * z_loss * logsumexp_C) / sum_C).masked_fill(~counted_C, 0)
        write_gradient(logits_CV, peak_C, factor_C, target_C, owned_C)
        grad_CV = logits_CV  # write_gradient has overwritten the logits
        if grad_hidden_CE is not None:
            grad_hidden_CE.copy_(grad_CV @ head_VE)
        if grad_weight_VE is not None:
            _add_product(grad_weight_VE, grad_CV.T, hidden_CE)
    return loss_C.masked_fill(~counted_C, 0).sum()


def _passes(
    device: torch.device,
) -> tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], Callable[..., None]]:
    """Return the two passes over the logits: Triton's on a GPU, else PyTorch's. Tests compare the two."""
    if device.type == "cuda" and _triton_is_installed():
        from . import kernels as cross_entropy_kernels

        return cross_entropy_kernels.statistics, cross_entropy_kernels.write_gradient
    return _statistics, _write_gradient


@functools.cache
def _triton_is_installed() -> bool:
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "linear_cross_entropy runs in plain PyTorch on this GPU, which takes more time and memory, since Triton is "
            "not installed. Install the version of triton that this torch was built with.",
            stacklevel=2,
        )
        return False
    return True


def _statistics(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.statistics`."""
    precise = torch.promote_types(logits_CV.dtype, torch.float32)
    # Clamp to a finite number: -inf minus -inf would be NaN.
    peak_C = logits_CV.amax(1).to(precise).clamp_(min=torch.finfo(precise).min)
    return peak_C, (logits_CV - peak_C[:, None]).exp_().sum(1)


def _write_gradient(
    logits_CV: torch.Tensor,
    peak_C: torch.Tensor,
    factor_C: torch.Tensor,
    target_C: torch.Tensor,
    owned_C: torch.Tensor,
) -> None:
    """See `kernels.write_gradient`."""
    grad_CV = logits_CV.to(peak_C.dtype).sub_(peak_C[:, None]).exp_().mul_(factor_C[:, None])
    # Subtract before rounding, which would turn a probability close to 1 into 1.
    grad_CV.scatter_(1, target_C[:, None], grad_CV.gather(1, target_C[:, None]) - owned_C[:, None].to(grad_CV.dtype))
    logits_CV.copy_(grad_CV)


def _add_product(total_MN: torch.Tensor, left_MK: torch.Tensor, right_KN: torch.Tensor) -> None:
    """Add a product to a sum in the sum's dtype, which may be wider."""
    if total_MN.dtype == right_KN.dtype:
        total_MN.addmm_(left_MK, right_KN)
    elif _ADDS_TO_FLOAT32 and total_MN.device.type == "cuda":
        torch.addmm(total_MN, left_MK, right_KN, out_dtype=total_MN.dtype, out=total_MN)
    else:
        total_MN += left_MK @ right_KN


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # torch rounds a 0-d scale to the gradient's dtype, and float16 training's loss scale is infinite in float16: give
    # the scale a dimension. Write into a tensor of the result's dtype, since the product could take twice the memory.
    return torch.mul(gradient, scale[None], out=torch.empty_like(gradient, dtype=dtype))


def _targets(
    labels_T: torch.Tensor, counted_T: torch.Tensor, rows: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Locate labels in this process's shard: their columns, int64 [T], 0 elsewhere; whether it has them, bool [T]."""
    rows_P = labels_T.new_zeros(dist.get_world_size(group) if group else 1, dtype=torch.int64)
    rank = dist.get_rank(group) if group else 0
    rows_P[rank].fill_(rows)  # an assignment would wait for a GPU
    _all_reduce(rows_P, dist.ReduceOp.SUM, group)
    column_T = labels_T - rows_P[:rank].sum()
    owned_T = counted_T & (column_T >= 0) & (column_T < rows)
    wrong_T = counted_T & ((labels_T < 0) | (labels_T >= rows_P.sum()))
    if labels_T.device.type == "cpu" and bool(wrong_T.any()):
        raise ValueError(
            f"labels contain {int(labels_T[wrong_T][0])}, but the vocabulary has {int(rows_P.sum())} tokens: a label "
            "must be one of them, or ignore_index."
        )
    # On a GPU a column out of range makes the loss's gather fail.
    return column_T.masked_fill(~owned_T, 0).masked_fill(wrong_T, rows), owned_T


def _all_reduce(tensor: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Reduce a tensor in place over the group, and return it."""
    if group is not None:
        dist.all_reduce(tensor, op, group)
    return tensor


def _head_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in."""
    device = hidden.device.type
    # Autocast does not cast float64.
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, but weight is {weight.dtype}: they must be the same. Cast one of them, or use "
            "torch.autocast."
        )
    return weight.dtype


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z_loss: float, chunk_tokens: int) -> None:
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight has shape {list(weight.shape)}: it must be [vocabulary, hidden size], with a row.")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}: its last dimension must be {weight.shape[1]}, as in weight "
            f"{list(weight.shape)}."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels have shape {list(labels.shape)}: they must be {list(hidden.shape[:-1])}, one for each token of "
            f"hidden {list(hidden.shape)}."
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: they must be torch.int64, numbers of tokens.")
    if not z_loss >= 0:
        raise ValueError(f"z_loss={z_loss!r} must be 0 or more; 1e-4 is usual.")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens!r} must be at least 1.")
