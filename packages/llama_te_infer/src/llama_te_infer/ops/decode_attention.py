"""Attention of one decoding step as an operator, `torch.ops.llama_te.decode_attention`.

Rotation, the append to the cache and attention over it are one kernel on a GPU; on a CPU they are `append_rope` and
PyTorch. The kernel allocates nothing, waits for nothing and reads lengths and pages from the device's memory, so it can
be captured in CUDA graphs.

Shapes: B rows, R rows of a cache, L places of a row, K key/value heads, G query heads per key/value head, D size of a
head, P positions, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch

from . import operators

MAX_ROWS = 256  # as in csrc/decode_attention.h, as the others
MAX_GROUP = 16
MAX_KV_HEADS = 64
HEAD_DIMS = (64, 80, 96, 128)

_DTYPES = (torch.bfloat16, torch.float16)
_TILE = 16  # keys, which a page must hold whole
_VECTOR_BYTES = 16

torch.library.define(
    "llama_te::decode_attention",
    "(Tensor qkv, Tensor cos_sin, Tensor start, Tensor? page_table, float scale, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor(c!) output, Tensor(d!) workspace) -> ()",
)


def decode_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """Append one new token to each row, and attend from it to all of its row.

    The token's query heads and its key are rotated by its position as `append_rope` does it, rounded to their dtype,
    and key and value are written to the cache. Then `output = softmax(scale · query · keysᵀ) · values` over the row's
    tokens, the new one included, summed in float32; on a GPU the weights are rounded to the dtype before they multiply
    the values. What comes out for a row is the same, bit by bit, in whatever batch.

    CPU tensors are checked, with an error, for lengths and pages out of range; so are CUDA tensors with
    LLAMA_TE_CHECK=1. Otherwise the kernel leaves out a row whose token has no place or no position, and does not attend
    in a row with a page that the cache does not have: their outputs are zeros.

    The kernel starts before the one ahead of it on the stream ends, to fetch keys and values meanwhile, and lets the
    next one start at once. So the one ahead may write `qkv`, but `start`, `page_table` and what the caches hold must
    have been written before. They have been, unless every kernel since then was launched to overlap with the one ahead
    of it and let the next one start before it had waited itself: one of them has to wait first, as `embed` and `linear`
    do.

    Args:
        qkv: [B, K, G + 2, D], the fused projection's output: for each key/value head its query heads, its key and its
            value. Rows may be any multiple of 16 bytes apart; what belongs to one row must be contiguous. On a GPU
            `takes_decode_attention` says what is allowed, and B is at most 256 and K at most 64; on a CPU it is what
            `append_rope` takes.
        cos_sin: float32 [P, D]: the cosines of each position's D/2 angles, then their sines.
        start: int32 [at least B], the tokens that each row had before, which is the new token's position and place.
        page_table: int32 [at least B, pages per row] for a paged cache, None for a contiguous one.
        scale: What scores are multiplied by, usually D^-0.5.
        key_cache: [R, L, K, D] with R at least B, or [pages, page size, K, D].
        value_cache: Likewise.
        output: [B, K * G, D], contiguous.
        workspace: int32 [at least `workspace_size(...)`], zeros before its first use, of any shapes. Calls that may run
            at the same time need one each. On a CPU it is not used.

    Raises:
        ValueError: An argument does not fit; nothing has been written then.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.decode_attention(
        qkv, cos_sin, start, page_table, scale, key_cache, value_cache, output, workspace
    )


def takes_decode_attention(dtype: torch.dtype, group: int, head_dim: int, page_size: int | None) -> bool:
    """Whether the GPU's kernel takes G query heads per key/value head of this dtype and size, and pages of that size.

    Args:
        dtype: Of the heads and the caches.
        group: G.
        head_dim: D.
        page_size: Places of a page, None for a contiguous cache.
    """
    whole_tiles = page_size is None or page_size % _TILE == 0
    return dtype in _DTYPES and 1 <= group <= MAX_GROUP and head_dim in HEAD_DIMS and whole_tiles


