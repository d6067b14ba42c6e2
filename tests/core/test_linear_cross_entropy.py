"""The fused loss equals the logits' loss in value, gradients and precision, and never holds all logits at once.

Shapes: T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import TINY
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, linear_cross_entropy, next_token_labels

SETTINGS = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def problem(
    tokens: int = 13, vocabulary: int = 11, size: int = 6, dtype: torch.dtype = torch.float64, ignored: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make hidden states [T, E], a head [V, E] and labels [T], some of them ignored. Each call gives the same."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden_TE = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    weight_VE = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_T[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden_TE.to(dtype).requires_grad_(), weight_VE.to(dtype).requires_grad_(), labels_T


def plain_loss(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the same loss from all logits at once, with torch's own functions."""
    loss = F.cross_entropy(logits_TV, labels_T, ignore_index=ignore_index, reduction="sum")
    counted_T = labels_T != ignore_index
    loss = loss + z_loss * logits_TV[counted_T].logsumexp(-1).square().sum()
    return loss / (counted_T.sum() if num_items is None else num_items)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


@SETTINGS
@given(
    tokens=st.integers(1, 17),
    vocabulary=st.integers(1, 12),
    chunk_tokens=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.4]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    num_items=st.sampled_from([None, 5, torch.tensor(41)]),
    scale=st.sampled_from([1.0, 0.37]),
)
def test_it_is_the_loss_of_the_logits(tokens, vocabulary, chunk_tokens, ignored, z_loss, num_items, scale):
    hidden_TE, weight_VE, labels_T = problem(tokens, vocabulary, ignored=ignored)
    labels_T[-1] = 0  # one label counts
    options: dict[str, Any] = {"z_loss": z_loss, "num_items": num_items}
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=chunk_tokens, **options)
    expected = plain_loss(hidden_TE @ weight_VE.T, labels_T, **options)
    assert loss.shape == () and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    actual_gradients = gradients(scale * loss, hidden_TE, weight_VE)
    for actual, wanted in zip(actual_gradients, gradients(scale * expected, hidden_TE, weight_VE), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradients_are_those_of_differences(z_loss):
    hidden_TE, weight_VE, labels_T = problem(tokens=7, vocabulary=5, size=3)

    def loss(hidden_TE: torch.Tensor, weight_VE: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=z_loss, chunk_tokens=3)

    assert torch.autograd.gradcheck(loss, (hidden_TE, weight_VE))


def test_an_ignored_label_may_be_a_token():
    hidden_TE, weight_VE, labels_T = problem(ignored=0)
    labels_T[:4] = 3
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, ignore_index=3, chunk_tokens=5)
    expected = plain_loss(hidden_TE @ weight_VE.T, labels_T, ignore_index=3)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tokens", [0, 5])
def test_without_a_label_it_is_what_torch_says(tokens):
    hidden_TE, weight_VE, labels_T = problem(tokens, ignored=1.1)
    assert (labels_T == -100).all()
    for num_items in (None, 4):
        loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=0.1, num_items=num_items)
        if num_items is None:
            assert math.isnan(loss.item()) and math.isnan(F.cross_entropy(hidden_TE @ weight_VE.T, labels_T).item())
        else:
            assert loss.item() == 0
        for gradient in gradients(loss, hidden_TE, weight_VE):
            assert (gradient == 0).all()


def test_strided_inputs():
    hidden_TE, weight_VE, labels_T = problem(tokens=12)
    hidden = hidden_TE.detach().reshape(3, 4, -1).transpose(0, 1).requires_grad_()
    labels = labels_T.reshape(3, 4).T
    weight = weight_VE.detach().T.contiguous().T.requires_grad_()
    assert not hidden.is_contiguous() and not labels.is_contiguous() and not weight.is_contiguous()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=5)
    expected = plain_loss(hidden_TE @ weight_VE.T, labels_T)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    grad_hidden_TE, grad_weight_VE = gradients(expected, hidden_TE, weight_VE)
    torch.testing.assert_close(grad_hidden.transpose(0, 1).reshape(12, -1), grad_hidden_TE, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad_weight, grad_weight_VE, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden_TE, weight_VE, labels_T = problem()
    expected = gradients(plain_loss(hidden_TE @ weight_VE.T, labels_T), hidden_TE, weight_VE)
    hidden_TE.requires_grad_(frozen == "weight")
    weight_VE.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=5)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    for tensor, gradient in zip((hidden_TE, weight_VE), expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient, atol=1e-12, rtol=0)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_loss_alone(context):
    hidden_TE, weight_VE, labels_T = problem(tokens=5)
    expected = plain_loss(hidden_TE @ weight_VE.T, labels_T)
    with context(), Allocations() as made:
        loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, chunk_tokens=2)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    assert made.most_elements < hidden_TE.numel() < weight_VE.numel()  # so no gradient was allocated


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_that_exp_cannot_take(dtype):
    hidden_TE, weight_VE, labels_T = problem(dtype=dtype)
    logits_TV = 1000 * hidden_TE @ weight_VE.T
    assert logits_TV.exp().isinf().any()
    loss = linear_cross_entropy(1000 * hidden_TE, weight_VE, labels_T, chunk_tokens=5)
    expected = plain_loss(logits_TV, labels_T)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(gradients(loss, weight_VE), gradients(expected, weight_VE), atol=0, rtol=1e-5)


