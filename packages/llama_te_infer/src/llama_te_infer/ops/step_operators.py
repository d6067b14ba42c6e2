"""Operators of a decoding step beside attention: embedding, products with what surrounds them, the likeliest token.

On a GPU they are kernels, which overlap with the ones before and after them; on a CPU they are PyTorch. Products take
few rows; for more of them there is what surrounds a product alone. They allocate nothing on a GPU and wait for nothing,
so they can be captured in CUDA graphs.

Shapes: B rows, K input features, N output features, E hidden size, F size of the MLP, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from . import operators

MAX_LINEAR_ROWS = 32  # as in csrc/linear.h
MAX_PRODUCTS = 4  # likewise

_WEIGHT_TYPES = {torch.bfloat16: 0, torch.float8_e4m3fn: 1}  # likewise
_VECTOR_BYTES = 16

torch.library.define(
    "llama_te::linear",
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? norm_weight, float epsilon, Tensor? residual, bool swiglu, "
    "Tensor(a!) output, Tensor(b!) partials, Tensor(c!) tickets) -> ()",
)
torch.library.define(
    "llama_te::rms_norm",
    "(Tensor(a!) hidden, Tensor weight, float epsilon, Tensor? addend, Tensor(b!) output) -> ()",
)
torch.library.define("llama_te::swiglu", "(Tensor input, Tensor(a!) output) -> ()")
torch.library.define("llama_te::embed", "(Tensor tokens, Tensor table, Tensor(a!) output) -> ()")
torch.library.define(
    "llama_te::greedy",
    "(Tensor logits, Tensor(a!) tokens, Tensor(b!)? lengths, Tensor(c!) best, Tensor(d!) tickets) -> ()",
)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    output: torch.Tensor,
    workspace: LinearWorkspace,
    *,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
) -> None:
    """Multiply a few rows with a weight, with RMSNorm before and SwiGLU or a residual's addition after it.

    The product is summed in float32 in an order that depends on its shape alone, and rounded where single operations
    would round: before the activation or the addition, and after it. The norm's factor of a row multiplies the product,
    not the row: what is rounded before is the row times the norm's weight.

    The kernel starts to read `weight`, and that alone, before the one ahead of it on the stream ends. So that one may
    write all else, but the weight must have been written before.

    Args:
        input: bfloat16 [B, K], contiguous; on a GPU at most `MAX_LINEAR_ROWS` rows. On a CPU any dtype that the other
            tensors share.
        weight: [N, K], contiguous: bfloat16, or float8_e4m3fn with a `scale`, of numbers alone. On a GPU
            `takes_linear` says what is allowed.
        output: bfloat16 [B, N], with `swiglu` [B, N / 2]; contiguous, and apart from `input`.
        workspace: Memory for parts of sums, of this device.
        scale: float32 [1]: what the values of an FP8 weight are multiplied by.
        norm_weight: bfloat16 [K]: the weight of the RMSNorm before.
        epsilon: Of the RMSNorm.
        residual: bfloat16 [B, N], added to the product; may be `output` itself.
        swiglu: Whether the product's halves are a gate's and an up projection's.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.linear(
        input, weight, scale, norm_weight, epsilon, residual, swiglu, output, workspace.partials, workspace.tickets
    )


class Product(NamedTuple):
    """One of the products of `linear_chain`: what `linear` takes."""

    input: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor
    scale: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    epsilon: float = 0.0
    residual: torch.Tensor | None = None
    swiglu: bool = False