def workspace_size(rows: int, kv_heads: int, group: int, head_dim: int, capacity: int) -> int:
    """How many int32 numbers `decode_attention` needs as workspace on a GPU.

    Args:
        rows: B, at the most.
        kv_heads: K.
        group: G.
        head_dim: D.
        capacity: Places of a row: L, or pages per row times page size.

    Raises:
        RuntimeError: The compiled extension is missing.
    """
    size: int = operators.extension().decode_attention_workspace(rows, kv_heads, group, head_dim, capacity)
    return size


# --- implementations -------------------------------------------------------------------------------------------------


@torch.library.impl("llama_te::decode_attention", "cuda")
def _decode_attention_cuda(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    capacity = _check(qkv, cos_sin, start, page_table, key_cache, value_cache, output)
    rows = len(qkv)
    _check_for_kernel(qkv, cos_sin, page_table, key_cache, value_cache, output, workspace, capacity)
    if rows == 0:
        return
    arguments = operators.tokens_and_cache(qkv, cos_sin, start, page_table, key_cache, value_cache) | {"rows": rows}
    row_stride = operators.strides_of(qkv)[0] * qkv.itemsize
    if operators.checks_values():
        appended = {"qkv_token_stride": row_stride, "tokens": rows, "width": 1, "query": output.data_ptr()}
        operators.check_on_host(
            operators.extension().append_rope_check,
            arguments | appended,
            page_table,
            cu_new=torch.arange(rows + 1, dtype=torch.int32),
            start=start,
        )
    operators.cuda_function("decode_attention_cuda")(
        **operators.launch_arguments(qkv),
        **arguments,
        qkv_row_stride=row_stride,
        scale=scale,
        output=output.data_ptr(),
        workspace=workspace.data_ptr(),
    )


@torch.library.impl("llama_te::decode_attention", "cpu")
def _decode_attention_cpu(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    _check(qkv, cos_sin, start, page_table, key_cache, value_cache, output)
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    one_token_each = torch.arange(rows + 1, dtype=torch.int32)
    operators.append_rope(qkv, cos_sin, one_token_each, start, page_table, 1, output, key_cache, value_cache)
    query_BKGD = output.view(rows, kv_heads, heads_of_group - 2, head_dim)
    for row, before in enumerate(start[:rows].tolist()):
        if page_table is None:
            key_TKD, value_TKD = key_cache[row], value_cache[row]
        else:
            pages = page_table[row, : before // key_cache.shape[1] + 1]
            key_TKD, value_TKD = key_cache[pages].flatten(0, 1), value_cache[pages].flatten(0, 1)
        key_TKD, value_TKD = key_TKD[: before + 1].float(), value_TKD[: before + 1].float()
        score_KGT = torch.einsum("kgd,tkd->kgt", query_BKGD[row].float(), key_TKD) * scale
        query_BKGD[row] = torch.einsum("kgt,tkd->kgd", score_KGT.softmax(-1), value_TKD)


@torch.library.register_fake("llama_te::decode_attention")
def _fake(*arguments: Any) -> None:
    """Nothing comes back, and what is mutated keeps its shape."""


# --- what the host can check -----------------------------------------------------------------------------------------


def _check(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    start: torch.Tensor,
    page_table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
) -> int:
    """Refuse dtypes, devices and shapes that do not belong together; returns how many places a row has."""
    check = operators.check_tensor
    if qkv.dim() != 4 or qkv.shape[2] < 3:
        raise ValueError(f"qkv has the shape {list(qkv.shape)}; it must be [B, K, G + 2, D] with G of at least 1.")
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError(
            "qkv requires a gradient, which decode_attention does not have: call it under torch.no_grad()."
        )
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    device = qkv.device
    check("cos_sin", cos_sin, torch.float32, device, (None, head_dim), "[P, D]")
    check("start", start, torch.int32, device, (None,), "[at least B]")
    check("key_cache", key_cache, qkv.dtype, device, (None, None, kv_heads, head_dim), "[R, L, K, D]")
    check("value_cache", value_cache, qkv.dtype, device, tuple(key_cache.shape), "that of key_cache")
    heads = kv_heads * (heads_of_group - 2)
    check("output", output, qkv.dtype, device, (rows, heads, head_dim), "[B, K * G, D]")
    if not output.is_contiguous():
        raise ValueError(f"output has the strides {output.stride()}: it must be contiguous.")
    if rows > 0 and not qkv[0].is_contiguous():
        raise ValueError(f"qkv has the strides {qkv.stride()}: all but the first dimension must be contiguous.")
    if page_table is not None:
        check("page_table", page_table, torch.int32, device, (None, None), "[at least B, pages per row]")
    cached_rows, capacity = operators.rows_and_places(key_cache, page_table)
    for name, room in (
        ("start", start.shape[0]),
        ("page_table" if page_table is not None else "key_cache", cached_rows),
    ):
        if room < rows:
            raise ValueError(f"{name} has {room} rows, but qkv has B={rows}.")
    return capacity


def _check_for_kernel(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    page_table: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    workspace: torch.Tensor,
    capacity: int,
) -> None:
    """Refuse what the GPU's kernel does not take."""
    rows, kv_heads, heads_of_group, head_dim = qkv.shape
    group = heads_of_group - 2
    page_size = None if page_table is None else key_cache.shape[1]
    if not takes_decode_attention(qkv.dtype, group, head_dim, page_size):
        pages = "" if page_size is None else f" and pages of {page_size}"
        dtypes = " and ".join(map(operators.name_of, _DTYPES))
        raise ValueError(
            f"qkv is {operators.name_of(qkv.dtype)} with G={group} and D={head_dim}{pages}: on a GPU allowed are "
            f"{dtypes}, G up to {MAX_GROUP}, D of {', '.join(map(str, HEAD_DIMS))} and "
            f"pages of a multiple of {_TILE}. Call append_rope and attend with PyTorch instead."
        )
    for letter, size, most in (("B", rows, MAX_ROWS), ("K", kv_heads, MAX_KV_HEADS)):
        if size > most:
            raise ValueError(f"qkv has {letter}={size}: on a GPU allowed are up to {most}.")
    operators.check_tensor("workspace", workspace, torch.int32, qkv.device, (None,), "[at least workspace_size(...)]")
    needed = workspace_size(rows, kv_heads, group, head_dim, capacity)
    if workspace.shape[0] < needed:
        raise ValueError(
            f"workspace has {workspace.shape[0]} numbers, but {needed} are needed: make one of "
            f"workspace_size({rows}, {kv_heads}, {group}, {head_dim}, {capacity}) zeros."
        )
    tensors = {
        "qkv": qkv,
        "cos_sin": cos_sin,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "output": output,
        "workspace": workspace,
    }
    for name, tensor in tensors.items():
        strides = [stride * tensor.itemsize for stride in operators.strides_of(tensor)[:-1]]
        if tensor.data_ptr() % _VECTOR_BYTES or any(stride % _VECTOR_BYTES for stride in strides):
            raise ValueError(
                f"{name} starts at address {tensor.data_ptr()} and has strides of {strides} bytes: all must be "
                f"multiples of {_VECTOR_BYTES} bytes."
            )
    for name in ("key_cache", "value_cache"):
        stride = tensors[name].stride(1) * qkv.itemsize
        if stride >= 2**31:  # the kernel multiplies with 32 bits
            raise ValueError(f"{name} has a stride of {stride} bytes between places: allowed are less than 2**31.")
    for name in ("output", "workspace", "key_cache", "value_cache"):
        for other, tensor in tensors.items():
            # Keys and values may lie interleaved in one tensor, as long as one does not start on the other.
            interleaved = not key_cache.is_contiguous() and key_cache.data_ptr() != value_cache.data_ptr()
            if name == other or (interleaved and {name, other} == {"key_cache", "value_cache"}):
                continue
            if operators.overlap(tensors[name], tensor):
                raise ValueError(f"{name} and {other} share memory: pass tensors that do not overlap.")
