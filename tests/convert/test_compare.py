"""Comparison of checkpoints: it names every difference with its position and size, and nothing else."""

import dataclasses
import json
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForQuestionAnswering,
)

from conftest import TINY
from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.errors import CheckpointError
from llama_te_convert.sources import tensor_source
from llama_te_convert.sources.checkpoint import Checkpoint
from llama_te_convert.sources.torch_tensors import as_bytes, info_of
from llama_te_convert.verify import scan
from llama_te_convert.verify.compare import TOLERANCES, compare
from llama_te_convert.verify.comparison import ConfigDifference

BITS = {2: torch.int16, 4: torch.int32}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
QKV = "model.layers.1.self_attention.layernorm_qkv.weight"


class MemorySource:
    """Tensors in memory. Each read overwrites the last one's memory, and `most` is the largest read in elements."""

    concurrent = False

    def __init__(self, tensors):
        self.held = tensors
        self.tensors = {name: info_of(tensor) for name, tensor in tensors.items()}
        self.most = 0
        self._given = None

    def read(self, name, start, stop):
        if self._given is not None:
            self._given.view(torch.uint8).fill_(0x5A)
        tensor = self.held[name]
        part = (tensor[start:stop] if tensor.dim() else tensor).clone()
        self.most = max(self.most, part.numel())
        self._given = part.reshape(-1)
        return as_bytes(part)

    def close(self):
        pass


def in_memory(model, path="somewhere", **fields):
    """A checkpoint as `save_pretrained` of the model would write it, with tied weights stored once."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Checkpoint(path, {**model.config.to_dict(), **fields}, MemorySource(tensors))


def changed(checkpoint, tensors=None, without=(), **fields):
    """The checkpoint with some tensors and fields replaced or added, and without some tensors."""
    held = {**checkpoint.source.held, **(tensors or {})}
    source = MemorySource({name: tensor for name, tensor in held.items() if name not in without})
    return Checkpoint("elsewhere", {**checkpoint.config, **fields}, source)


@pytest.fixture(scope="module")
def pairs():
    """The same tiny model in both layouts, in each dtype."""
    made = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**TINY)).to(dtype)
        made[dtype] = in_memory(model, "hf"), in_memory(convert_llama_hf_to_te(model), "te")
    return made


@pytest.fixture
def hf(pairs):
    return pairs[torch.float32][0]


@pytest.fixture
def te(pairs):
    return pairs[torch.float32][1]


# --- equal ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_layouts_in_files_are_equal(opened, tiny_llama, tmp_path, dtype):
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    model_te = convert_llama_hf_to_te(model, attn_input_format="bshd")
    model_te.save_pretrained(tmp_path / "te", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2 < len(list((tmp_path / "te").glob("*.safete*")))
    size = sum(parameter.nbytes for parameter in model.parameters())
    folders = ("hf", "sharded", "te")
    for a in folders:
        for b in folders:
            for tolerances in (None, TOLERANCES):
                comparison = compare(opened(tmp_path / a), opened(tmp_path / b), tolerances=tolerances)
                assert comparison.equal and comparison.differences == comparison.config == comparison.notes == ()
                assert (comparison.tensors, comparison.bytes) == (2 + 1 + 9 * 3, size)
    how = "within the tolerance"
    assert comparison.lines() == [
        f"a: {tmp_path / 'te'}",
        f"b: {tmp_path / 'te'}",
        f"equal {how}: 30 tensors, {size / 1000:.2f} KB, and the configuration",
    ]
    assert comparison.to_dict() == {
        "equal": True,
        "a": str(tmp_path / "te"),
        "b": str(tmp_path / "te"),
        "tensors": 30,
        "bytes": size,
        "bitwise": False,
        "differences": [],
        "config": [],
        "notes": [],
    }


@pytest.mark.parametrize(
    "hf_class",
    [LlamaModel, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering],
    ids=lambda each: each.__name__,
)
def test_other_heads(opened, tiny_llama, tmp_path, hf_class):
    model = tiny_llama(hf_class, num_labels=3)
    model.save_pretrained(tmp_path / "hf")
    convert_llama_hf_to_te(model).save_pretrained(tmp_path / "te")
    assert compare(opened(tmp_path / "hf"), opened(tmp_path / "te")).equal
    assert compare(opened(tmp_path / "te"), opened(tmp_path / "hf")).equal


@pytest.mark.parametrize("hf_class", [MistralForCausalLM, MistralForQuestionAnswering], ids=lambda each: each.__name__)
def test_another_architecture(opened, tmp_path, hf_class):
    model = hf_class(MistralConfig(**{**TINY, "sliding_window": None, "head_dim": 24}))
    model.save_pretrained(tmp_path / "hf")
    convert_llama_hf_to_te(model).save_pretrained(tmp_path / "te")
    comparison = compare(opened(tmp_path / "hf"), opened(tmp_path / "te"))
    assert comparison.equal, comparison.lines()
    # The same tensors with the name of another architecture are another model.
    other = opened(tmp_path / "te")
    other.config["source_model_type"] = "llama"
    fields = [field.name for field in compare(opened(tmp_path / "hf"), other).config]
    assert "model_type" in fields


def test_a_checkpoint_is_equal_to_itself(te):
    """Both sides read through one source, and each read overwrites the last one's memory."""
    assert compare(te, te).equal
    assert compare(te, te, tolerances=TOLERANCES).equal


