"""Any value in any position of any operator, and of any function of the extension, ends in a result or in an error.

A child process makes the calls, so a crash is a failed test that names the call.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fuzzing
from infer.decode_attention_oracle import DecodeCase, make_decode
from infer.fp8_cache_oracle import make_fp8_append, make_fp8_pages, make_widen
from infer.operator_oracle import AppendCase, ReorderCase, make_append, make_pages, make_rows
from infer.step_oracle import FP8, LinearCase, make_linear
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.decode_attention import decode_attention, workspace_size
from llama_te_infer.ops.draw import draw
from llama_te_infer.ops.embed import embed
from llama_te_infer.ops.greedy import greedy
from llama_te_infer.ops.linear import LinearWorkspace, Product, linear, linear_chain
from llama_te_infer.ops.logprobs import logprobs
from llama_te_infer.ops.quantize_rows import quantize_rows
from llama_te_infer.ops.reorder import reorder_pages, reorder_rows
from llama_te_infer.ops.rms_norm import rms_norm
from llama_te_infer.ops.swiglu import swiglu
from llama_te_infer.ops.widen_pages import widen_pages

_extension = pytest.importorskip("llama_te_infer._extension", reason="the package is used from its source folder")

Arguments = dict[str, Any]


# --- good arguments --------------------------------------------------------------------------------------------------


def append_arguments(source: random.Random) -> Arguments:
    shared: Arguments = {"new": (2, 0, 1), "before": (3, 0, 15), "padded": source.random() < 0.5, "head_dim": 16}
    page_size = source.choice((0, 16, 16))
    if page_size and source.random() > 0.5:
        return make_fp8_append(AppendCase(page_size=page_size, dtype=torch.bfloat16, **shared))
    return make_append(AppendCase(page_size=page_size, **shared))


def decode_arguments(source: random.Random) -> Arguments:
    page_size = source.choice((0, 16, 16))
    fp8 = page_size > 0 and source.random() < 0.5
    return make_decode(DecodeCase(before=(3, 17), page_size=page_size, dtype=torch.bfloat16, fp8=fp8))


def widen_arguments(source: random.Random) -> Arguments:
    return make_widen()


def rows_arguments(source: random.Random) -> Arguments:
    return make_rows(ReorderCase(source_rows=(1, 2, 0), lengths=(7, 0, 9), wide=source.random() < 0.5))


def pages_arguments(source: random.Random) -> Arguments:
    make = source.choice((make_pages, make_fp8_pages))
    return make(ReorderCase(source_rows=(1, 2, 0), lengths=(17, 20, 18), wide=source.random() < 0.5))


def linear_arguments(source: random.Random) -> Arguments:
    fp8 = source.random() < 0.5
    case = LinearCase(rows=3, in_features=128, out_features=32, norm=True, residual=True, fp8=fp8)
    return make_linear(case) | {"output": torch.ones(3, 32).bfloat16()}


def operator_linear_arguments(source: random.Random) -> Arguments:
    workspace = LinearWorkspace(torch.device("cpu"))
    return linear_arguments(source) | {"partials": workspace.partials, "semaphores": workspace.semaphores}


def wrapped_linear_arguments(source: random.Random) -> Arguments:
    return linear_arguments(source) | {"workspace": LinearWorkspace(torch.device("cpu"))}


def products_arguments(source: random.Random) -> Arguments:
    one = Product(**linear_arguments(random.Random(source.randrange(2))))
    products = [one, one._replace(input=one.input.clone())][: source.randint(1, 2)]
    return {"products": products, "partials": torch.zeros(0), "semaphores": torch.zeros(0).int()}


def chain_arguments(source: random.Random) -> Arguments:
    return {"products": products_arguments(source)["products"], "workspace": LinearWorkspace(torch.device("cpu"))}


def embed_arguments(source: random.Random) -> Arguments:
    return {"tokens": torch.tensor([1, 0, 7]), "table": torch.rand(5, 8), "output": torch.zeros(3, 8)}


def fp8_output() -> Arguments:
    return {"output": torch.zeros(3, 16).to(FP8), "scale": torch.zeros(3), "factor": torch.ones(1)}


NO_SCALES: Arguments = {"scale": None, "factor": None}


def some_output(source: random.Random) -> Arguments:
    return source.choice([{"output": torch.zeros(3, 16).bfloat16()} | NO_SCALES, fp8_output()])


def rms_norm_arguments(source: random.Random) -> Arguments:
    matrices = {name: torch.rand(3, 16).bfloat16() for name in ("hidden", "addend")}
    others = {
        "weight": torch.ones(16).bfloat16(),
        "epsilon": 1e-5,
        "addend_scale": source.choice([None, torch.ones(3)]),
    }
    return matrices | others | some_output(source)


def swiglu_arguments(source: random.Random) -> Arguments:
    scale = source.choice([None, torch.ones(3)])
    return {"input": torch.rand(3, 32).bfloat16(), "input_scale": scale} | some_output(source)


def quantize_rows_arguments(source: random.Random) -> Arguments:
    return {"input": torch.rand(3, 16).bfloat16()} | fp8_output()


def greedy_arguments(source: random.Random) -> Arguments:
    integers = {name: torch.zeros(3, dtype=torch.int64) for name in ("tokens", "best")}
    return integers | {
        "logits": torch.rand(3, 8).bfloat16(),
        "lengths": torch.ones(3).int(),
        "tickets": torch.zeros(3).int(),
    }


def draw_arguments(source: random.Random) -> Arguments:
    return {
        "logits": torch.rand(3, 8).to(source.choice([torch.bfloat16, torch.float16, torch.float32])),
        "numbers": torch.tensor([[1.0, 0.9, 0.1, 1.5, 0.1, 0.2]] * 4),
        "integers": torch.tensor([[7, 4, 5, source.randrange(8)]] * 4),
        "positions": torch.arange(3, dtype=torch.int32),
        "bias": torch.rand(4, 8),
        "seen": torch.rand(4, 8) < 0.5,
        "ending": torch.rand(4, 8) < 0.5,
        "counts": torch.ones(4, 8, dtype=torch.int32),
        "mask_index": torch.tensor([1, -1, 0], dtype=torch.int32),
        "masks": torch.full((2, 1), 0x55, dtype=torch.int32),
        "tokens": torch.zeros(3, dtype=torch.int64),
    }


def logprobs_arguments(source: random.Random) -> Arguments:
    return {
        "logits": torch.rand(3, 8).to(source.choice([torch.bfloat16, torch.float16, torch.float32])),
        "tokens": torch.tensor([0, 7, -1]),
        "logprobs": torch.zeros(3),
        "top_logprobs": torch.zeros(3, 5),
        "top_tokens": torch.zeros(3, 5, dtype=torch.int64),
    }


def workspace_arguments(source: random.Random) -> Arguments:
    return {"rows": 2, "kv_heads": 2, "group": 4, "head_dim": 64, "capacity": 4096}


Make = Callable[[random.Random], Arguments]

OPERATORS: dict[str, Make] = {
    "append_rope": append_arguments,
    "decode_attention": decode_arguments,
    "draw": draw_arguments,
    "embed": embed_arguments,
    "greedy": greedy_arguments,
    "linear": operator_linear_arguments,
    "logprobs": logprobs_arguments,
    "quantize_rows": quantize_rows_arguments,
    "reorder_pages": pages_arguments,
    "reorder_rows": rows_arguments,
    "rms_norm": rms_norm_arguments,
    "swiglu": swiglu_arguments,
    "widen_pages": widen_arguments,
}
PUBLIC: dict[Callable[..., Any], Make] = {
    append_rope: append_arguments,
    decode_attention: decode_arguments,
    draw: draw_arguments,
    embed: embed_arguments,
    greedy: greedy_arguments,
    linear: wrapped_linear_arguments,
    logprobs: logprobs_arguments,
    linear_chain: chain_arguments,
    quantize_rows: quantize_rows_arguments,
    reorder_pages: pages_arguments,
    reorder_rows: rows_arguments,
    rms_norm: rms_norm_arguments,
    swiglu: swiglu_arguments,
    widen_pages: widen_arguments,
    workspace_size: workspace_arguments,
}
PARTS = ("cpu", "append_cpu", "cpu_check", "check", "cuda")


class Target(NamedTuple):
    """A function, and how to make good arguments for it."""

    name: str
    function: Callable[..., Any]
    make: Make


def targets() -> list[Target]:
    """Every function of the extension, every operator as torch has it, and every public function of `ops`.

    Raises:
        KeyError: The extension has a function that this test does not know.
    """
    made = {f"{name}_{part}": make for name, make in OPERATORS.items() for part in PARTS}
    made |= {f"linear_{part}": products_arguments for part in PARTS}
    made["decode_attention_workspace"] = workspace_arguments
    made |= dict.fromkeys(("linear_partials", "linear_semaphores"), lambda source: {"device": 0})
    made |= dict.fromkeys(("build_info", "cuda_problem", "limits"), lambda source: {})
    names = [name for name in dir(_extension) if callable(getattr(_extension, name)) and not name.startswith("__")]
    found = [Target(f"_extension.{name}", getattr(_extension, name), made[name]) for name in names]
    found += [Target(f"torch.ops.{name}", getattr(torch.ops.llama_te, name), make) for name, make in OPERATORS.items()]
    return found + [Target(f"ops.{function.__name__}", function, make) for function, make in PUBLIC.items()]


# --- bad values ------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class Liar:
    """It looks like a tensor."""

    dtype, device, shape, layout = torch.float32, torch.device("cpu"), torch.Size([4]), torch.strided

    def data_ptr(self) -> int:
        return 64

    def __len__(self) -> int:
        raise OverflowError


VALUES: list[Any] = [
    None, True, False, "text", b"bytes", "\ud800", 0, 1, -1, 7, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63,
    -(2**63), 10**4000, -(10**4000), 1.5, float("nan"), float("inf"), -0.0, 1e300, 1j, (), [], {}, [None], [[]],
    object, Liar(), range(9), torch.float32, torch.device("meta"), torch.Size([2]), print,
]  # fmt: skip
EXTREMES = (-(2**31), -1, 0, 1, 2, 3, 16, 17, 1000, 2**31 - 1)


def freed(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    copy = tensor.clone()
    storage = copy.untyped_storage()
    storage.resize_(source.choice((0, 1, max(0, storage.nbytes() - 1), storage.nbytes() // 2)))
    return copy


def overlapping(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    strides = [source.choice((0, 1, stride, max(0, stride - 4))) for stride in tensor.stride()]
    return tensor.clone().as_strided(tensor.shape, strides)


def expanded(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    dim = source.randrange(max(1, tensor.dim()))
    one = tensor.reshape(-1)[:1].reshape([1] * max(1, tensor.dim()))
    size = source.choice((2, 3, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**62))
    shape = [size if i == dim else length for i, length in enumerate(tensor.shape or (1,))]
    total = 1
    for length in shape:
        total *= length
    return one.expand(shape) if total < 2**63 else one.expand([size] + [1] * (one.dim() - 1))


def resized(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    shape = [max(0, size + source.choice((-size, -1, 0, 0, 1, 5))) for size in tensor.shape]
    return torch.zeros(shape).to(tensor.dtype)


def misaligned(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    flat = torch.zeros(tensor.numel() + 16).to(tensor.dtype)
    first = source.randint(1, 15)
    return flat[first : first + tensor.numel()].view(tensor.shape)


def patched(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    copy: Any = freed(tensor, source) if source.random() < 0.5 else tensor.clone()
    copy.data_ptr = lambda: source.choice((0, 8, 2**64, "x"))
    copy.stride = lambda: (1,)
    copy.untyped_storage = lambda: range(10**12)
    return copy


def other_values(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.full(tensor.shape, source.choice((torch.nan, torch.inf, 0.0))).to(tensor.dtype)
    values = [source.choice(EXTREMES) for _ in range(tensor.numel())]
    return torch.tensor(values, dtype=tensor.dtype).view(tensor.shape)


def in_memory_of(tensor: torch.Tensor, other: torch.Tensor, source: random.Random) -> torch.Tensor:
    """A tensor of the same dtype and shape as `tensor` in the memory of `other`, if it has room."""
    if other.layout is not torch.strided or other.device.type != "cpu":
        return other
    room = torch.empty(0, dtype=tensor.dtype).set_(other.untyped_storage())  # type: ignore[call-overload]
    if len(room) < tensor.numel():
        return other
    first = source.choice((0, (len(room) - tensor.numel()) // 2))
    return room[first : first + tensor.numel()].view(tensor.shape)


def functional(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    """A wrapper of torch.func, which outlives its level."""
    kept = []
    torch.func.vmap(lambda x: (kept.append(x), x)[1])(tensor.reshape(-1)[:1].expand(2))
    return kept[0]


CHANGES: list[Callable[[torch.Tensor, random.Random], Any]] = [
    freed, overlapping, expanded, resized, misaligned, patched, other_values, functional,
    lambda x, source: x.to(source.choice((torch.int32, torch.int64, torch.float16, torch.float64, torch.bool,
                                          torch.complex64, torch.uint8, torch.bfloat16))),
    lambda x, source: x.to("meta"),
    lambda x, source: x.float().to_sparse() if x.dim() else x,
    lambda x, source: torch.nested.nested_tensor([x.float(), x.float()]),
    lambda x, source: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x, source: x.clone().as_subclass(Subclass),
    lambda x, source: torch.nn.Parameter(x.clone(), requires_grad=False),
    lambda x, source: x.clone().requires_grad_() if x.is_floating_point() and x.itemsize > 1 else x,
    lambda x, source: x.mT if x.dim() > 1 else x,
    lambda x, source: x.flatten(),
    lambda x, source: x[None],
    lambda x, source: x[(None,) * 9],
    lambda x, source: x[:1].clone() if x.dim() else x,
    lambda x, source: x[:0] if x.dim() else x,
    lambda x, source: x[1:] if x.dim() else x,
    lambda x, source: x[..., ::2] if x.dim() else x,
    lambda x, source: x.numpy() if x.dtype in (torch.float32, torch.int32, torch.int64) else x,
    lambda x, source: x.untyped_storage(),
    lambda x, source: x.tolist(),
]  # fmt: skip


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def changed(value: Any, others: list[torch.Tensor], source: random.Random) -> Any:
    """Return another value in place of a good one."""
    if isinstance(value, (list, tuple)) and value and source.random() < 0.8:
        items = list(value)
        place = source.randrange(len(items))
        match source.randrange(6):
            case 0:
                return items * source.choice((0, 2, 5, 300))
            case 1:
                return [*items, source.choice(VALUES)]
            case 2:
                return tuple(items[:place])
            case _:
                items[place] = changed(items[place], others, source)
                return type(value)(*items) if isinstance(value, Product) else type(value)(items)
    if isinstance(value, LinearWorkspace) and source.random() < 0.8:
        workspace = LinearWorkspace(torch.device("cpu"))
        name = source.choice(("partials", "semaphores"))
        setattr(workspace, name, changed(getattr(workspace, name), others, source))
        return workspace
    if isinstance(value, torch.Tensor) and source.random() < 0.85:
        if others and source.random() < 0.15:
            return in_memory_of(value, source.choice(others), source)
        try:
            return source.choice(CHANGES)(value, source)
        except (RuntimeError, ValueError, IndexError):
            return None  # not every tensor can be changed in every way
    return source.choice(VALUES)


class HostileCall(NamedTuple):
    """A call of a function with some bad arguments."""

    target: Target
    arguments: Arguments
    bad: list[str]

    def __str__(self) -> str:
        shown = {name: described(self.arguments[name]) for name in self.bad}
        return f"{self.target.name} with {shown}"


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        try:
            shape = f"{list(value.shape)} {value.stride()} of {len(value.untyped_storage())} bytes"
        except RuntimeError:
            shape = "without memory"
        return f"<{type(value).__name__} {value.dtype} {value.layout} {shape} on {value.device}>"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return "<a huge integer>" if type(value) is int and abs(value) > 2**64 else repr(value)[:200]


def hostile_call(number: bytes) -> HostileCall:
    """The same call for the same number, in every process. Without a number its arguments are good."""
    source = random.Random(number)
    target = source.choice(targets() if number else ACCEPTED)
    arguments = target.make(source)
    if not arguments:
        return HostileCall(target, {"arguments": source.choice(VALUES)}, ["arguments"])
    bad = source.sample(sorted(arguments), min(len(arguments), source.choice((1, 1, 1, 2, 3)))) if number else []
    others = tensors_in(list(arguments.values()))
    for name in bad:
        arguments[name] = changed(arguments[name], others, source)
    return HostileCall(target, arguments, bad)


WRITTEN = (
    "query",
    "key_cache",
    "value_cache",
    "key_scale",
    "value_scale",
    "target",
    "caches",
    "page_table",
    "output",
    "hidden",
    "tokens",
    "lengths",
    "seen",
    "counts",
    "scale",
)


def make_call(number: bytes) -> None:
    """Make a call. Errors must name an argument, and a refused call must have written nothing.

    Raises:
        TypeError: The function refused the arguments.
        ValueError: The function refused the arguments.
        AssertionError: The error does not say which argument is wrong, or is of another type, or memory was written.
    """
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    call = hostile_call(number)
    good = [tensor for name in WRITTEN if name not in call.bad for tensor in tensors_in(call.arguments.get(name))]
    before = [tensor.clone() for tensor in good]
    try:
        call.target.function(**call.arguments)
    except Exception as error:
        # torch itself refuses some values before it calls the operator.
        of_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in ("llama_te::", "functorch"))
        if not of_torch and not (isinstance(error, (TypeError, ValueError)) and names_argument(str(error), call)):
            raise AssertionError(f"{call}: {error!r}") from error
        if not all(map(same_bits, good, before)):
            raise AssertionError(f"{call} wrote before it raised {error!r}") from error
        raise ValueError(str(error)) from error


def names_argument(text: str, call: HostileCall) -> bool:
    return any(re.search(rf"\b{name}\b", text) for name in (*call.arguments, *Product._fields, "tensors", "arguments"))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


# --- tests -----------------------------------------------------------------------------------------------------------

# CPU tensors are no good arguments of these.
OF_A_GPU = re.compile(r".*_cuda|.*linear_(partials|semaphores)")
ACCEPTED = [target for target in targets() if not OF_A_GPU.fullmatch(target.name) and target.make(random.Random(0))]


@pytest.mark.parametrize("target", ACCEPTED, ids=[target.name for target in ACCEPTED])
def test_the_good_arguments_are_good(target: Target) -> None:
    for seed in range(4):
        target.function(**target.make(random.Random(seed)))


def of(name: str) -> Arguments:
    """The good arguments of a function of the extension."""
    (target,) = (target for target in targets() if target.name == f"_extension.{name}")
    return target.make(random.Random(0))


def shrunk(tensor: torch.Tensor, size: int) -> torch.Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(size)
    return copy


def long_rows(arguments: Arguments) -> Arguments:
    """4096 pages of 2^20 tokens in each row, of a cache without data."""
    on_meta = {name: arguments[name].to("meta") for name in ("qkv", "cos_sin", "query")}
    cache = torch.empty(1, 2**20, *arguments["key_cache"].shape[2:], dtype=arguments["qkv"].dtype, device="meta")
    return on_meta | {
        "key_cache": cache,
        "value_cache": cache.clone(),
        "page_table": torch.zeros(4, 4096, dtype=torch.int32),
    }


def product(**changes: Any) -> Change:
    return lambda arguments: {"products": [arguments["products"][0]._replace(**changes)]}


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def linear_of(rows: int, out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> Change:
    shapes = {"input": (rows, in_features), "weight": (out_features, in_features), "output": (rows, out_features)}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return product(**tensors, scale=None, norm_weight=None, residual=None)


Change = Callable[[Arguments], Arguments]
T, V = TypeError, ValueError

REFUSALS: list[tuple[str, Change, type[Exception], str]] = [
    ("append_rope_cpu", lambda a: {"qkv": None}, T, r"qkv is None: it must be a torch.Tensor, and no subclass but"),
    ("append_rope_cpu", lambda a: {"qkv": a["qkv"].as_subclass(Subclass)}, T, r"qkv is a Subclass: it must be a torch"),
    ("append_rope_cpu", lambda a: {"start": 12345678}, T, r"start is a int: it must be a torch.Tensor"),
    (
        "append_rope_cpu",
        lambda a: {"qkv": a["qkv"].to_sparse()},
        T,
        r"qkv has the layout torch.sparse_coo: it must be d",
    ),
    ("append_rope_cpu", lambda a: {"start": functional(a["start"], random.Random())}, T, r"start has no dense memory"),
    ("append_rope_cpu", lambda a: {"start": a["start"][(None,) * 9]}, V, r"start has 10 dimensions: allowed are up to"),
    (
        "append_rope_cpu",
        lambda a: {"start": shrunk(a["start"], 8)},
        V,
        r"start has the shape \[3\] .* only 8 bytes: it",
    ),
    (
        "append_rope_cpu",
        lambda a: {"start": shrunk(a["start"], 0)},
        V,
        r"start .* its storage has only 0 bytes: it was",
    ),
    (
        "append_rope_cpu",
        lambda a: {"start": a["start"].to("meta")},
        V,
        r"start is on meta; it must be on cpu, as the oth",
    ),
    (
        "append_rope_cpu",
        lambda a: {"qkv": a["qkv"].cfloat()},
        V,
        r"qkv is complex64: allowed are bfloat16, float16, flo",
    ),
    (
        "append_rope_cpu",
        lambda a: {"cos_sin": a["cos_sin"][:1].expand(2**31, -1)},
        V,
        r"cos_sin has P=2147483648: allo",
    ),
    ("append_rope_cpu", lambda a: {"width": 2**70}, V, r"width=2\*\*63 or more: allowed are"),
    ("append_rope_cpu", lambda a: {"width": 1.0}, T, r"width=1.0: it must be an integer"),
    ("append_rope_cpu", lambda a: {"width": Liar()}, T, r"width=<Liar>: it must be an integer"),
    (
        "append_rope_cpu",
        lambda a: {"key_cache": overlapping_cache(a["key_cache"])},
        V,
        r"key_cache .* elements share memo",
    ),
    (
        "append_rope_cpu",
        lambda a: {"query": a["query"].requires_grad_()},
        V,
        r"query requires a gradient, which append",
    ),
    ("append_rope_cpu", lambda a: {"cu_new": a["query"].flatten()[:4].view(torch.int32)}, V, r"cu_new and query share"),
    (
        "append_rope_cpu",
        lambda a: {"start": a["key_cache"].flatten()[:3].view(torch.int32)},
        V,
        r"start and key_cache sh",
    ),
    (
        "append_rope_cpu",
        lambda a: {n: a[n].to("meta") for n in a if n != "width" and a[n] is not None},
        V,
        r"qkv is on meta; it must be on the CPU",
    ),
    ("append_rope_check", long_rows, V, r"page_table has 4096 pages per row of 1048576 tokens: allowed are less"),
    (
        "append_rope_check",
        lambda a: {"qkv": torch.empty(3, 2**20, 4, 16, device="meta").half()},
        V,
        r"qkv has the shape .*: a token must have less than 2\*\*31 bytes",
    ),
    (
        "reorder_rows_cpu",
        lambda a: {"caches": None},
        T,
        r"caches is a NoneType: it must be a list or a tuple of tensors",
    ),
    ("reorder_rows_cpu", lambda a: {"caches": [None]}, T, r"caches\[0\] is None: it must be a torch.Tensor"),
    (
        "reorder_rows_cpu",
        lambda a: {"caches": [a["caches"][0].cfloat(), a["caches"][0]]},
        V,
        r"but caches\[0\] is comple",
    ),
    (
        "reorder_rows_cpu",
        lambda a: {"lengths": a["caches"][1].flatten()[:3].view(torch.int32)},
        V,
        r"lengths and caches",
    ),
    ("reorder_pages_cpu", lambda a: {"page_table": None}, T, r"page_table is None: it must be a torch.Tensor"),
    (
        "reorder_pages_cpu",
        lambda a: {"page_table": a["page_table"][:1].expand(3, -1)},
        V,
        r"page_table .* share memory",
    ),
    (
        "reorder_pages_cpu",
        lambda a: {"lengths": a["page_table"].as_strided((3,), (1,))},
        V,
        r"lengths and page_table share memory",
    ),
    ("decode_attention_check", lambda a: {"scale": "1"}, T, r"scale=<str>: it must be a float"),
    ("decode_attention_check", lambda a: {"scale": 10**400}, T, r"scale=2\*\*63 or more: it must be a float"),
    ("decode_attention_check", lambda a: {"workspace": None}, T, r"workspace is None"),
    (
        "linear_cpu_check",
        lambda a: {"products": "text"},
        T,
        r"products is a str: it must be a list or a tuple of products",
    ),
    ("linear_cpu_check", lambda a: {"products": [(1, 2)]}, T, r"products\[0\] is a tuple: it must be a Product"),
    ("linear_cpu_check", lambda a: {"products": []}, V, r"products has 0 entries: allowed are 1 to 4"),
    ("linear_cpu_check", product(swiglu=1), T, r"swiglu=1: it must be True or False"),
    ("linear_cpu_check", product(epsilon=None), T, r"epsilon=None: it must be a float"),
    (
        "linear_cpu_check",
        linear_of(3, 32, 64, torch.int32),
        V,
        r"input is int32: allowed are bfloat16, and on a CPU als",
    ),
    (
        "linear_cpu_check",
        lambda a: {"partials": a["partials"].to("meta")},
        V,
        r"workspace.partials is on meta: make a Lin",
    ),
    (
        "linear_cpu_check",
        lambda a: {"semaphores": a["semaphores"].long()},
        V,
        r"workspace.semaphores is int64; it must be",
    ),
    ("linear_check", linear_of(3, 32, 64, torch.float16), V, r"input is float16: on a GPU it must be bfloat16"),
    (
        "linear_check",
        linear_of(33, 32, 64),
        V,
        r"input has B=33 rows: on a GPU allowed are up to 32. Split them over more",
    ),
    ("linear_check", linear_of(3, 24, 64), V, r"weight is bfloat16 \[24, 64\]: on a GPU allowed .* N a multiple of 16"),
    ("linear_check", linear_of(3, 32, 0), V, r"weight is bfloat16 \[32, 0\]: on a GPU allowed"),
    (
        "embed_check",
        lambda a: {"table": torch.zeros(5, 6), "output": torch.zeros(3, 6)},
        V,
        r"table has rows of 24 bytes",
    ),
    (
        "embed_check",
        lambda a: {"tokens": torch.zeros(65536).long(), "output": torch.zeros(65536, 8)},
        V,
        r"tokens has B=65536 rows: on a GPU allowed are up to 65535. Split them over more calls",
    ),
    ("embed_check", lambda a: {"output": a["table"][:3]}, V, r"table and output share memory"),
    (
        "rms_norm_check",
        lambda a: {n: a[n].half() for n in ("hidden", "weight", "addend", "output")} | NO_SCALES,
        V,
        r"hidden is float16 \[3, 16\]: on a GPU allowed are bfloat16 and K a multiple of 8",
    ),
    (
        "quantize_rows_check",
        lambda a: {"input": bfloat16(3, 6), "output": a["output"][:, :6].contiguous()},
        V,
        r"input is bfloat16 \[3, 6\]: on a GPU allowed are bfloat16 and K a multiple of 8",
    ),
    (
        "quantize_rows_check",
        lambda a: {"input": bfloat16(3, 8), "output": a["output"][:, :8].contiguous()},
        V,
        r"output has a stride of 8 bytes; all but the last dimension's must be multiples of 16 bytes",
    ),
    ("quantize_rows_cpu_check", lambda a: {"scale": None}, V, r"scale is None: pass a tensor of float32 \[B\]"),
    ("rms_norm_cpu_check", lambda a: {"scale": None, "factor": torch.ones(1)}, V, r"factor is given without scale"),
    (
        "rms_norm_cpu_check",
        lambda a: {"addend": None, "addend_scale": torch.ones(3)},
        V,
        r"addend_scale is given without addend",
    ),
    (
        "rms_norm_cpu_check",
        lambda a: {"addend_scale": torch.ones(2)},
        V,
        r"addend_scale has the shape \[2\]; it must be \[3\], which is \[B\]",
    ),
    (
        "swiglu_cpu_check",
        lambda a: {"input_scale": torch.ones(3).double()},
        V,
        r"input_scale is float64; it must be float32",
    ),
    ("swiglu_cpu_check", lambda a: fp8_output() | {"scale": a["input"]}, V, r"scale is bfloat16; it must be float32"),
    (
        "rms_norm_check",
        lambda a: fp8_output() | {"factor": torch.ones(2)},
        V,
        r"factor has the shape \[2\]; it must be \[1\]",
    ),
    (
        "swiglu_check",
        lambda a: {"input": bfloat16(3, 12), "output": bfloat16(3, 6)} | NO_SCALES,
        V,
        r"input is bfloat16 \[3, 12\]: on",
    ),
    (
        "swiglu_check",
        lambda a: {"input": a["input"].requires_grad_()},
        V,
        r"input requires a gradient, which swiglu does",
    ),
    (
        "greedy_check",
        lambda a: {"logits": a["logits"].float()},
        V,
        r"logits is float32 .* on a GPU allowed are bfloat16",
    ),
    ("greedy_check", lambda a: {"best": a["tokens"]}, V, r"tokens and best share memory"),
]


def overlapping_cache(cache: torch.Tensor) -> torch.Tensor:
    return cache[:1].expand_as(cache)


@pytest.mark.parametrize(("name", "change", "error", "message"), REFUSALS, ids=[f"{r[0]} {r[3]}" for r in REFUSALS])
def test_refusals_of_the_extension(name: str, change: Change, error: type[Exception], message: str) -> None:
    arguments = of(name)
    with pytest.raises(error, match=message):
        getattr(_extension, name)(**(arguments | change(arguments)))


def test_nothing_to_do() -> None:
    """Calls without rows or columns are no error, on kernels' terms either."""
    for name in ("embed_check", "quantize_rows_check", "rms_norm_check", "swiglu_check", "greedy_check"):
        shared = {"table", "weight", "factor"}
        getattr(_extension, name)(
            **{key: value[:0] if isinstance(value, torch.Tensor) and key not in shared else value
               for key, value in of(name).items()}
        )  # fmt: skip
    linear = of("linear_check")
    _extension.linear_check(**(linear | linear_of(0, 32, 64)(linear)))