def test_batches_add_up_to_one():
    hidden_TE, weight_VE, labels_T = problem(tokens=14)
    items = int((labels_T != -100).sum())
    expected = gradients(plain_loss(hidden_TE @ weight_VE.T, labels_T), hidden_TE, weight_VE)
    for part in (slice(0, 5), slice(5, 14)):
        linear_cross_entropy(
            hidden_TE[part], weight_VE, labels_T[part], num_items=torch.tensor(items), chunk_tokens=4
        ).backward()
    torch.testing.assert_close((hidden_TE.grad, weight_VE.grad), expected, atol=1e-12, rtol=0)


def test_backward_twice_but_not_a_second_derivative():
    hidden_TE, weight_VE, labels_T = problem()
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T)
    once = torch.autograd.grad(loss, (hidden_TE, weight_VE), retain_graph=True)
    torch.testing.assert_close(gradients(loss, hidden_TE, weight_VE), once, atol=0, rtol=0)
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden_TE, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(dtype, autocast):
    # With autocast, hidden and weight are float32 and the head rounds them. Without it, they have 16 bits already.
    stored = torch.float32 if autocast else dtype
    hidden_TE, weight_VE, labels_T = problem(tokens=400, vocabulary=50, size=32, dtype=stored)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=1e-2, chunk_tokens=2)
        logits_TV = F.linear(hidden_TE, weight_VE)
    assert logits_TV.dtype == dtype and loss.dtype == torch.float32
    # The reference uses the head's 16-bit logits, so the only difference is float32's error.
    expected = plain_loss(logits_TV.double(), labels_T, z_loss=1e-2)
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-6)

    exact = [tensor.detach().to(dtype).double().requires_grad_() for tensor in (hidden_TE, weight_VE)]
    rounded_TV = exact[0] @ exact[1].T
    rounded_TV = rounded_TV + (logits_TV.double() - rounded_TV).detach()  # the head's logits, but float64 gradients
    wanted = gradients(plain_loss(rounded_TV, labels_T, z_loss=1e-2), *exact)
    actual = gradients(loss, hidden_TE, weight_VE)
    epsilon = torch.finfo(dtype).eps
    for gradient, tensor, exactly in zip(actual, (hidden_TE, weight_VE), wanted, strict=True):
        assert gradient.dtype == tensor.dtype
        # Each of the three roundings errs by half an epsilon at most. Measured: 0.36 epsilon.
        assert (gradient.double() - exactly).norm() <= epsilon * exactly.norm()


def test_autocast_leaves_float64_alone():
    hidden_TE, weight_VE, labels_T = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T)
    torch.testing.assert_close(loss, plain_loss(hidden_TE @ weight_VE.T, labels_T), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("num_items", "scale"), [(1, 2.0**17), (2**26, 2.0**26)])
def test_a_loss_scale_does_what_it_is_for(num_items, scale):
    # One scale exceeds float16's range. The other undoes a divisor that would make a float16 gradient 0.
    hidden_TE, weight_VE, labels_T = problem(dtype=torch.float16)
    weight_VE = (weight_VE.detach() / 2**10).requires_grad_()
    unscaled_TE, _ = gradients(linear_cross_entropy(hidden_TE, weight_VE, labels_T, num_items=1), hidden_TE, weight_VE)
    loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, num_items=num_items)
    (scaled_TE,) = gradients(scale * loss, hidden_TE)
    torch.testing.assert_close(scaled_TE, (unscaled_TE.double() * scale / num_items).half(), atol=0, rtol=0)