def test_old_buffers_do_not_count(hf, te):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert compare(changed(hf, buffers), te).equal


# --- values -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_bit_is_reported_as_that_tensor_and_element(pairs, data):
    hf, te = pairs[data.draw(st.sampled_from(DTYPES))]
    name = data.draw(st.sampled_from(sorted(hf.source.held)))
    before = hf.source.held[name]
    size = before.dtype.itemsize
    index = tuple(data.draw(st.integers(0, length - 1)) for length in before.shape)
    bit = data.draw(st.integers(0, 8 * size - 1))
    after = before.clone()
    mask = torch.tensor(1 << bit).to(BITS[size]) if bit < 8 * size - 1 else torch.iinfo(BITS[size]).min
    after.view(BITS[size])[index] ^= mask
    flipped = changed(hf, {name: after})
    flipped_is_a = data.draw(st.booleans())
    other = data.draw(st.sampled_from((hf, te)))
    with mock.patch.object(scan, "BLOCK", data.draw(st.sampled_from((64, 200, 1000, 2**19)))):
        comparison = compare(flipped, other) if flipped_is_a else compare(other, flipped)
    assert not comparison.equal and comparison.config == ()
    (difference,) = comparison.differences
    found = difference.values
    assert (difference.name, difference.kind, found.elements, found.of) == (name, "values", 1, before.numel())
    assert found.index == index
    values = (after[index], before[index]) if flipped_is_a else (before[index], after[index])
    bits = [int(value.view(BITS[size])) & (1 << 8 * size) - 1 for value in values]
    assert [int(found.a_bits, 16), int(found.b_bits, 16)] == bits
    expected = abs(float(values[0]) - float(values[1]))
    assert found.largest == (math.inf if math.isnan(expected) else expected)
    assert name in "\n".join(comparison.lines()) and str(list(index)) in "\n".join(comparison.lines())
    json.dumps(comparison.to_dict(), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(0.5, 1000, width=32),
    power=st.integers(1, 16),
    sign=st.sampled_from((-1.0, 1.0)),
    place=st.integers(2, 4095),
)
def test_the_tolerance_is_a_share_of_the_largest_value_and_includes_its_bound(pairs, scale, power, sign, place):
    hf = pairs[torch.float32][0]
    a = torch.zeros(64, 64)
    a[0, 0] = -scale
    tolerances = {torch.float32: 2.0**-power}
    allowed = scale * 2.0**-power  # exact, a power of two
    b = a.clone()
    b.view(-1)[place] = sign * allowed
    first = changed(hf, {Q_PROJ: a})
    assert compare(first, changed(hf, {Q_PROJ: b}), tolerances=tolerances).equal
    b.view(-1)[place - 1] = allowed  # at the bound, so it does not count
    b.view(-1)[place] = sign * torch.nextafter(torch.tensor(allowed), torch.tensor(math.inf))
    (difference,) = compare(first, changed(hf, {Q_PROJ: b}), tolerances=tolerances).differences
    assert difference.name == Q_PROJ
    found = difference.values
    assert (found.elements, found.index, found.allowed) == (1, divmod(place, 64), allowed)
    assert found.largest == abs(found.a - found.b) == abs(float(b.view(-1)[place]))


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(DTYPES[1:]), seed=st.integers(0, 2**31), scale=st.sampled_from((1e-2, 1.0, 100.0)))
def test_one_rounding_is_within_the_tolerances(pairs, dtype, seed, scale):
    hf = pairs[torch.float32][0]
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * scale
    before = changed(hf, {Q_PROJ: weight})
    rounded = changed(hf, {name: tensor.to(dtype) for name, tensor in before.source.held.items()})
    assert compare(before, rounded, tolerances=TOLERANCES).equal
    assert compare(rounded, before, tolerances=TOLERANCES).equal
    # A hundredth of the tolerances is exceeded.
    tight = {each: tolerance / 100 for each, tolerance in TOLERANCES.items()}
    assert Q_PROJ in {each.name for each in compare(before, rounded, tolerances=tight).differences}
    assert {each.kind for each in compare(before, rounded).differences} == {"dtype"}


