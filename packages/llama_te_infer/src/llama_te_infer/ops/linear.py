"""Products of a few rows with a weight: `torch.ops.llama_te.linear`, and chains of them in one launch.

On a GPU a kernel streams the weight from memory, with RMSNorm, SwiGLU and the residual's addition fused. On a CPU
PyTorch computes the same.

Shapes: B rows, K input features, N output features, F features of the activation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .checks import address_of, check_aligned, check_contiguous, check_tensor, name_of, overlap, shape_of
from .library import cuda_function, launch_arguments, limits, register


class LinearWorkspace:
    """Memory for partial sums of the blocks of `linear`. Calls that may run at the same time need separate workspaces.

    Args:
        device: The device of the products.

    Attributes:
        partials: float32, the partial sums of tiles that several blocks share.
        semaphores: int32, zeros before and after each launch.
    """

    def __init__(self, device: torch.device) -> None:
        partials = semaphores = 0
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            partials = cuda_function("linear_partials")(index)
            semaphores = cuda_function("linear_semaphores")(index)
        self.partials = torch.empty(partials, dtype=torch.float32, device=device)
        self.semaphores = torch.zeros(semaphores, dtype=torch.int32, device=device)


class Product(NamedTuple):
    """One product of a `linear_chain`: the arguments of `linear` without the workspace."""

    input: torch.Tensor
    weight: torch.Tensor
    output: torch.Tensor
    scale: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    epsilon: float = 0.0
    residual: torch.Tensor | None = None
    swiglu: bool = False


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

    Sums are in float32, in an order that depends on the product's shape alone. The operator rounds the product once
    before the activation or the addition and once after it, as single operations do. RMSNorm's factor of a row
    multiplies the product instead of the row; the row times the norm's weight is rounded before the product.

    The kernel starts to read `weight`, and nothing else, before the previous kernel on the stream ends. So the previous
    kernel may write every other argument, but only earlier kernels may write the weight.

    Args:
        input: bfloat16 [B, K], contiguous. On a GPU at most `limits().max_linear_rows` rows; on a CPU any dtype that
            the other tensors share.
        weight: [N, K], contiguous: bfloat16, or float8_e4m3fn without NaN and with a `scale`. On a GPU `takes_linear`
            checks dtype and sizes.
        output: bfloat16 [B, N], with `swiglu` [B, N / 2]; contiguous, without overlap with `input`.
        workspace: A workspace on the tensors' device.
        scale: float32 [1], the factor of an FP8 weight's values.
        norm_weight: bfloat16 [K], the weight of the RMSNorm; None for no norm.
        epsilon: The epsilon of the RMSNorm.
        residual: bfloat16 [B, N], an addend of the product; may be `output` itself.
        swiglu: Whether the product's halves are a gate and an up projection.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.linear(
        input, weight, scale, norm_weight, epsilon, residual, swiglu, output, workspace.partials, workspace.semaphores
    )


def linear_chain(products: Sequence[Product], workspace: LinearWorkspace) -> None:
    """Compute products in order. On a GPU this is one launch, which streams the weights without a pause.

    A product may read outputs of earlier products. It may overwrite memory that only earlier products read.

    Blocks of a launch wait for each other, so two launches at the same time could deadlock. On a GPU this function
    therefore runs launches one after the other, on any streams. A caller who replays launches from a CUDA graph must do
    so within `one_at_a_time`.

    Args:
        products: At most `limits().max_linear_products`, with the same number of rows and weights of one dtype.
        workspace: A workspace on the tensors' device.

    Raises:
        ValueError: An argument does not fit.
        RuntimeError: The extension is missing, or the tensors are on a GPU and it was built without CUDA, or the launch
            failed.
    """
    most = limits().max_linear_products
    if not 1 <= len(products) <= most:
        raise ValueError(f"products has {len(products)} entries: allowed are 1 to {most}. Split them over more calls.")
    first = products[0]
    for number, product in enumerate(products):
        if (len(product.input), product.weight.dtype) != (len(first.input), first.weight.dtype):
            raise ValueError(
                f"products[{number}] has {len(product.input)} rows and a weight of {name_of(product.weight.dtype)}, "
                f"products[0] {len(first.input)} and {name_of(first.weight.dtype)}: pass products that agree in both."
            )
    if first.input.device.type != "cuda":
        for product in products:
            linear(workspace=workspace, **product._asdict())
    elif torch.cuda.is_current_stream_capturing():
        _launch(products, workspace.partials, workspace.semaphores)
    else:
        with one_at_a_time(first.input.device):
            _launch(products, workspace.partials, workspace.semaphores)


@contextmanager
def one_at_a_time(device: torch.device) -> Iterator[None]:
    """Serialize launches on a GPU: a launch in this context starts after the launches of earlier contexts end.

    This holds across all streams of the GPU.

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


