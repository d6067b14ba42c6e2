"""Products of a few rows with a weight: `torch.ops.llama_te.linear`, and chains of them in one launch.

On a GPU a kernel streams the weight from memory, with RMSNorm, SwiGLU and the residual's addition fused. On a CPU
PyTorch computes the same.

Shapes: B rows, K input features, N output features, F features of the activation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .library import cuda_function, extension, limits, register


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
        input: bfloat16 [B, K], contiguous. On a GPU at most `limits().max_linear_rows` rows; on a CPU float16,
            float32 and float64 also work.
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
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The tensors are on a GPU and the extension was built without CUDA, or the launch failed.
    """
    torch.ops.llama_te.linear(
        input, weight, scale, norm_weight, epsilon, residual, swiglu, output, *_tensors_of(workspace)
    )


def _tensors_of(workspace: LinearWorkspace) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(workspace, LinearWorkspace):
        raise TypeError(f"workspace is a {type(workspace).__name__}: it must be a LinearWorkspace.")
    tensors = workspace.partials, workspace.semaphores
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise TypeError("workspace has no tensors: make a new LinearWorkspace.")
    return tensors


def linear_chain(products: list[Product] | tuple[Product, ...], workspace: LinearWorkspace) -> None:
    """Compute products in order. On a GPU this is one launch, which streams the weights without a pause.

    A product may read outputs of earlier products. It may overwrite memory that only earlier products read.

    Blocks of a launch wait for each other, so two launches at the same time could deadlock. On a GPU this function
    therefore runs launches one after the other, on any streams. A caller who replays launches from a CUDA graph must do
    so within `one_at_a_time`.

    Args:
        products: At most `limits().max_linear_products`, with the same number of rows and weights of one dtype.
        workspace: A workspace on the tensors' device.

    Raises:
        TypeError: An argument is no dense tensor or no number.
        ValueError: An argument does not fit.
        RuntimeError: The extension is missing, or the tensors are on a GPU and it was built without CUDA, or the launch
            failed.
    """
    partials, semaphores = _tensors_of(workspace)
    if partials.device.type != "cuda":
        extension().linear_cpu_check(products, partials, semaphores)
        for product in products:
            linear(workspace=workspace, **product._asdict())
    elif torch.cuda.is_current_stream_capturing():
        cuda_function("linear_cuda")(products, partials, semaphores)
    else:
        with one_at_a_time(partials.device):
            cuda_function("linear_cuda")(products, partials, semaphores)


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
    semaphores: torch.Tensor,
) -> None:
    product = Product(input, weight, output, scale, norm_weight, epsilon, residual, swiglu)
    cuda_function("linear_cuda")([product], partials, semaphores)


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
    semaphores: torch.Tensor,
) -> None:
    product = Product(input, weight, output, scale, norm_weight, epsilon, residual, swiglu)
    extension().linear_cpu_check([product], partials, semaphores)
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
    "bool swiglu, Tensor(a!) output, Tensor(b!) partials, Tensor(c!) semaphores) -> ()",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
)