def test_the_coarser_dtype_decides(pairs):
    one = {dtype: {Q_PROJ: torch.full((64, 64), 1 + 2**-7).to(dtype)} for dtype in DTYPES}
    two = {dtype: {Q_PROJ: torch.full((64, 64), 1.0).to(dtype)} for dtype in DTYPES}
    hf = pairs[torch.float32][0]
    for fine, coarse in ((0, 1), (0, 2), (1, 2)):
        for a, b in ((fine, coarse), (coarse, fine)):
            first, second = changed(hf, one[DTYPES[a]]), changed(hf, two[DTYPES[b]])
            only = dict.fromkeys(DTYPES, 0.0) | {DTYPES[coarse]: 2**-7}
            assert compare(first, second, tolerances=only).equal
            only = dict.fromkeys(DTYPES, 2**-7) | {DTYPES[coarse]: 0.0}
            (difference,) = compare(first, second, tolerances=only).differences
            assert difference.values.elements == 64 * 64


def test_the_same_bits_of_two_dtypes_are_two_values(hf):
    half = torch.ones(64, 64, dtype=torch.float16)
    first, second = changed(hf, {Q_PROJ: half}), changed(hf, {Q_PROJ: half.view(torch.bfloat16)})
    (difference,) = compare(first, second, tolerances=TOLERANCES).differences
    assert (difference.values.elements, difference.values.a, difference.values.b) == (4096, 1.0, 2**-7)
    assert difference.values.a_bits == difference.values.b_bits == "0x3c00"


def test_the_largest_difference_of_several(hf, te):
    weight = hf.source.held[Q_PROJ].clone()
    weight[3, 5] += 0.25
    weight[40, 9] -= 2.0
    weight[63, 63] += 1.0
    for block in (64, 2**19):
        with mock.patch.object(scan, "BLOCK", block):
            (difference,) = compare(te, changed(hf, {Q_PROJ: weight})).differences
        assert (difference.values.elements, difference.values.index) == (3, (40, 9))
        assert difference.values.largest == pytest.approx(2.0, abs=1e-6)
    (difference,) = compare(te, changed(hf, {Q_PROJ: weight}), tolerances={torch.float32: 0.5}).differences
    assert difference.values.elements == 2
    line = difference.line()
    allowed = float(hf.source.held[Q_PROJ].abs().max()) / 2
    assert f"{Q_PROJ}: 2 of 4096 elements differ by more than {allowed:.4g}, most at [40, 9]: " in line
    assert repr(float(weight[40, 9])) + " in b, which is 2 apart" in line