def linear_chain(products: Sequence[Product], workspace: LinearWorkspace) -> None:
    """Do some `linear`s one after the other, on a GPU in one launch: weights stream on from one to the next.

    A product may read what those before it have written, and may write what they alone have read.

    Blocks of a launch wait for each other, so two such launches at once could keep each other from ever ending. On one
    GPU they therefore run one after the other, whatever their streams; who replays them from a CUDA graph does that
    within `one_at_a_time`.

    Args:
        products: Up to `MAX_PRODUCTS`, with as many rows and weights of one dtype.
        workspace: As of `linear`.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    if not 1 <= len(products) <= MAX_PRODUCTS:
        raise ValueError(f"products has {len(products)} entries: allowed are 1 to {MAX_PRODUCTS}. Call it for so many.")
    first = products[0]
    for number, product in enumerate(products):
        if (len(product.input), product.weight.dtype) != (len(first.input), first.weight.dtype):
            raise ValueError(
                f"products[{number}] has {len(product.input)} rows and a weight of "
                f"{operators.name_of(product.weight.dtype)}, products[0] {len(first.input)} and "
                f"{operators.name_of(first.weight.dtype)}: pass products that agree in both."
            )
    if first.input.device.type != "cuda":
        for product in products:
            linear(workspace=workspace, **product._asdict())
    elif torch.cuda.is_current_stream_capturing():
        _launch(products, workspace.partials, workspace.tickets)
    else:
        with one_at_a_time(first.input.device):
            _launch(products, workspace.partials, workspace.tickets)


@contextmanager
def one_at_a_time(device: torch.device) -> Iterator[None]:
    """Let what is launched within begin after what was launched so before, on whatever stream of this GPU.

    Args:
        device: A GPU.
    """
    stream = torch.cuda.current_stream(device)
    with _turns:
        last = _last_streams.get(stream.device_index)
        if last is not None and last != stream:
            stream.wait_stream(last)
        _last_streams[stream.device_index] = stream
        yield


_turns = threading.Lock()
_last_streams: dict[int, torch.cuda.Stream] = {}


class LinearWorkspace:
    """Memory in which the blocks of `linear` put their sums together; calls that may overlap need one each.

    Args:
        device: Where `linear` runs.
    """

    def __init__(self, device: torch.device) -> None:
        partials = tickets = 0
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            partials = operators.cuda_function("linear_partials")(index)
            tickets = operators.cuda_function("linear_tickets")(index)
        self.partials = torch.empty(partials, dtype=torch.float32, device=device)
        self.tickets = torch.zeros(tickets, dtype=torch.int32, device=device)


def takes_linear(weight: torch.Tensor) -> bool:
    """Whether `linear` has a kernel for this weight."""
    rows, columns = weight.shape
    whole_boxes = columns * weight.itemsize % 128 == 0 and rows % 16 == 0
    return weight.dtype in _WEIGHT_TYPES and whole_boxes and weight.is_contiguous()


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    output: torch.Tensor,
    *,
    addend: torch.Tensor | None = None,
) -> None:
    """Norm rows, after adding a product to them: `hidden += addend`, then RMSNorm of `hidden`.

    Rounded are the sum and the norm's result, as by `torch.add` and `torch.nn.functional.rms_norm`; what is between is
    float32. What comes out for a row does not depend on the other ones.

    Args:
        hidden: bfloat16 [B, K], contiguous; with an `addend`, gets the sum. On a GPU K is a multiple of 8; on a CPU it
            is of any dtype that the other tensors share.
        weight: bfloat16 [K].
        epsilon: Added to the mean of a row's squares.
        output: bfloat16 [B, K], contiguous; gets the normed rows.
        addend: bfloat16 [B, K], contiguous. The three matrices are apart from each other.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.rms_norm(hidden, weight, epsilon, addend, output)


def swiglu(input: torch.Tensor, output: torch.Tensor) -> None:
    """Multiply SiLU of the gate's half of a product with the up projection's, in float32, and round once.

    Args:
        input: bfloat16 [B, 2 F], contiguous: gate, then up. On a GPU F is a multiple of 8; on a CPU it is of any dtype
            that the output shares.
        output: bfloat16 [B, F], contiguous and apart from `input`.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.swiglu(input, output)


def embed(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    """Look tokens up; one that the table does not have gives zeros.

    Args:
        tokens: int64 [B].
        table: [V, E], contiguous; on a GPU a row is a multiple of 16 bytes.
        output: [B, E], contiguous, of the table's dtype.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.embed(tokens, table, output)


