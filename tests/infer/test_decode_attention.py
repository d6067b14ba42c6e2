"""`decode_attention` on the CPU: against `append_rope` and float64 PyTorch, with bad input, and as torch sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.decode_attention_oracle import DecodeCase, assert_decoded, make_decode, same_bits
from infer.operator_oracle import DTYPES, HEAD_DIMS
from llama_te_infer.ops import library
from llama_te_infer.ops.decode_attention import decode_attention, takes_decode_attention, workspace_size

pytest.importorskip("llama_te_infer._extension", reason="the package is used from its source folder")


@st.composite
def decode_cases(draw: st.DrawFn) -> DecodeCase:
    before = st.one_of(st.integers(0, 40), st.integers(0, 700))
    return DecodeCase(
        before=tuple(draw(st.lists(before, min_size=1, max_size=5))),
        page_size=draw(st.sampled_from([0, 0, 16, 17, 64, 256])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([16, *HEAD_DIMS])),
        dtype=draw(st.sampled_from(DTYPES)),
        room=draw(st.integers(0, 40)),
        gap=draw(st.integers(0, 2)),
        extra_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(deadline=None, max_examples=100)
@given(case=decode_cases())
def test_decode_attention(case: DecodeCase) -> None:
    assert_decoded(make_decode(case))


def test_no_rows() -> None:
    arguments = make_decode(DecodeCase(before=(3, 4)))
    arguments |= {"qkv": arguments["qkv"][:0], "output": arguments["output"][:0]}
    before = arguments["key_cache"].clone()
    decode_attention(**arguments)
    assert same_bits(arguments["key_cache"], before)


def test_what_the_kernel_takes() -> None:
    assert takes_decode_attention(torch.bfloat16, 4, 128, None)
    assert takes_decode_attention(torch.float16, 16, 64, 16)
    for dtype, group, head_dim, page_size in (
        (torch.float32, 4, 128, None),
        (torch.bfloat16, 17, 128, None),
        (torch.bfloat16, 0, 128, None),
        (torch.bfloat16, 4, 112, None),
        (torch.bfloat16, 4, 128, 24),
    ):
        assert not takes_decode_attention(dtype, group, head_dim, page_size)


def test_workspace_grows_with_what_must_be_merged() -> None:
    sizes = [workspace_size(2, 8, 4, 128, capacity) for capacity in (1, 256, 257, 512, 4096, 8192, 131072)]
    assert sizes == sorted(sizes)
    part = 2 * 8 * 4 * 132
    assert [(size - sizes[0]) // part for size in sizes] == [0, 0, 1, 1, 15, 15, 47]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("rows", 257, ValueError, r"rows=257: allowed are 0 to 256"),
        ("rows", -1, ValueError, r"rows=-1: allowed are 0 to 256"),
        ("kv_heads", 2**31 - 1, ValueError, r"kv_heads=2147483647: allowed are 0 to 64"),
        ("group", 2**63, ValueError, r"group=2\*\*63 or more: allowed are 0 to 16"),
        ("group", 10**4000, ValueError, r"group=2\*\*63 or more: allowed are 0 to 16"),
        ("head_dim", 2**40, ValueError, r"head_dim=1099511627776: allowed are 0 to 256"),
        ("capacity", 2**31, ValueError, r"capacity=2147483648: allowed are 0 to 2147483647"),
        ("capacity", -(2**70), ValueError, r"capacity=less than -2\*\*63: allowed are 0"),
        ("rows", None, TypeError, r"rows=None: it must be an integer"),
        ("rows", 1.0, TypeError, r"rows=1.0: it must be an integer"),
        ("group", True, TypeError, r"group=True: it must be an integer"),
        ("capacity", "4096", TypeError, r"capacity=<str>: it must be an integer"),
    ],
)
def test_sizes_without_a_workspace(name: str, value: Any, error: type[Exception], message: str) -> None:
    sizes = {"rows": 256, "kv_heads": 64, "group": 16, "head_dim": 256, "capacity": 2**31 - 1}
    assert workspace_size(**sizes) == 64 * 256 + 256 * 64 * 48 * 16 * 260
    with pytest.raises(error, match=message):
        workspace_size(**(sizes | {name: value}))


Change = Callable[[dict[str, Any]], dict[str, Any]]


def replace(**values: Any) -> Change:
    return lambda arguments: {
        name: value(arguments[name]) if callable(value) else value for name, value in values.items()
    }


BAD: list[tuple[Change, str]] = [
    (replace(qkv=lambda x: x[0]), r"qkv has the shape \[2, 4, 64\]; it must be \[B, K, G \+ 2, D\]"),
    (replace(qkv=lambda x: x[:, :, :2]), r"qkv has the shape \[3, 2, 2, 64\]"),
    (replace(qkv=lambda x: x.clone().requires_grad_()), r"qkv requires a gradient, which decode_attention does not"),
    (replace(qkv=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), r"qkv has the strides .*all but the first"),
    (replace(cos_sin=lambda x: x.bfloat16()), r"cos_sin is bfloat16; it must be float32"),
    (replace(cos_sin=lambda x: x[:, :32]), r"cos_sin has the shape \[\d+, 32\]; it must be \[any, 64\]"),
    (replace(cos_sin=lambda x: x[:5]), r"start\[2\]=5 and 1 new tokens make row 2 6 tokens long, but cos_sin has 5"),
    (replace(start=lambda x: x.long()), r"start is int64; it must be int32"),
    (replace(start=lambda x: x[:2]), r"start has 2 rows, but there are B=3"),
    (replace(start=lambda x: x - 1), r"start\[1\]=-1: a row cannot have had fewer than 0 tokens"),
    (replace(start=lambda x: x + 80, cos_sin=torch.ones(99, 64)), r"row 0 84 tokens long, but a row of the cache has"),
    (replace(page_table=lambda x: x.long()), r"page_table is int64; it must be int32"),
    (replace(page_table=lambda x: x[:2]), r"page_table has 2 rows, but there are B=3"),
    (replace(page_table=lambda x: x * 0 + 99), r"page_table\[0, 0\]=99, but the cache has pages 0 to 2"),
    (
        replace(
            start=lambda x: x + 32,
            cos_sin=torch.ones(99, 64),
            page_table=lambda x: torch.tensor([0, 3, 0]).expand(3, 3).int().contiguous(),
        ),
        r"page_table\[0, 1\]=3, but the cache has pages 0 to 2",  # a page of earlier tokens
    ),
    (replace(page_table=None, key_cache=lambda x: x[:2], value_cache=lambda x: x[:2]), r"key_cache has 2 rows, but"),
    (replace(key_cache=lambda x: x[:, :, :1]), r"key_cache has the shape \[3, 16, 1, 64\]"),
    (replace(value_cache=lambda x: x[:, :8]), r"value_cache has the shape \[3, 8, 2, 64\]; it must be \[3, 16, 2, 64"),
    (replace(key_cache=lambda x: x.bfloat16()), r"key_cache is bfloat16; it must be float32"),
    (replace(output=lambda x: x[:2]), r"output has the shape \[2, 4, 64\]; it must be \[3, 4, 64\]"),
    (replace(output=lambda x: x.half()), r"output is float16; it must be float32"),
    (replace(output=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), r"output has the strides .*contiguous"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(change: Change, message: str) -> None:
    arguments = make_decode(DecodeCase(before=(3, 0, 5), page_size=16))
    arguments |= change(arguments)
    before = {name: arguments[name].clone() for name in ("output", "key_cache", "value_cache")}
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)
    for name, tensor in before.items():
        assert same_bits(arguments[name], tensor), f"{name} was written"


def check_for_kernel(arguments: dict[str, Any]) -> None:
    """Run the checks that the operator does for CUDA tensors before its launch."""
    library.extension().decode_attention_check(**arguments)


@pytest.mark.parametrize("gap", [0, 1])
def test_the_kernel_takes_good_input(gap: int) -> None:
    for page_size in (0, 16):
        check_for_kernel(make_decode(DecodeCase(before=(20, 30), page_size=page_size, gap=gap, dtype=torch.bfloat16)))
    arguments = make_decode(DecodeCase(before=(20, 30), dtype=torch.bfloat16))
    both = torch.zeros(*arguments["key_cache"].shape[:3], 128, dtype=torch.bfloat16)
    check_for_kernel(arguments | {"key_cache": both[..., :64], "value_cache": both[..., 64:]})


BAD_FOR_KERNEL: list[tuple[Change, str]] = [
    (
        lambda x: {name: x[name].float() for name in ("qkv", "key_cache", "value_cache", "output")},
        r"qkv is float32 with G=2 and D=64 and pages of 16: on a GPU allowed are bfloat",
    ),
    (replace(qkv=lambda x: x.repeat(1, 1, 5, 1), output=lambda x: x.repeat(1, 9, 1)), r"G=18 .* G up to 16"),
    (
        lambda x: (
            {name: x[name].repeat(129, *[1] * (x[name].dim() - 1)) for name in ("qkv", "start", "page_table")}
            | {"output": x["output"].repeat(129, 1, 1)}
        ),
        r"qkv has B=258: on a GPU allowed are up to 256",
    ),
    (
        lambda x: (
            {"qkv": x["qkv"].repeat(1, 33, 1, 1), "output": x["output"].repeat(1, 33, 1)}
            | {name: x[name].repeat(1, 1, 33, 1) for name in ("key_cache", "value_cache")}
        ),
        r"qkv has K=66: on a GPU allowed are up to 64",
    ),
    (replace(workspace=lambda x: x.long()), r"workspace is int64; it must be int32"),
    (replace(workspace=lambda x: x[:-1]), r"workspace has \d+ numbers, but \d+ are needed: make one of workspace_size"),
    (
        replace(workspace=lambda x: torch.cat((x, x))[1:]),
        r"workspace starts at an address that is not a multiple of 16",
    ),
    (replace(qkv=lambda x: gapped(x, 4)), r"qkv has a stride of 1032 bytes"),
    (replace(key_cache=lambda x: gapped(x, 4)), r"key_cache has a stride of 4104 bytes; all but the last dimension's"),
    (
        replace(value_cache=lambda x: torch.cat((x, x)).flatten()[4:][: x.numel()].view(x.shape)),
        r"value_cache starts at an addr",
    ),
    (lambda x: {"value_cache": x["key_cache"]}, r"key_cache and value_cache share memory"),
    (lambda x: {"output": x["qkv"].flatten()[:512].view(2, 4, 64)}, r"qkv and output share memory"),
    (lambda x: {"output": x["key_cache"].flatten()[:512].view(2, 4, 64)}, r"output and key_cache share memory"),
    (lambda x: {"cos_sin": x["key_cache"].flatten()[:4096].view(torch.float32).view(32, 64)}, r"cos_sin and key_cache"),
    (
        lambda x: {"output": x["workspace"][64:].view(torch.bfloat16)[:512].view(2, 4, 64)},
        r"(workspace and output|output and workspace) share",
    ),
]


def gapped(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same numbers with a gap of some elements between the first dimension's entries."""
    flat = tensor.flatten(1)
    wide = torch.cat((flat, flat[:, :gap]), dim=1)
    return wide[:, : flat.shape[1]].unflatten(1, tensor.shape[1:])


@pytest.mark.parametrize(("change", "message"), BAD_FOR_KERNEL, ids=[message for _, message in BAD_FOR_KERNEL])
def test_bad_input_for_the_kernel(change: Change, message: str) -> None:
    arguments = make_decode(DecodeCase(before=(20, 30), page_size=16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        check_for_kernel(arguments | change(arguments))


def test_torch_agrees_with_the_schema() -> None:
    arguments = make_decode(DecodeCase(before=(3, 0, 17), page_size=16))
    for name in ("output", "key_cache", "value_cache"):
        arguments[name].nan_to_num_()
    torch.library.opcheck(torch.ops.llama_te.decode_attention.default, tuple(arguments.values()))