def one_element(hf, a, b):
    """Two checkpoints that differ in one element: `a` and `b`. Whole numbers are the bits of the element."""
    made = []
    for value in (a, b):
        weight = torch.ones(64, 64)
        if isinstance(value, int):
            weight.view(torch.int32)[1, 2] = value
        else:
            weight[1, 2] = value
        made.append(changed(hf, {Q_PROJ: weight}))
    return made


@pytest.mark.parametrize(
    ("a", "b", "largest", "tolerant", "texts"),
    [
        (0.0, -0.0, 0.0, True, ("0.0 (0x00000000) in a", "-0.0 (0x80000000) in b", "0 apart")),
        (0x7FC00000, 0x7FC00001, 0.0, True, ("nan (0x7fc00000) in a", "nan (0x7fc00001) in b")),
        (math.nan, 1.0, math.inf, False, ("nan in a, 1.0 in b, which is inf apart",)),
        (1.0, math.nan, math.inf, False, ("1.0 in a, nan in b",)),
        (math.inf, 1.0, math.inf, False, ("inf in a, 1.0 in b",)),
        (1.0, -math.inf, math.inf, False, ("1.0 in a, -inf in b",)),
        (math.inf, -math.inf, math.inf, False, ("inf in a, -inf in b",)),
        (3e38, -3e38, 6e38, False, ("which is 6e+38 apart",)),
    ],
    ids=str,
)
def test_values_that_are_no_ordinary_numbers(hf, a, b, largest, tolerant, texts):
    first, second = one_element(hf, a, b)
    comparison = compare(first, second)
    (difference,) = comparison.differences
    assert difference.values.index == (1, 2)
    assert difference.values.largest == pytest.approx(largest, rel=1e-6)
    assert all(text in difference.line() for text in texts), difference.line()
    json.dumps(comparison.to_dict(), allow_nan=False)
    again = compare(first, second, tolerances=TOLERANCES)
    assert again.equal == tolerant
    assert [each.name for each in again.differences] == ([] if tolerant else [Q_PROJ])
    for same in (first, second):
        assert compare(same, changed(same)).equal and compare(same, changed(same), tolerances=TOLERANCES).equal


def test_an_infinity_allows_for_nothing_more(hf):
    first, second = one_element(hf, math.inf, math.inf)
    second.source.held[Q_PROJ][0, 0] = 1.5
    assert [each.values.index for each in compare(first, second, tolerances=TOLERANCES).differences] == [(0, 0)]


def test_tensors_that_are_not_of_floating_point(hf):
    first = changed(hf, {"extra": torch.tensor([1, 2, 3]), "flag": torch.tensor(True)})
    second = changed(hf, {"extra": torch.tensor([1, 2, 7]), "flag": torch.tensor(False)})
    third = changed(hf, {"extra": torch.tensor([1.0, 2, 3]), "flag": torch.tensor(True)})
    for tolerances in (None, TOLERANCES, dict.fromkeys(TOLERANCES, 1e9)):
        extra, flag = compare(first, second, tolerances=tolerances).differences
        assert (extra.values.index, extra.values.a, extra.values.b, extra.values.largest) == ((2,), 3, 7, 4)
        assert (flag.values.index, flag.values.a, flag.values.b) == ((), True, False)
        (difference,) = compare(first, third, tolerances=tolerances).differences
        assert (difference.kind, difference.a, difference.b) == ("dtype", "int64 [3]", "float32 [3]")
        assert compare(first, changed(first), tolerances=tolerances).equal