def greedy(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    """Take each row's likeliest token, the lowest of equal ones, and count it. NaN is less likely than all numbers.

    Args:
        logits: [B, V]; on a GPU bfloat16, V and the rows' stride a multiple of 8.
        tokens: int64 [B]; gets the tokens.
        lengths: int32 [B]; 1 is added to those that are not 0: rows that only fill up a batch have no tokens.
        best: int64 [B] of zeros, which are zeros again afterwards. Calls that may run at the same time need one each.
        tickets: int32 [B], likewise.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: CUDA tensors, but the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.greedy(logits, tokens, lengths, best, tickets)


# --- implementations -------------------------------------------------------------------------------------------------


@torch.library.impl("llama_te::linear", "cuda")
def _linear_cuda(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None,
    swiglu: bool,
    output: torch.Tensor,
    partials: torch.Tensor,
    tickets: torch.Tensor,
) -> None:
    product = Product(input, weight, output, scale, norm_weight, epsilon, residual, swiglu)
    _launch([product], partials, tickets)


@torch.library.impl("llama_te::linear", "cpu")
def _linear_cpu(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None,
    swiglu: bool,
    output: torch.Tensor,
    partials: torch.Tensor,
    tickets: torch.Tensor,
) -> None:
    _check_linear(input, weight, scale, norm_weight, residual, swiglu, output)
    input_BK, dtype = input.float(), input.dtype
    factor_B1 = torch.ones(len(input), 1) if scale is None else scale.expand(len(input), 1)
    if norm_weight is not None:
        factor_B1 = factor_B1 * torch.rsqrt(input_BK.square().mean(1, keepdim=True) + epsilon)
        input_BK = (input * norm_weight).float()
    product_BN = (F.linear(input_BK, weight.float()) * factor_B1).to(dtype)
    if swiglu:
        gate_BF, up_BF = product_BN.float().chunk(2, dim=-1)
        output.copy_(F.silu(gate_BF) * up_BF)
    else:
        output.copy_(product_BN if residual is None else product_BN + residual)


@torch.library.impl("llama_te::rms_norm", "cuda")
def _rms_norm_cuda(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, addend: torch.Tensor | None, output: torch.Tensor
) -> None:
    _check_rms_norm(hidden, weight, addend, output)
    _check_bfloat16_vectors("hidden", hidden, "K")
    _check_aligned(hidden=hidden, weight=weight, addend=addend, output=output)
    if hidden.numel() == 0:
        return
    operators.cuda_function("rms_norm_cuda")(
        **operators.launch_arguments(hidden),
        hidden=hidden.data_ptr(),
        addend=_address(addend),
        weight=weight.data_ptr(),
        epsilon=epsilon,
        output=output.data_ptr(),
        rows=len(hidden),
        features=hidden.shape[1],
    )


@torch.library.impl("llama_te::rms_norm", "cpu")
def _rms_norm_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, addend: torch.Tensor | None, output: torch.Tensor
) -> None:
    _check_rms_norm(hidden, weight, addend, output)
    if addend is not None:
        hidden.add_(addend)
    output.copy_(F.rms_norm(hidden, hidden.shape[-1:], weight, epsilon))


@torch.library.impl("llama_te::swiglu", "cuda")
def _swiglu_cuda(input: torch.Tensor, output: torch.Tensor) -> None:
    _check_swiglu(input, output)
    _check_bfloat16_vectors("output", output, "F")
    _check_aligned(input=input, output=output)
    if output.numel() == 0:
        return
    operators.cuda_function("swiglu_cuda")(
        **operators.launch_arguments(input),
        input=input.data_ptr(),
        output=output.data_ptr(),
        rows=len(output),
        features=output.shape[1],
    )


@torch.library.impl("llama_te::swiglu", "cpu")
def _swiglu_cpu(input: torch.Tensor, output: torch.Tensor) -> None:
    _check_swiglu(input, output)
    gate_BF, up_BF = input.chunk(2, dim=-1)
    torch.mul(F.silu(gate_BF.float()), up_BF, out=output)


@torch.library.impl("llama_te::embed", "cuda")
def _embed_cuda(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    _check_embed(tokens, table, output)
    row_bytes = table.shape[1] * table.itemsize
    if row_bytes % _VECTOR_BYTES:
        raise ValueError(f"table has rows of {row_bytes} bytes: on a GPU allowed are multiples of {_VECTOR_BYTES}.")
    _check_aligned(table=table, output=output)
    if len(tokens) == 0 or row_bytes == 0:
        return
    operators.cuda_function("embed_cuda")(
        **operators.launch_arguments(tokens),
        tokens=tokens.data_ptr(),
        table=table.data_ptr(),
        output=output.data_ptr(),
        rows=len(tokens),
        vocabulary=table.shape[0],
        row_bytes=row_bytes,
    )


@torch.library.impl("llama_te::embed", "cpu")
def _embed_cpu(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    _check_embed(tokens, table, output)
    known_B = (tokens >= 0) & (tokens < len(table))
    output.copy_(torch.where(known_B[:, None], table[tokens.where(known_B, 0)], 0))


@torch.library.impl("llama_te::greedy", "cuda")
def _greedy_cuda(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    _check_greedy(logits, tokens, lengths, best, tickets)
    rows, vocabulary = logits.shape
    stride = operators.strides_of(logits)[0]
    if logits.dtype != torch.bfloat16 or vocabulary % 8 or stride % 8:
        raise ValueError(
            f"logits is {operators.name_of(logits.dtype)} {list(logits.shape)} with the strides {logits.stride()}: on "
            "a GPU allowed are bfloat16, and V and the rows' stride multiples of 8."
        )
    _check_aligned(logits=logits)
    if rows == 0:
        return
    operators.cuda_function("greedy_cuda")(
        **operators.launch_arguments(logits),
        logits=logits.data_ptr(),
        row_stride=stride * logits.itemsize,
        rows=rows,
        vocabulary=vocabulary,
        tokens=tokens.data_ptr(),
        lengths=_address(lengths),
        best=best.data_ptr(),
        tickets=tickets.data_ptr(),
    )


@torch.library.impl("llama_te::greedy", "cpu")
def _greedy_cpu(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    _check_greedy(logits, tokens, lengths, best, tickets)
    # PyTorch's argmax takes NaN, which is equal to nothing, for the greatest.
    likeliest_B1 = logits.masked_fill(logits.isnan(), -torch.inf).amax(1, keepdim=True)
    tokens.copy_((logits == likeliest_B1).byte().argmax(1))
    if lengths is not None:
        lengths.add_(lengths > 0)


@torch.library.register_fake("llama_te::linear")
@torch.library.register_fake("llama_te::rms_norm")
@torch.library.register_fake("llama_te::swiglu")
@torch.library.register_fake("llama_te::embed")
@torch.library.register_fake("llama_te::greedy")
def _fake(*arguments: Any) -> None:
    """Nothing comes back, and what is mutated keeps its shape."""


def _launch(products: Sequence[Product], partials: torch.Tensor, tickets: torch.Tensor) -> None:
    for product in products:
        _check_cuda_linear(product)
    input = products[0].input
    for name, tensor in (("partials", partials), ("tickets", tickets)):
        if tensor.device != input.device:
            raise ValueError(f"workspace.{name} is on {tensor.device}: make a LinearWorkspace({input.device}).")
    if len(input) == 0:
        return
    extension: Any = operators.extension()
    operators.cuda_function("linear_cuda")(
        **operators.launch_arguments(input),
        products=[
            extension.Product(
                input=product.input.data_ptr(),
                weight=product.weight.data_ptr(),
                weight_type=_WEIGHT_TYPES[product.weight.dtype],
                scale=_address(product.scale),
                norm_weight=_address(product.norm_weight),
                epsilon=product.epsilon,
                residual=_address(product.residual),
                swiglu=product.swiglu,
                output=product.output.data_ptr(),
                partials=partials.data_ptr(),
                tickets=tickets.data_ptr(),
                rows=len(product.input),
                in_features=product.input.shape[1],
                out_features=len(product.weight),
            )
            for product in products
        ],
    )


# --- what the host can check -----------------------------------------------------------------------------------------


def _check_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    swiglu: bool,
    output: torch.Tensor,
) -> None:
    check, dtype, device = operators.check_tensor, input.dtype, input.device
    check("input", input, dtype, device, (None, None), "[B, K]")
    rows, in_features = input.shape
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    if not is_fp8 and weight.dtype != dtype:
        raise ValueError(
            f"weight is {operators.name_of(weight.dtype)}; it must be {operators.name_of(dtype)}, as input is, or "
            "float8_e4m3fn with a scale."
        )
    if is_fp8 and scale is None:
        raise ValueError("weight is float8_e4m3fn and scale None: pass what the weight's values are multiplied by.")
    if scale is not None and not is_fp8:
        raise ValueError(f"weight is {operators.name_of(weight.dtype)}: scale belongs to float8_e4m3fn, pass None.")
    check("weight", weight, weight.dtype, device, (None, in_features), "[N, K]")
    out_features = weight.shape[0]
    if swiglu and out_features % 2:
        raise ValueError(f"weight has N={out_features} rows: with swiglu a half of them is the gate's, so pass even N.")
    if swiglu and residual is not None:
        raise ValueError("residual is given with swiglu=True: add it to the product behind the activation instead.")
    shape, meaning = ((rows, out_features // 2), "[B, N / 2]") if swiglu else ((rows, out_features), "[B, N]")
    check("output", output, dtype, device, shape, meaning)
    if scale is not None:
        check("scale", scale, torch.float32, device, (1,), "[1]")
    if norm_weight is not None:
        check("norm_weight", norm_weight, dtype, device, (in_features,), "[K]")
    if residual is not None:
        check("residual", residual, dtype, device, shape, meaning)
    _check_contiguous(input=input, weight=weight, residual=residual, output=output)
    for name, tensor in (("input", input), ("residual", residual)):
        is_output = name == "residual" and tensor is not None and tensor.data_ptr() == output.data_ptr()
        if tensor is not None and not is_output and operators.overlap(tensor, output):
            allowed = "output itself or apart from it" if name == "residual" else "apart from it"
            raise ValueError(f"{name} and output share memory: {name} must be {allowed}.")


def _check_cuda_linear(product: Product) -> None:
    input, weight, output, scale, norm_weight, _, residual, swiglu = product
    _check_linear(input, weight, scale, norm_weight, residual, swiglu, output)
    if input.dtype != torch.bfloat16:
        raise ValueError(f"input is {operators.name_of(input.dtype)}: on a GPU it must be bfloat16.")
    if len(input) > MAX_LINEAR_ROWS:
        raise ValueError(
            f"input has B={len(input)} rows: on a GPU allowed are up to {MAX_LINEAR_ROWS}. Call it for so many at a "
            "time."
        )
    if not takes_linear(weight):
        raise ValueError(
            f"weight is {operators.name_of(weight.dtype)} {list(weight.shape)}: on a GPU allowed are bfloat16 and "
            "float8_e4m3fn, rows of a multiple of 128 bytes and N a multiple of 16. Use torch.nn.functional.linear."
        )
    _check_aligned(input=input, weight=weight, norm_weight=norm_weight, residual=residual, output=output)


def _check_rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None, output: torch.Tensor
) -> None:
    check, dtype, device = operators.check_tensor, hidden.dtype, hidden.device
    check("hidden", hidden, dtype, device, (None, None), "[B, K]")
    rows, features = hidden.shape
    check("weight", weight, dtype, device, (features,), "[K]")
    check("output", output, dtype, device, (rows, features), "[B, K]")
    matrices = {"hidden": hidden, "output": output}
    if addend is not None:
        check("addend", addend, dtype, device, (rows, features), "[B, K]")
        matrices["addend"] = addend
    _check_contiguous(**matrices)
    for (one, first), (other, second) in combinations(matrices.items(), 2):
        if operators.overlap(first, second):
            raise ValueError(f"{one} and {other} share memory: they must be apart from each other.")


def _check_swiglu(input: torch.Tensor, output: torch.Tensor) -> None:
    check, dtype, device = operators.check_tensor, input.dtype, input.device
    check("input", input, dtype, device, (None, None), "[B, 2 F]")
    rows, features = input.shape
    if features % 2:
        raise ValueError(f"input has {features} columns: a half of them is the gate's, so pass an even number.")
    check("output", output, dtype, device, (rows, features // 2), "[B, F]")
    _check_contiguous(input=input, output=output)
    if operators.overlap(input, output):
        raise ValueError("input and output share memory: they must be apart from each other.")


def _check_bfloat16_vectors(name: str, tensor: torch.Tensor, dimension: str) -> None:
    """What the kernels of `rms_norm` and `swiglu` take."""
    if tensor.dtype != torch.bfloat16 or tensor.shape[1] % 8:
        raise ValueError(
            f"{name} is {operators.name_of(tensor.dtype)} {list(tensor.shape)}: on a GPU allowed are bfloat16 and "
            f"{dimension} a multiple of 8."
        )


def _check_embed(tokens: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> None:
    check = operators.check_tensor
    check("tokens", tokens, torch.int64, table.device, (None,), "[B]")
    check("table", table, table.dtype, table.device, (None, None), "[V, E]")
    check("output", output, table.dtype, table.device, (len(tokens), table.shape[1]), "[B, E]")
    _check_contiguous(table=table, output=output)


def _check_greedy(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None, best: torch.Tensor, tickets: torch.Tensor
) -> None:
    check, device = operators.check_tensor, logits.device
    check("logits", logits, logits.dtype, device, (None, None), "[B, V]")
    rows, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError(f"logits has the shape {list(logits.shape)}: there must be a token to take.")
    check("tokens", tokens, torch.int64, device, (rows,), "[B]")
    if lengths is not None:
        check("lengths", lengths, torch.int32, device, (rows,), "[B]")
    check("best", best, torch.int64, device, (rows,), "[B]")
    check("tickets", tickets, torch.int32, device, (rows,), "[B]")


def _check_contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has the strides {tensor.stride()}: it must be contiguous.")


def _check_aligned(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % _VECTOR_BYTES:
            raise ValueError(
                f"{name} starts at address {tensor.data_ptr()}: on a GPU it must be a multiple of {_VECTOR_BYTES}. "
                "Pass a copy, or a tensor whose storage_offset is such a multiple."
            )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
