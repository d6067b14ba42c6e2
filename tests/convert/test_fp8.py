"""FP8 export: weights that were FP8 come back bit for bit, others are rounded; names and configuration."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_te_convert.errors import CheckpointError
from llama_te_convert.layout.row_ranges import ConvertedTensor, RowRange, converted_tensors
from llama_te_convert.layout.tensor_info import TensorInfo
from llama_te_convert.sources import tensor_source
from llama_te_convert.sources.torch_tensors import as_bytes, as_tensor, info_of
from llama_te_convert.targets.fp8 import fp8_quantization_config, fp8_streams
from llama_te_convert.targets.fp8_scale import exact_scale, quantize

FP8 = torch.float8_e4m3fn
ALL_FP8 = torch.arange(256, dtype=torch.uint8).view(FP8)
FINITE = ALL_FP8[~ALL_FP8.float().isnan()]  # both zeros among them
LAYER = "model.layers.0."
NAMES = {
    "q": f"{LAYER}self_attn.q_proj.weight",
    "k": f"{LAYER}self_attn.k_proj.weight",
    "v": f"{LAYER}self_attn.v_proj.weight",
    "o": f"{LAYER}self_attn.o_proj.weight",
    "gate": f"{LAYER}mlp.gate_proj.weight",
    "up": f"{LAYER}mlp.up_proj.weight",
    "down": f"{LAYER}mlp.down_proj.weight",
}

scales = st.one_of(
    st.floats(2.0**-90, 2.0**90, width=32),
    st.floats(2.0**-14, 2.0, width=32),
    st.integers(-90, 90).map(lambda power: 2.0**power),
)


class Memory:
    """Tensors in memory, which counts what is read of them and hands out one buffer, as a file does."""

    concurrent = False

    def __init__(self, tensors):
        self.held = tensors
        self.tensors = {name: info_of(tensor) for name, tensor in tensors.items()}
        self.reads = []
        self._buffers = {}

    def read(self, name, start, stop):
        self.reads.append((name, start, stop))
        rows = self.held[name][start:stop]
        if (last := self._buffers.get(threading.get_ident())) is not None:
            last.fill_(float("nan"))
        self._buffers[threading.get_ident()] = rows.clone()
        return as_bytes(self._buffers[threading.get_ident()])

    def close(self):
        pass


def plain(source):
    """Targets that are the source's tensors."""
    return [ConvertedTensor(name, info, (RowRange(name, 0, info.rows),)) for name, info in source.tensors.items()]


def tensor_of(chunks, info):
    return as_tensor(memoryview(bytearray(b"".join(chunks))), info.dtype).view(info.shape)


def export(tensors):
    """Tensors by name as they would be written."""
    source = Memory(tensors)
    made = {}
    for output in fp8_streams(plain(source), source):
        made[output.name] = tensor_of(output.chunks(), output.info)
    return made


def dequantized(made, name, dtype=torch.bfloat16):
    return (made[name].float() * made[f"{name}_scale"]).to(dtype)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32}[expected.dtype.itemsize]
    assert torch.equal(actual.view(bits), expected.view(bits))


def random_fp8(shape, seed=0, among=FINITE):
    generator = torch.Generator().manual_seed(seed)
    return among[torch.randint(0, len(among), shape, generator=generator)].float()


def ordinary(shape, seed=0, std=0.02):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).bfloat16()


