"""Any value in any position of any operator, and of any function of the extension, ends in a result or in an error.

A child process makes the calls, so a crash is a failed test that names the call.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fuzzing
from infer.decode_attention_oracle import DecodeCase, make_decode
from infer.operator_oracle import AppendCase, ReorderCase, make_append, make_pages, make_rows
from infer.step_oracle import LinearCase, make_linear
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.decode_attention import decode_attention, workspace_size
from llama_te_infer.ops.embed import embed
from llama_te_infer.ops.greedy import greedy
from llama_te_infer.ops.linear import LinearWorkspace, Product, linear, linear_chain
from llama_te_infer.ops.reorder import reorder_pages, reorder_rows
from llama_te_infer.ops.rms_norm import rms_norm
from llama_te_infer.ops.swiglu import swiglu

_extension = pytest.importorskip("llama_te_infer._extension", reason="the package is used from its source folder")

Arguments = dict[str, Any]


# --- good arguments --------------------------------------------------------------------------------------------------


def append_arguments(source: random.Random) -> Arguments:
    case = AppendCase(
        new=(2, 0, 1), before=(3, 0, 15), padded=source.random() < 0.5, page_size=source.choice((0, 16)), head_dim=16
    )
    return make_append(case)


def decode_arguments(source: random.Random) -> Arguments:
    return make_decode(DecodeCase(before=(3, 17), page_size=source.choice((0, 16)), dtype=torch.bfloat16))


def rows_arguments(source: random.Random) -> Arguments:
    return make_rows(ReorderCase(source_rows=(1, 2, 0), lengths=(7, 0, 9), wide=source.random() < 0.5))


def pages_arguments(source: random.Random) -> Arguments:
    return make_pages(ReorderCase(source_rows=(1, 2, 0), lengths=(17, 20, 18), wide=source.random() < 0.5))


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


def rms_norm_arguments(source: random.Random) -> Arguments:
    matrices = {name: torch.rand(3, 8).bfloat16() for name in ("hidden", "addend", "output")}
    return matrices | {"weight": torch.ones(8).bfloat16(), "epsilon": 1e-5}


def swiglu_arguments(source: random.Random) -> Arguments:
    return {"input": torch.rand(3, 16).bfloat16(), "output": torch.zeros(3, 8).bfloat16()}


def greedy_arguments(source: random.Random) -> Arguments:
    integers = {name: torch.zeros(3, dtype=torch.int64) for name in ("tokens", "best")}
    return integers | {
        "logits": torch.rand(3, 8).bfloat16(),
        "lengths": torch.ones(3).int(),
        "tickets": torch.zeros(3).int(),
    }


def workspace_arguments(source: random.Random) -> Arguments:
    return {"rows": 2, "kv_heads": 2, "group": 4, "head_dim": 64, "capacity": 4096}


Make = Callable[[random.Random], Arguments]

OPERATORS: dict[str, Make] = {
    "append_rope": append_arguments,
    "decode_attention": decode_arguments,
    "embed": embed_arguments,
    "greedy": greedy_arguments,
    "linear": operator_linear_arguments,
    "reorder_pages": pages_arguments,
    "reorder_rows": rows_arguments,
    "rms_norm": rms_norm_arguments,
    "swiglu": swiglu_arguments,
}
PUBLIC: dict[Callable[..., Any], Make] = {
    append_rope: append_arguments,
    decode_attention: decode_arguments,
    embed: embed_arguments,
    greedy: greedy_arguments,
    linear: wrapped_linear_arguments,
    linear_chain: chain_arguments,
    reorder_pages: pages_arguments,
    reorder_rows: rows_arguments,
    rms_norm: rms_norm_arguments,
    swiglu: swiglu_arguments,
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
    object, Liar(), range(10**9), torch.float32, torch.device("meta"), torch.Size([2]), print,
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
    target = source.choice(targets())
    arguments = target.make(source)
    if not arguments:
        return HostileCall(target, {"arguments": source.choice(VALUES)}, ["arguments"])
    bad = source.sample(sorted(arguments), min(len(arguments), source.choice((1, 1, 1, 2, 3)))) if number else []
    others = tensors_in(list(arguments.values()))
    for name in bad:
        arguments[name] = changed(arguments[name], others, source)
    return HostileCall(target, arguments, bad)


WRITTEN = ("query", "key_cache", "value_cache", "caches", "page_table", "output", "hidden", "tokens", "lengths")


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


ACCEPTED = [target for target in targets() if not target.name.endswith("_cuda") and target.make(random.Random(0))]


@pytest.mark.parametrize("target", ACCEPTED, ids=[target.name for target in ACCEPTED])
def test_the_good_arguments_are_good(target: Target) -> None:
    for seed in range(4):
        target.function(**target.make(random.Random(seed)))


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
def test_no_value_crashes(tmp_path: Path, counts: Callable[[str], None]) -> None:
    try:
        result = fuzzing.fuzz(
            make_call,
            [b""],
            tmp_path,
            refusals=(ValueError,),
            cases=6000,
            damage=lambda seed, source: source.randbytes(8),
        )
    except AssertionError as error:
        failed = tmp_path / "damaged"
        raise AssertionError(f"{hostile_call(failed.read_bytes())}\n{error}" if failed.exists() else error) from None
    assert result.refused > result.accepted > 0
    counts(f"hostile arguments: {result.accepted + result.refused} calls of {len(targets())} functions: {result}")
