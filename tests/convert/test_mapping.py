"""The table between the two layouts: its layouts are each other's reverse, and its plans name what does not fit."""

import itertools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_te_convert.layout.mapping import check_names, convert_tensors, map_names
from llama_te_convert.layout.row_order import InterleavedQKV, Stacked, Unchanged
from llama_te_convert.layout.rules import LLAMA

DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
HF_LAYER = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
TE_LAYER = (
    "self_attention.layernorm_qkv.layer_norm_weight",
    "self_attention.layernorm_qkv.weight",
    "self_attention.proj.weight",
    "layernorm_mlp.layer_norm_weight",
    "layernorm_mlp.fc1_weight",
    "layernorm_mlp.fc2_weight",
)


def names(per_layer, layers=2, prefix="model.", heads=("lm_head.weight",)):
    decoder = ["embed_tokens.weight", "norm.weight"]
    decoder += [f"layers.{layer}.{name}" for layer in range(layers) for name in per_layer]
    return [prefix + name for name in decoder] + list(heads)


@st.composite
def qkv(draw):
    """Sizes, and query, key and value weights with a different number at each place."""
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    head_dim, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sizes = types.SimpleNamespace(num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads, head_dim=head_dim)
    dtype = draw(DTYPES)
    rows = [count * head_dim for count in (kv_heads * group, kv_heads, kv_heads)]
    values = torch.arange(sum(rows) * width).view(sum(rows), width)
    # Whole numbers that float16 and bfloat16 tell apart are few: take bits instead.
    weight = values.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    return sizes, weight.split(rows)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@settings(deadline=None)
@given(qkv())
def test_interleaving_is_the_explicit_loop(case):
    sizes, (query, key, value) = case
    dim, kv_heads = sizes.head_dim, sizes.num_key_value_heads
    group = sizes.num_attention_heads // kv_heads
    rows = []
    for kv_head in range(kv_heads):
        for head in range(kv_head * group, (kv_head + 1) * group):
            rows += [query[head * dim + place] for place in range(dim)]
        rows += [key[kv_head * dim + place] for place in range(dim)]
        rows += [value[kv_head * dim + place] for place in range(dim)]
    merged = InterleavedQKV().merge((query, key, value), sizes)
    assert merged.dtype == query.dtype
    assert torch.equal(bits(merged), bits(torch.stack(rows)))


@settings(deadline=None)
@given(qkv())
def test_splitting_is_the_reverse_of_interleaving(case):
    sizes, parts = case
    order = InterleavedQKV()
    merged = order.merge(parts, sizes)
    for actual, expected in zip(order.split(merged, sizes), parts, strict=True):
        assert torch.equal(bits(actual), bits(expected))
    assert torch.equal(bits(order.merge(order.split(merged, sizes), sizes)), bits(merged))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), DTYPES)
def test_stacking(rows, width, parts, dtype):
    tensors = [torch.full((rows, width), part, dtype=dtype) for part in range(parts)]
    order = Stacked(parts)
    merged = order.merge(tensors, None)
    assert merged[:, 0].tolist() == [part for part in range(parts) for _ in range(rows)]
    assert all(map(torch.equal, order.split(merged, None), tensors))


def test_the_same_is_the_same():
    tensor = torch.ones(3)
    assert Unchanged().merge([tensor], None) is tensor
    assert Unchanged().split(tensor, None) == [tensor]


@pytest.mark.parametrize("prefix", ["", "model.", "transformer."])
@pytest.mark.parametrize(
    "heads", [(), ("lm_head.weight",), ("score.weight",), ("score.weight", "score.bias"), ("qa_outputs.weight",)]
)
def test_plans_of_both_directions_are_each_others_reverse(prefix, heads):
    hf, te = names(HF_LAYER, 12, prefix, heads), names(TE_LAYER, 12, prefix, heads)
    forward, backward = map_names(hf, to_te=True), map_names(te, to_te=False)
    assert {mapping.te for mapping in forward} == set(te)
    assert sorted(itertools.chain.from_iterable(mapping.hf for mapping in backward)) == sorted(hf)
    assert set(forward) == set(backward)


def test_every_row_has_names_of_its_own():
    for side in ([rule.te for rule in LLAMA], [name for rule in LLAMA for name in rule.hf]):
        assert len(side) == len(set(side))


def test_a_missing_tensor_is_named():
    hf = names(HF_LAYER)
    hf.remove("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(ValueError, match=r"Needed but missing: model\.layers\.1\.self_attn\.k_proj\.weight\. $"):
        map_names(hf, to_te=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.0.mlp.experts.3.gate_proj.weight",
        "model.layers.0.embed_tokens.weight",
        "vision.patch_embed.weight",
        "classifier.weight",
        "input_layernorm.weight",
    ],
)
def test_an_unknown_tensor_is_named(name):
    with pytest.raises(ValueError, match=rf"No rule for: {name}\. $"):
        map_names([*names(HF_LAYER), name], to_te=True)


@pytest.mark.parametrize("to_te", [True, False])
def test_the_other_layout_is_refused(to_te):
    with pytest.raises(ValueError, match="No rule for: model.layers.0"):
        map_names(names(TE_LAYER if to_te else HF_LAYER), to_te=to_te)


def test_many_names_are_cut_short():
    with pytest.raises(ValueError, match=r"No rule for: extra\.0, .*extra\.7 and 12 more\."):
        map_names([f"extra.{number}" for number in range(20)], to_te=True)


def test_targets():
    check_names(["a", "b"], ["b", "a"])
    with pytest.raises(ValueError, match=r"It has no source for: b\. It has no place for: c\. $"):
        check_names(["a", "c"], ["a", "b"])


def test_shapes_that_cannot_be_taken_apart_are_named():
    sizes = types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    name = "layers.0.self_attention.layernorm_qkv.weight"
    mappings = map_names([name], to_te=False)
    assert len(convert_tensors(mappings, {name: torch.ones(64, 5)}, sizes, to_te=False)) == 3
    with pytest.raises(ValueError, match=rf"{name} \[63, 5\] cannot become .*q_proj"):
        convert_tensors(mappings, {name: torch.ones(63, 5)}, sizes, to_te=False)
    rows = {"q": 32, "k": 16, "v": 8}
    source = {f"layers.0.self_attn.{part}_proj.weight": torch.ones(rows[part], 5) for part in rows}
    with pytest.raises(
        ValueError, match=r"k_proj\.weight \[16, 5\], .*v_proj\.weight \[8, 5\] cannot become layers\.0"
    ):
        convert_tensors(map_names(source, to_te=True), source, sizes, to_te=True)


def test_fc1_must_have_two_equal_halves():
    name = "layers.0.layernorm_mlp.fc1_weight"
    with pytest.raises(ValueError, match=rf"{name} \[5, 3\]"):
        convert_tensors(map_names([name], to_te=False), {name: torch.ones(5, 3)}, None, to_te=False)


def test_results_share_no_memory_with_the_source():
    source = {"norm.weight": torch.ones(3), "layers.0.layernorm_mlp.fc1_weight": torch.ones(4, 3)}
    made = convert_tensors(map_names(source, to_te=False), source, None, to_te=False)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in (*source.values(), *made.values())]
    assert len(set(pointers)) == len(pointers) == 5
    assert all(tensor.is_contiguous() for tensor in made.values())