class Allocations(TorchDispatchMode):
    """Records operators' allocations without views: the most elements of one tensor, and the most bytes at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most_elements = 0
        self.most_bytes = 0
        self._there: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not func.is_view:
            for made in tree_leaves(outputs):
                if isinstance(made, torch.Tensor):
                    self.most_elements = max(self.most_elements, made.numel())
                    self._there[StorageWeakRef(made.untyped_storage())] = made.untyped_storage().nbytes()
        self._there = {storage: size for storage, size in self._there.items() if not storage.expired()}
        self.most_bytes = max(self.most_bytes, sum(self._there.values()))
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_tokens_are_never_there(dtype):
    tokens, vocabulary, size, chunk_tokens = 96, 2000, 4, 16
    hidden_TE, weight_VE, labels_T = problem(tokens, vocabulary, size, dtype=dtype)
    with Allocations() as plain:
        plain_loss((hidden_TE @ weight_VE.T).float(), labels_T).backward()
    with Allocations() as fused:
        loss = linear_cross_entropy(hidden_TE, weight_VE, labels_T, z_loss=0.1, chunk_tokens=chunk_tokens)
    with Allocations() as backward:
        loss.backward()
    assert plain.most_elements == tokens * vocabulary
    assert fused.most_elements == chunk_tokens * vocabulary
    assert backward.most_elements == vocabulary * size
    # The docstring names these: the logits and 4 bytes for each; the head's gradient and, in 16 bits, a chunk's share
    # of it; the gradient of hidden. A few numbers for each token come on top.
    width = dtype.itemsize
    logits = (width + 4) * chunk_tokens * vocabulary
    head, hidden = (4 if width == 4 else 6) * vocabulary * size, width * tokens * size
    assert fused.most_bytes <= logits + head + hidden + 50 * tokens
    assert plain.most_bytes > 5 * fused.most_bytes


def test_a_gpu_without_triton_warns_once(monkeypatch):
    module = sys.modules["llama_te_core.loss.linear_cross_entropy"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module._triton_is_installed.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU.* Install the version of triton"):
        passes = module._passes(torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module._passes(torch.device("cuda")) == passes == (module._statistics, module._write_gradient)
    module._triton_is_installed.cache_clear()


@pytest.fixture
def model() -> NVLlamaForCausalLM:
    torch.manual_seed(0)
    return NVLlamaForCausalLM(NVLlamaConfig(**TINY, attn_input_format="thd"))


def batch_of(layout: str) -> dict[str, Any]:
    """Three sequences of 9, 4 and 6 tokens."""
    sequences = [
        torch.randint(3, 257, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 4, 6)
    ]
    if layout == "packed":
        labels = torch.cat([F.pad(sequence[1:], (1, 0), value=-100) for sequence in sequences])
        cu_seqlens = torch.tensor([0, 9, 13, 19], dtype=torch.int32)
        packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 9, "max_length_k": 9}
        return {"input_ids": torch.cat(sequences)[None], "labels": labels[None], **packed}
    ids_BS, mask_BS, labels_BS = (torch.full((3, 9), value) for value in (0, 0, -100))
    for row, sequence in enumerate(sequences):
        place = slice(9 - len(sequence), 9) if layout == "left" else slice(len(sequence))
        ids_BS[row, place], mask_BS[row, place], labels_BS[row, place] = sequence, 1, sequence
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("num_items", [None, 23])
def test_the_model_has_the_same_loss(model, layout, num_items):
    batch = batch_of(layout)
    model(**batch, num_items_in_batch=num_items).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected_loss = model(**batch, num_items_in_batch=num_items).loss
    model.zero_grad()

    labels_BS = next_token_labels(batch.pop("labels"), batch.get("attention_mask"))
    hidden_BSE = model.model(**batch).last_hidden_state
    loss = linear_cross_entropy(hidden_BSE, model.lm_head.weight, labels_BS, num_items=num_items, chunk_tokens=7)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(6)}, r"weight has shape \[6\]: it must be \[vocabulary, hidden size\]"),
        ({"weight": torch.zeros(0, 6)}, r"weight has shape \[0, 6\].*with a row"),
        ({"weight": torch.zeros(11, 5)}, r"hidden has shape \[13, 6\]: its last dimension must be 5"),
        ({"hidden": torch.zeros(())}, r"hidden has shape \[\]"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, r"labels have shape \[12\]: they must be \[13\]"),
        ({"labels": torch.zeros(13)}, "labels are torch.float32: they must be torch.int64"),
        ({"hidden": torch.zeros(13, 6).bfloat16()}, "hidden is torch.bfloat16, but weight is torch.float32.*autocast"),
        ({"labels": torch.full((13,), 11)}, "labels contain 11, but the vocabulary has 11 tokens"),
        ({"labels": torch.full((13,), -1)}, "labels contain -1, .*or ignore_index"),
        ({"z_loss": -0.1}, "z_loss=-0.1 must be 0 or more"),
        ({"z_loss": math.nan}, "z_loss=nan must be 0 or more"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    hidden_TE, weight_VE, labels_T = problem(dtype=torch.float32)
    arguments = {"hidden": hidden_TE, "weight": weight_VE, "labels": labels_T, **changed}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