def test_a_mix_of_tensors_with_and_without_data() -> None:
    arguments = rms_norm_arguments(random.Random(0))
    with pytest.raises(ValueError, match=r"The tensors are on cpu and meta: pass tensors of one device"):
        rms_norm(**(arguments | {"output": arguments["output"].to("meta")}))


def test_values_that_another_thread_changes() -> None:
    """Lengths and pages change while `append_rope` runs: results may be wrong, but nothing leaves the cache."""
    case = AppendCase(new=(300, 300), before=(0, 0), page_size=16, kv_heads=2, head_dim=64)
    arguments = make_append(case)
    done = threading.Event()

    def disturb() -> None:
        good = {name: arguments[name].clone() for name in ("start", "page_table")}
        source = random.Random(0)
        while not done.is_set():
            for name, tensor in good.items():
                arguments[name].fill_(source.choice(EXTREMES))
                arguments[name].copy_(tensor)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(1000):
            with contextlib.suppress(ValueError):
                append_rope(**arguments)
    finally:
        done.set()
        thread.join()


@pytest.mark.fuzz
def test_no_value_crashes(tmp_path: Path, counts: Callable[[str], None]) -> None:
    try:
        result = fuzzing.fuzz(
            make_call,
            [b""],
            tmp_path,
            refusals=(ValueError,),
            cases=6000,
            megabytes=1024,  # sanitizers keep freed memory
            damage=lambda seed, source: source.randbytes(8),
        )
    except AssertionError as error:
        failed = tmp_path / "damaged"
        raise AssertionError(f"{hostile_call(failed.read_bytes())}\n{error}" if failed.exists() else error) from None
    assert result.refused > result.accepted > 0
    counts(f"hostile arguments: {result.accepted + result.refused} calls of {len(targets())} functions: {result}")