def test_float8(hf):
    weight = torch.ones(64, 64).to(torch.float8_e4m3fn)
    other = weight.clone()
    other.view(torch.uint8)[5, 6] += 1  # 1.125
    first, second = changed(hf, {Q_PROJ: weight}), changed(hf, {Q_PROJ: other})
    (difference,) = compare(first, second).differences
    assert (difference.values.index, difference.values.b, difference.values.b_bits) == ((5, 6), 1.125, "0x39")
    assert compare(first, second, tolerances={**TOLERANCES, torch.float8_e4m3fn: 0.125}).equal
    assert not compare(first, second, tolerances={**TOLERANCES, torch.float8_e4m3fn: 0.124}).equal
    assert compare(changed(hf, {Q_PROJ: weight.float()}), first, tolerances=TOLERANCES).equal


# --- names, shapes and dtypes -----------------------------------------------------------------------------------------


def test_names_shapes_and_dtypes(hf, te):
    first = changed(
        te,
        {"model.norm.weight": te.source.held["model.norm.weight"].double(), "model._extra_state": torch.ones(2)},
    )
    second = changed(hf, {"lm_head.weight": torch.ones(5, 64), "a.bias": torch.ones(3)}, without=[Q_PROJ])
    comparison = compare(first, second)
    assert {(each.name, each.kind, each.a, each.b) for each in comparison.differences} == {
        (Q_PROJ, "only in a", "float32 [64, 64]", None),
        ("model._extra_state", "only in a", "float32 [2]", None),
        ("a.bias", "only in b", None, "float32 [3]"),
        ("lm_head.weight", "shape", "float32 [257, 64]", "float32 [5, 64]"),
        ("model.norm.weight", "dtype", "float64 [64]", "float32 [64]"),
    }
    assert comparison.tensors == 32
    text = comparison.lines()
    assert text[2] == "different: 5 of 32 tensors and 0 fields of the configuration"
    assert "  a.bias: not there in a, float32 [3] in b" in text
    assert f"  {Q_PROJ}: float32 [64, 64] in a, not there in b" in text
    assert "  lm_head.weight: float32 [257, 64] in a, float32 [5, 64] in b" in text
    assert comparison.to_dict()["equal"] is False
    assert {each["name"] for each in comparison.to_dict()["differences"]} == {d.name for d in comparison.differences}
    # A tensor without a rule is compared too if both checkpoints have it.
    both = changed(first, {"model._extra_state": torch.tensor([1.0, 2.0])})
    (difference,) = compare(first, both).differences
    assert (difference.name, difference.values.index) == ("model._extra_state", (1,))


def test_empty_tensors(hf):
    first = changed(hf, {"none": torch.ones(0, 3), "rows": torch.ones(2, 0)})
    assert compare(first, changed(first)).equal
    assert compare(first, changed(first), tolerances=TOLERANCES).equal
    assert [each.kind for each in compare(first, changed(first, {"none": torch.ones(0, 4)})).differences] == ["shape"]


def test_no_more_than_a_block_is_read_at_once(hf, te):
    with mock.patch.object(scan, "BLOCK", 1000), mock.patch.object(tensor_source, "CHUNK_BYTES", 4000):
        for tolerances in (None, TOLERANCES):
            first, second = changed(hf), changed(te)
            assert compare(first, second, tolerances=tolerances).equal
            assert max(first.source.most, second.source.most) <= 1000


def test_progress_goes_up_to_all_bytes(hf, te):
    first = changed(te, {"unknown": torch.ones(1000)}, without=["model.norm.weight"])
    total = sum(info.nbytes for info in first.source.tensors.values())
    for tolerances in (None, TOLERANCES):
        steps = []
        compare(first, hf, tolerances=tolerances, progress=steps.append)
        assert len(steps) > 30 and steps == sorted(steps) and steps[-1] == total and steps[-2] == total - 4000