def takes_linear(weight: torch.Tensor) -> bool:
    """Whether `linear` has a kernel for this weight.

    Raises:
        RuntimeError: The extension is missing.
    """
    most = limits()
    out_features, in_features = weight.shape
    whole_tiles = (
        in_features * weight.itemsize % most.linear_row_bytes_multiple == 0
        and out_features % most.linear_out_features_multiple == 0
    )
    return weight.dtype in most.weight_types and whole_tiles and weight.is_contiguous()


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
    _check(Product(input, weight, output, scale, norm_weight, epsilon, residual, swiglu))
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


register(
    "linear(Tensor input, Tensor weight, Tensor? scale, Tensor? norm_weight, float epsilon, Tensor? residual, "
    "bool swiglu, Tensor(a!) output, Tensor(b!) partials, Tensor(c!) tickets) -> ()",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
)


def _launch(products: Sequence[Product], partials: torch.Tensor, semaphores: torch.Tensor) -> None:
    for product in products:
        _check_for_kernel(product)
    input, weight = products[0].input, products[0].weight
    for name, tensor in (("partials", partials), ("semaphores", semaphores)):
        if tensor.device != input.device:
            raise ValueError(f"workspace.{name} is on {tensor.device}: make a LinearWorkspace({input.device}).")
    if len(input) == 0:
        return
    cuda_function("linear_cuda")(
        **launch_arguments(input),
        rows=len(input),
        weight_type=limits().weight_types[weight.dtype],
        partials=partials.data_ptr(),
        tickets=semaphores.data_ptr(),
        products=[
            (
                product.input.data_ptr(),
                product.weight.data_ptr(),
                product.output.data_ptr(),
                address_of(product.scale),
                address_of(product.norm_weight),
                product.epsilon,
                address_of(product.residual),
                product.swiglu,
                product.input.shape[1],
                product.weight.shape[0],
            )
            for product in products
        ],
    )


def _check(product: Product) -> None:
    """Refuse a product whose dtypes, devices, shapes or memory ranges do not fit each other."""
    input, weight, output, scale, norm_weight, _, residual, swiglu = product
    dtype, device = input.dtype, input.device
    check_tensor("input", input, dtype, device, (None, None), "[B, K]")
    rows, in_features = input.shape
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    if not is_fp8 and weight.dtype != dtype:
        raise ValueError(
            f"weight is {name_of(weight.dtype)}; it must be {name_of(dtype)}, as input is, or float8_e4m3fn with a "
            "scale."
        )
    if is_fp8 and scale is None:
        raise ValueError("weight is float8_e4m3fn and scale None: pass the factor of the weight's values.")
    if scale is not None and not is_fp8:
        raise ValueError(f"weight is {name_of(weight.dtype)}: scale belongs to float8_e4m3fn, pass None.")
    check_tensor("weight", weight, weight.dtype, device, (None, in_features), "[N, K]")
    out_features = weight.shape[0]
    if swiglu and out_features % 2:
        raise ValueError(f"weight has N={out_features} rows: with swiglu half of them are the gate's, so pass even N.")
    if swiglu and residual is not None:
        raise ValueError("residual is given with swiglu=True: add it to the product behind the activation instead.")
    shape, meaning = ((rows, out_features // 2), "[B, N / 2]") if swiglu else ((rows, out_features), "[B, N]")
    check_tensor("output", output, dtype, device, shape, meaning)
    if scale is not None:
        check_tensor("scale", scale, torch.float32, device, (1,), "[1]")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, dtype, device, (in_features,), "[K]")
    if residual is not None:
        check_tensor("residual", residual, dtype, device, shape, meaning)
    check_contiguous(input=input, weight=weight, residual=residual, output=output)
    if overlap(input, output):
        raise ValueError("input and output share memory: input must be apart from it.")
    if residual is not None and residual.data_ptr() != output.data_ptr() and overlap(residual, output):
        raise ValueError("residual and output share memory: residual must be output itself or apart from it.")


def _check_for_kernel(product: Product) -> None:
    """Refuse a product that the GPU's kernel cannot compute."""
    _check(product)
    input, weight, output, _, norm_weight, _, residual, _ = product
    most = limits()
    if input.dtype != torch.bfloat16:
        raise ValueError(f"input is {name_of(input.dtype)}: on a GPU it must be bfloat16.")
    if len(input) > most.max_linear_rows:
        raise ValueError(
            f"input has B={len(input)} rows: on a GPU allowed are up to {most.max_linear_rows}. Split them over more "
            "calls."
        )
    if not takes_linear(weight):
        raise ValueError(
            f"weight is {name_of(weight.dtype)} {shape_of(weight)}: on a GPU allowed are "
            f"{' and '.join(map(name_of, most.weight_types))}, rows of a multiple of "
            f"{most.linear_row_bytes_multiple} bytes and N a multiple of {most.linear_out_features_multiple}. Use "
            "torch.nn.functional.linear."
        )
    check_aligned(input=input, weight=weight, norm_weight=norm_weight, residual=residual, output=output)