class TestBitForBit:
    @settings(deadline=None, max_examples=150)
    @given(
        scale=scales,
        numbers=st.lists(st.integers(0, len(FINITE) - 1), min_size=1, max_size=60),
        dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    )
    def test_any_weights_made_of_fp8(self, scale, numbers, dtype):
        weight = (FINITE[numbers].float() * scale).to(dtype).view(1, -1)
        made = export({NAMES["o"]: weight})
        assert made[NAMES["o"]].dtype == FP8
        assert_same_bits(dequantized(made, NAMES["o"], dtype), weight)

    @settings(deadline=None, max_examples=25)
    @given(scale=scales, seed=st.integers(0, 2**16))
    def test_a_group_has_one_scale(self, scale, seed):
        """As TE has them: one tensor of queries, keys and values, and one of gate and up, with a scale each."""
        group = {name: (random_fp8((6, 8), seed + i) * scale).bfloat16() for i, name in enumerate(NAMES.values())}
        # One of them has small numbers only, and one has none.
        group[NAMES["k"]] = (random_fp8((2, 8), seed, among=FINITE[:6]) * scale).bfloat16()
        group[NAMES["v"]] = torch.zeros(2, 8, dtype=torch.bfloat16)
        made = export(group)
        for name, weight in group.items():
            assert_same_bits(dequantized(made, name), weight)
        assert made[f"{NAMES['q']}_scale"] == made[f"{NAMES['k']}_scale"] == made[f"{NAMES['v']}_scale"]
        assert made[f"{NAMES['gate']}_scale"] == made[f"{NAMES['up']}_scale"]

    @pytest.mark.parametrize("power", [-20, -3, 0, 5])
    def test_powers_of_two_are_found(self, power):
        weight = (random_fp8((64, 64)) * 2.0**power).bfloat16()
        made = export({NAMES["o"]: weight})
        assert made[f"{NAMES['o']}_scale"].item() == 2.0**power
        assert_same_bits(made[NAMES["o"]].float(), random_fp8((64, 64)))

    def test_every_fp8_number_with_many_scales(self):
        magnitudes = ALL_FP8[1:127].float()
        generator = torch.Generator().manual_seed(0)
        for scale in torch.empty(300).uniform_(1e-5, 1e-2, generator=generator):
            wanted = (magnitudes * scale).bfloat16().float().unique()
            found = exact_scale(wanted, torch.bfloat16)
            assert found is not None
            assert torch.equal((quantize(wanted, found).float() * found).bfloat16().float(), wanted)

    def test_weights_that_do_not_reach_the_largest_number(self):
        """A scale from before, as delayed scaling has it, leaves the top of the range unused."""
        for top in range(8, 127):
            weight = (random_fp8((16, 16), among=ALL_FP8[: top + 1]) * 0.0123).bfloat16()
            assert_same_bits(dequantized(export({NAMES["down"]: weight}), NAMES["down"]), weight)

    def test_zeros(self):
        weight = torch.zeros(4, 8, dtype=torch.bfloat16)
        weight[1] = -0.0
        made = export({NAMES["q"]: weight, NAMES["k"]: weight, NAMES["v"]: weight, NAMES["o"]: weight})
        for key in "qkvo":
            assert_same_bits(dequantized(made, NAMES[key]), weight)
            assert made[f"{NAMES[key]}_scale"].item() == 1.0

    def test_an_empty_weight(self):
        made = export({NAMES["o"]: torch.empty(3, 0, dtype=torch.bfloat16)})
        assert made[NAMES["o"]].shape == (3, 0)

    def test_groups_that_were_quantized_apart(self):
        group = {NAMES[key]: (random_fp8((8, 8), i) * (0.01 + 0.0037 * i)).bfloat16() for i, key in enumerate("qkv")}
        made = export(group)
        assert len({made[f"{name}_scale"].item() for name in group}) == 3
        for name, weight in group.items():
            assert_same_bits(dequantized(made, name), weight)


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
    def test_ordinary_weights_are_within_the_rounding_of_e4m3(self, dtype):
        weight = (torch.randn(96, 80, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        made = export({NAMES["o"]: weight})
        scale = made[f"{NAMES['o']}_scale"].item()
        assert scale == pytest.approx(weight.abs().max().item() / 448, rel=1e-6)
        error = (made[NAMES["o"]].double() * scale - weight.double()).abs()
        # Half the distance to the next number: of 3 bits of mantissa, and below 2**-6 of 2**-9.
        assert (error <= torch.maximum(weight.double().abs() / 16, torch.tensor(scale * 2.0**-10)) * (1 + 1e-6)).all()
        assert (error > 0).any()

    def test_few_values_that_no_scale_makes(self):
        weight = torch.tensor([[1.0, 1.0078125, 1.015625, 448.0]], dtype=torch.bfloat16)
        assert exact_scale(weight[0].float(), torch.bfloat16) is None
        made = export({NAMES["o"]: weight})
        assert made[f"{NAMES['o']}_scale"].item() == 1.0
        assert made[NAMES["o"]].tolist() == [[1.0, 1.0, 1.0, 448.0]]

    def test_a_group_is_rounded_with_one_scale(self):
        """An engine that fuses them would otherwise round a second time, to the largest scale."""
        group = {NAMES[key]: ordinary((8, 64), i, 0.01 * (i + 1)) for i, key in enumerate(("q", "k", "gate", "up"))}
        # Zeros come back with any scale, and must not bring a large one of their own.
        group[NAMES["v"]] = torch.zeros(2, 64, dtype=torch.bfloat16)
        made = export(group)
        for keys in (("q", "k", "v"), ("gate", "up")):
            largest = max(group[NAMES[key]].abs().max().item() for key in keys)
            assert [made[f"{NAMES[key]}_scale"].item() for key in keys] == pytest.approx([largest / 448] * len(keys))

    def test_numbers_next_to_nothing(self):
        weight = torch.full((2, 2), 1e-40, dtype=torch.bfloat16)
        weight[0, 0] = 1.3e-40
        made = export({NAMES["o"]: weight})
        assert made[f"{NAMES['o']}_scale"].item() >= torch.finfo(torch.float32).tiny
        assert dequantized(made, NAMES["o"]).isfinite().all()


class TestOutputs:
    def test_names_dtypes_and_shapes(self, tiny_llama):
        model = tiny_llama(num_hidden_layers=2).bfloat16()
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        source = Memory(tensors)
        made = {output.name: output.info for output in fp8_streams(plain(source), source)}
        linear = {name for name in tensors if "_proj" in name}
        assert len(linear) == 2 * 7
        assert made.keys() == tensors.keys() | {f"{name}_scale" for name in linear}
        assert f"{LAYER}self_attn.q_proj.weight_scale" in made
        for name, info in made.items():
            if name.endswith("_scale"):
                assert info == TensorInfo("float32", (1,))
            else:
                assert info == TensorInfo("float8_e4m3fn" if name in linear else "bfloat16", tuple(tensors[name].shape))
        exported = export(tensors)
        for name in tensors.keys() - linear:
            assert torch.equal(exported[name], tensors[name])

    def test_from_the_other_layout_in_chunks(self, monkeypatch):
        """Rows of a TE tensor become three weights; chunks of a few rows, each in a buffer that is used again."""
        monkeypatch.setattr(tensor_source, "CHUNK_BYTES", 3 * 16 * 2)
        size, heads, groups = 4, 4, 2
        rows = (heads + 2 * groups) * size
        fused = (random_fp8((rows, 16)) * 0.0777).bfloat16()
        name = f"{LAYER}self_attention.layernorm_qkv.weight"
        source = Memory({name: fused})

        class Sizes:
            num_attention_heads, num_key_value_heads, head_dim = heads, groups, size

        planned = fp8_streams(converted_tensors(source.tensors, Sizes(), to_te=False), source)
        assert source.reads == []
        made = {}
        for output in planned:
            chunks = [bytes(part) for part in output.chunks()]
            made[output.name] = tensor_of(chunks, output.info)
            assert output.name.endswith("_scale") or len(chunks) > 1
        assert all(stop - start <= 3 for _, start, stop in source.reads)
        # Twice in all: the three weights' scale is found once.
        assert sum(stop - start for _, start, stop in source.reads) == 2 * rows
        per_group = fused.view(groups, heads // groups + 2, size, 16)
        for key, expected in (
            ("q", per_group[:, :-2].reshape(-1, 16)),
            ("k", per_group[:, -2].reshape(-1, 16)),
            ("v", per_group[:, -1].reshape(-1, 16)),
        ):
            assert_same_bits(dequantized(made, NAMES[key]), expected)

    def test_threads_share_the_search(self):
        tensors = {NAMES[key]: (random_fp8((8, 8), i) * 0.3).bfloat16() for i, key in enumerate("qkv")}
        source = Memory(tensors)
        planned = [output for output in fp8_streams(plain(source), source) if output.name.endswith("_scale")]
        found = []
        threads = [
            threading.Thread(target=lambda o=output: found.append(as_tensor(next(o.chunks()), o.info.dtype).item()))
            for output in planned
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert len(set(found)) == 1
        assert len(source.reads) == 3

    def test_what_cannot_be_exported_is_named(self):
        for weight in (torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2).to(FP8), torch.ones(4)):
            source = Memory({NAMES["o"]: weight})
            with pytest.raises(
                CheckpointError,
                match=r"o_proj\.weight is (int8|float8_e4m3fn|float32) \[.*\]: only matrices of floating-point",
            ):
                fp8_streams(plain(source), source)
        source = Memory({f"{LAYER}layernorm_mlp.fc2_weight": torch.ones(2, 2)})
        with pytest.raises(
            CheckpointError, match=r"no tensor is a linear weight of a decoder in the Hugging Face layout"
        ):
            fp8_streams(plain(source), source)

    @pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
    def test_numbers_that_are_not_finite_are_an_error(self, number):
        weight = ordinary((4, 4))
        weight[2, 1] = number
        with pytest.raises(CheckpointError, match=r"k_proj\.weight has numbers that are not finite"):
            export({NAMES["q"]: ordinary((4, 4)), NAMES["k"]: weight})


def test_the_configuration():
    config = fp8_quantization_config()
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "float-quantized")
    assert config["ignore"] == ["lm_head", "score", "qa_outputs"]
    (group,) = config["config_groups"].values()
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {**common, "strategy": "tensor", "dynamic": False}
    assert group["input_activations"] == {**common, "strategy": "token", "dynamic": True}
    assert fp8_quantization_config(ignore=["lm_head"])["ignore"] == ["lm_head"]