# --- tied embeddings --------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_a_head_that_is_the_same(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    hf, te = in_memory(model), in_memory(convert_llama_hf_to_te(model))
    embeddings = hf.source.held["model.embed_tokens.weight"]
    assert "lm_head.weight" not in hf.source.held
    stored = changed(hf, {"lm_head.weight": embeddings.clone()})
    stored_te = changed(te, {"lm_head.weight": embeddings.clone()})
    for a in (hf, te, stored, stored_te):
        for b in (hf, te, stored, stored_te):
            comparison = compare(a, b)
            assert comparison.equal and comparison.notes == ()
            assert comparison.tensors == (30 if stored in (a, b) or stored_te in (a, b) else 29)
    steps = []
    compare(hf, stored, progress=steps.append)
    assert steps == sorted(steps) and steps[-1] == sum(info.nbytes for info in hf.source.tensors.values())
    other = embeddings.clone()
    other[7, 8] += 1
    different = changed(te, {"lm_head.weight": other})
    for a, b in ((hf, different), (different, hf), (stored, different), (different, te)):
        comparison = compare(a, b)
        (difference,) = comparison.differences
        assert (difference.name, difference.values.elements, difference.values.index) == ("lm_head.weight", 1, (7, 8))
        (note,) = comparison.notes
        assert note.startswith("elsewhere has tied embeddings by its configuration, but its lm_head.weight is not ")
        assert f"note: {note}" in comparison.lines()
    # The same oddity on both sides is a note, and no difference.
    same = compare(different, changed(hf, {"lm_head.weight": other}))
    assert same.equal and len(same.notes) == 2
    # A head of another shape, and a missing head without tying.
    assert compare(hf, changed(hf, {"lm_head.weight": torch.ones(3, 64)})).differences[0].kind == "shape"
    untied = changed(hf, tie_word_embeddings=False)
    comparison = compare(untied, stored)
    assert [each.kind for each in comparison.differences] == ["only in b"]
    assert comparison.config == (ConfigDifference("tie_word_embeddings", False, True),)
    # Tying counts by itself, since it changes how the model trains.
    comparison = compare(changed(stored, tie_word_embeddings=False), hf)
    assert comparison.differences == () and not comparison.equal


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rms_norm_eps", 1e-5, [("rms_norm_eps", 1e-6, 1e-5)]),
        ("eos_token_id", [2, 3], [("eos_token_id", 2, [2, 3])]),
        ("initializer_range", 0.02, [("initializer_range", 0.15, 0.02)]),
        ("pretraining_tp", 2, [("pretraining_tp", 1, 2)]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, [("rope_parameters.rope_theta", 1e4, 5e5)]),
        ("rope_theta", 5e5, []),  # the new name overrides the old one
        ("somebodys_field", 3, [("somebodys_field", None, 3)]),
        ("use_cache", False, []),
        ("torch_dtype", "bfloat16", []),
        ("dtype", "bfloat16", []),
        ("transformers_version", "4.1.0", []),
        ("_name_or_path", "x/y", []),
        ("architectures", ["Another"], []),
        ("auto_map", {"AutoConfig": "a.B"}, []),
        ("quantization_config", {"quant_method": "gguf"}, []),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_fields_that_describe_the_model_count(hf, te, field, value, expected):
    second = changed(hf, **{field: value})
    expected = tuple(ConfigDifference(*each) for each in expected)
    for first in (hf, te):
        comparison = compare(first, second)
        assert comparison.config == expected
        assert comparison.equal == (not expected) and comparison.differences == ()
        for each in expected:
            assert f"  configuration, {each.name}: {each.a!r} in a, {each.b!r} in b" in comparison.lines()
    assert compare(second, te).config == tuple(ConfigDifference(each.name, each.b, each.a) for each in expected)


def test_fields_of_the_transformer_engine_layout_do_not_count(te, hf):
    second = changed(te, layer_precision=["fp8", None, "fp8"], attn_input_format="bshd", use_quantized_model_init=True)
    assert compare(te, second).equal and compare(hf, second).equal


def test_what_is_not_said_is_the_default_of_transformers(hf):
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    plain = {name: hf.config[name] for name in (*kept, "num_key_value_heads", "pad_token_id", "initializer_range")}
    second = Checkpoint("b", {**plain, "max_position_embeddings": 64}, hf.source)
    assert compare(hf, second).equal
    del second.config["num_key_value_heads"]
    assert compare(hf, second).config == (ConfigDifference("num_key_value_heads", 2, 4),)


def test_the_names_that_old_configurations_use_for_rope(hf):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    new = changed(hf, rope_parameters={**scaling, "rope_type": "llama3", "rope_theta": 5e5})
    old = changed(hf, rope_theta=5e5, rope_scaling={**scaling, "type": "llama3"})
    del old.config["rope_parameters"]
    before = json.dumps(old.config)
    assert compare(new, old).equal
    assert json.dumps(old.config) == before
    old.config["rope_scaling"]["factor"] = 4.0
    assert compare(new, old).config == (ConfigDifference("rope_parameters.factor", 8.0, 4.0),)


def test_a_saved_configuration_says_the_same(opened, tiny_llama, tmp_path):
    """The file has a string in the place of a plain Llama's integer."""
    model = tiny_llama(pretraining_tp=2)
    convert_llama_hf_to_te(model).save_pretrained(tmp_path)
    assert isinstance(json.loads((tmp_path / "config.json").read_text())["hidden_act"], str)
    assert compare(opened(tmp_path), in_memory(model)).equal
    comparison = compare(opened(tmp_path), in_memory(tiny_llama()))
    assert comparison.config == (ConfigDifference("pretraining_tp", 2, 1),)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, r"configuration of elsewhere cannot be used: model_type='gpt2' is not known"),
        ({"hidden_size": "64"}, r"configuration of elsewhere cannot be used: .*hidden_size.* Correct its config.json"),
        ({"num_attention_heads": 0}, r"configuration of elsewhere cannot be used"),
    ],
    ids=str,
)
def test_a_configuration_of_something_else_is_an_error(hf, fields, message):
    with pytest.raises(CheckpointError, match=message):
        compare(hf, changed(hf, **fields))
    with pytest.raises(CheckpointError, match=message):
        compare(changed(hf, **fields), hf)


def test_a_checkpoint_that_contradicts_itself_is_an_error(hf, te):
    with pytest.raises(
        CheckpointError, match=rf"elsewhere: {QKV} \[100, 64\] cannot become model.*100 rows of queries"
    ):
        compare(hf, changed(te, {QKV: torch.ones(100, 64)}))
    with pytest.raises(CheckpointError, match=rf"elsewhere has {Q_PROJ} twice: .* Remove one"):
        compare(hf, changed(te, {Q_PROJ: torch.ones(64, 64)}))


@pytest.mark.parametrize("tolerance", [None, -1.0, math.nan, math.inf], ids=str)
def test_a_tolerance_that_is_none_is_an_error(hf, tolerance):
    tolerances = {} if tolerance is None else {torch.float32: tolerance}
    with pytest.raises(
        CheckpointError, match=rf"the tolerance for float32 is {tolerance}, but must be a number from 0"
    ):
        compare(hf, changed(hf), tolerances=tolerances)


def test_a_file_that_shrinks_is_an_error(opened, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    a, b = opened(tmp_path), opened(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened_file:
        opened_file.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"ends within .*: the file is not complete"):
        compare(a, b)


# --- a real checkpoint ------------------------------------------------------------------------------------------------


def test_a_real_checkpoint(opened, smollm2, smollm2_te):
    hf, te = in_memory(smollm2), opened(smollm2_te)
    comparison = compare(hf, te)
    assert comparison.equal and comparison.tensors == 272 and comparison.bytes == 4 * 134_515_008
    hf.source.held["model.layers.29.mlp.up_proj.weight"] = tensor = smollm2.model.layers[29].mlp.up_proj.weight.clone()
    tensor.detach()[1535, 575] += 0.5
    (difference,) = compare(hf, te).differences
    assert (difference.name, difference.values.index) == ("model.layers.29.mlp.up_proj.weight", (1535, 575))


def test_results_are_frozen(hf, te):
    comparison = compare(hf, te)
    with pytest.raises(dataclasses.FrozenInstanceError):
        comparison.tensors = 0
