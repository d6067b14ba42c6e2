"""GGUF files: the reader returns the values of transformers' own loader, a few rows at a time."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_te_convert.errors import CheckpointError
from llama_te_convert.sources.gguf import GGUFSource, gguf_config, save_gguf_tokenizer
from llama_te_convert.sources.torch_tensors import read_tensor

F32, F16, BF16 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16"))
Q8_0, Q4_1 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
# The ranges do not end at heads or blocks.
RANGES = ((0, 1), (5, 6), (3, 29), (15, 17), (0, 32), (31, 32), (7, 7), (63, 64), (9, 64))


def permuted(weight, heads):
    """The rows in llama.cpp's order, which alternates between the two halves of a head."""
    first, second = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(0, 1)
    return np.stack([first, second], axis=2).reshape(weight.shape)


def write(path, tensors, *, architecture="llama", heads=4, kv_heads=2, fields=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    if isinstance(heads, list):
        writer.add_array(f"{architecture}.attention.head_count", heads)
    else:
        writer.add_head_count(heads)
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    for key, value in fields:
        writer.add_uint16(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, (values, quantization) in tensors.items():
        data = gguf.quants.quantize(values, quantization) if quantization != "I8" else values.astype(np.int8)
        writer.add_tensor(name, data, raw_dtype=None if quantization in (F32, F16, "I8") else quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_tensors(matrices=Q8_0, *, kv_heads=2):
    """A Llama with one layer: the value and type of each tensor, by its name in the file."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (64, 64),
        "blk.0.attn_norm": (64,),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (16 * kv_heads, 64),
        "blk.0.attn_v": (16 * kv_heads, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
        "output_norm": (64,),
        "output": (64, 64),
    }
    values = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: (value, F32 if value.ndim == 1 else matrices) for name, value in values.items()}


def assert_same(path, expected):
    with closing(GGUFSource(path)) as source:
        assert_same_tensors(source, expected)


def assert_same_tensors(source, expected):
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        info = source.tensors[name]
        assert (info.dtype, info.shape) == ("float32", tuple(tensor.shape)), name
        assert torch.equal(read_tensor(source, name, 0, info.rows), tensor), name
        for start, stop in RANGES:
            if stop <= info.rows:
                part = read_tensor(source, name, start, stop)
                assert part.is_contiguous() and part.dtype == torch.float32
                assert torch.equal(part, tensor[start:stop]), (name, start, stop)


def loaded(path):
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def test_smollm2_is_as_transformers_loads_it(smollm2_file, smollm2):
    expected = {name: tensor for name, tensor in smollm2.state_dict().items() if name != "lm_head.weight"}
    assert_same(smollm2_file, expected)


def test_rows_are_read_without_the_rest(smollm2_file, smollm2, monkeypatch):
    dequantized = []

    def dequantize(data, quantization, original=gguf.dequantize):
        dequantized.append(len(data))
        return original(data, quantization)

    source = GGUFSource(smollm2_file)
    monkeypatch.setattr(gguf, "dequantize", dequantize)
    read_tensor(source, "model.embed_tokens.weight", 40000, 40003)
    read_tensor(source, "model.layers.3.self_attn.q_proj.weight", 70, 130)  # in two heads of 64 rows
    source.close()
    assert dequantized[0] == 3
    assert dequantized[1] <= 128


@pytest.mark.parametrize("matrices", [F16, BF16, Q8_0, Q4_1], ids=lambda each: each.name)
def test_types_are_as_transformers_loads_them(tmp_path, matrices):
    path = write(tmp_path / "tiny.gguf", tiny_tensors(matrices))
    expected = loaded(path)
    assert "lm_head.weight" in expected
    assert_same(path, expected)


def test_order_of_query_and_key_rows_is_undone(tmp_path):
    tensors = tiny_tensors(F32)
    original = {name: torch.from_numpy(values) for name, (values, _) in tensors.items()}
    for name, heads in (("blk.0.attn_q.weight", 4), ("blk.0.attn_k.weight", 2)):
        tensors[name] = (permuted(tensors[name][0], heads), F32)
    with closing(GGUFSource(write(tmp_path / "tiny.gguf", tensors))) as source:
        for name, key in (("q", "blk.0.attn_q.weight"), ("k", "blk.0.attn_k.weight"), ("v", "blk.0.attn_v.weight")):
            hf_name = f"model.layers.0.self_attn.{name}_proj.weight"
            rows = source.tensors[hf_name].rows
            assert torch.equal(read_tensor(source, hf_name, 0, rows), original[key])
            for start in range(rows):
                for stop in range(start, rows + 1, 7):
                    assert torch.equal(read_tensor(source, hf_name, start, stop), original[key][start:stop])


def test_no_kv_heads_means_as_many_as_heads(tmp_path):
    tensors = tiny_tensors(F32, kv_heads=4)
    key = tensors["blk.0.attn_k.weight"][0]
    tensors["blk.0.attn_k.weight"] = (permuted(key, 4), F32)
    path = write(tmp_path / "tiny.gguf", tensors, kv_heads=None)
    with closing(GGUFSource(path)) as source:
        rows = read_tensor(source, "model.layers.0.self_attn.k_proj.weight", 0, 64)
    assert torch.equal(rows, torch.from_numpy(key))
    assert gguf_config(path)["num_key_value_heads"] == 4


def test_no_output_means_tied(tmp_path):
    tensors = tiny_tensors()
    assert gguf_config(write(tmp_path / "untied.gguf", tensors))["tie_word_embeddings"] is False
    del tensors["output.weight"]
    path = write(tmp_path / "tied.gguf", tensors)
    assert gguf_config(path)["tie_word_embeddings"] is True
    assert_same(path, loaded(path))


def test_config_is_as_transformers_reads_it(smollm2_file, smollm2):
    config = gguf_config(smollm2_file)
    json.dumps(config)
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert str(smollm2_file.parent) not in json.dumps(config)
    expected = smollm2.config.to_dict()
    of_a_loaded_model = {"architectures", "dtype", "_name_or_path", "quantization_config"}
    for name in LlamaConfig().to_dict().keys() - of_a_loaded_model:
        assert config[name] == expected[name], name
    assert config["rope_parameters"]["rope_theta"] == smollm2.config.rope_parameters["rope_theta"] == 100000.0


def test_tokenizer_is_the_same(smollm2_file, smollm2_tokenizer, tmp_path):
    save_gguf_tokenizer(smollm2_file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello, world!", " two  spaces\n\ttabs", "naïve café 漢字 🙂", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer(text)["input_ids"] == smollm2_tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == smollm2_tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (
        smollm2_tokenizer.eos_token_id,
        smollm2_tokenizer.bos_token_id,
    )


def rope_factors(factor):
    """The factors between plain frequencies and those of Llama 3.1, computed with transformers."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    return rope, (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_of_llama_3_is_kept(tmp_path, factor):
    rope, factors = rope_factors(factor)
    path = write(tmp_path / "tiny.gguf", {"rope_freqs.weight": (factors, F32), **tiny_tensors()})
    assert gguf_config(path)["rope_parameters"] == {**rope, "factor": pytest.approx(factor, rel=1e-6)}
    assert_same(path, loaded(path))  # transformers leaves out rope_freqs.weight as well


def test_rope_factors_of_one_are_no_scaling(tmp_path):
    path = write(tmp_path / "tiny.gguf", {"rope_freqs.weight": (np.ones(8, np.float32), F32), **tiny_tensors()})
    assert gguf_config(path)["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}


def test_other_rope_scaling_is_refused(tmp_path):
    _, factors = rope_factors(8.0)
    factors[4] *= 1.05
    path = write(tmp_path / "factors.gguf", {"rope_freqs.weight": (factors, F32), **tiny_tensors()})
    with pytest.raises(CheckpointError, match="factors.gguf: its rope_freqs.weight scales .* in another way"):
        gguf_config(path)
    path = write(tmp_path / "yarn.gguf", tiny_tensors(), fields=[("llama.rope.scaling.type", "yarn")])
    with pytest.raises(CheckpointError, match="yarn.gguf scales rotary frequencies by the method 'yarn'"):
        gguf_config(path)


def test_unknown_tensors_are_named(tmp_path):
    bias = {"blk.0.attn_q.bias": (np.ones(64, np.float32), F32), "cls.weight": (np.ones((2, 64), np.float32), F32)}
    path = write(tmp_path / "tiny.gguf", {**tiny_tensors(), **bias})
    with pytest.raises(CheckpointError, match="does not have: blk.0.attn_q.bias, cls.weight. Mixtures"):
        GGUFSource(path)
    many = {f"extra.{number}.weight": (np.ones(4, np.float32), F32) for number in range(10)}
    with pytest.raises(CheckpointError, match="extra.7.weight and 2 more"):
        GGUFSource(write(tmp_path / "many.gguf", many))


@pytest.mark.parametrize("function", [GGUFSource, gguf_config])
def test_other_architectures_are_refused(tmp_path, function):
    path = write(tmp_path / "tiny.gguf", {}, architecture="gemma")
    with pytest.raises(CheckpointError, match="tiny.gguf has the architecture 'gemma': only 'llama'"):
        function(path)


def test_what_transformers_takes_for_another_model_is_refused(smollm2_file, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: LlamaConfig(model_type="mistral"))
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda _: {"model_type": "mistral"})
    with pytest.raises(CheckpointError, match="transformers reads it as a 'mistral' model"):
        gguf_config(smollm2_file)


def test_types_that_cannot_be_dequantized_are_refused(tmp_path):
    tensors = {**tiny_tensors(), "output.weight": (np.ones((64, 64)), "I8")}
    with pytest.raises(CheckpointError, match="output.weight has the type I8, which the package gguf cannot"):
        GGUFSource(write(tmp_path / "tiny.gguf", tensors))


@pytest.mark.parametrize(
    ("heads", "message"),
    [([4, 4], r"its llama.attention.head_count is \[4, 4\]"), (5, r"attn_q.weight \[64, 64\] does not .* of 5 heads")],
)
def test_heads_must_fit(tmp_path, heads, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(write(tmp_path / "tiny.gguf", tiny_tensors(), heads=heads))


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "tiny.gguf", tiny_tensors()).read_bytes()
    with closing(GGUFSource(tmp_path / "tiny.gguf")) as source:
        assert source.tensors
    for length in (0, 3, 20, 300, len(whole) // 2, len(whole) - 5000):
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=f"{length}.gguf is not a GGUF file, or it is damaged or not complete"
        ):
            GGUFSource(path)
    (tmp_path / "other.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1" * 9)
    with pytest.raises(CheckpointError, match="other.gguf is not a GGUF file"):
        gguf_config(tmp_path / "other.gguf")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="none.gguf cannot be read: No such file"):
        GGUFSource(tmp_path / "none.gguf")


def test_file_that_loses_its_end(tmp_path):
    path = write(tmp_path / "tiny.gguf", tiny_tensors())
    source = GGUFSource(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="tiny.gguf ends within lm_head.weight: the file is not complete"):
        read_tensor(source, "lm_head.weight", 0, 64)
    source.close()


def test_file_that_cannot_be_read_any_more(tmp_path, monkeypatch):
    def preadv(*_):
        raise OSError(5, "Input/output error")

    with closing(GGUFSource(write(tmp_path / "tiny.gguf", tiny_tensors()))) as source:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError, match="tiny.gguf cannot be read: Input/output error"):
            read_tensor(source, "model.norm.weight", 0, 1)


def test_threads_read_at_the_same_time(tmp_path):
    path = write(tmp_path / "tiny.gguf", tiny_tensors())
    expected = loaded(path)
    with closing(GGUFSource(path)) as source, ThreadPoolExecutor(4) as pool:
        assert source.concurrent
        for _ in range(5):
            read = pool.map(lambda name: read_tensor(source, name, 0, source.tensors[name].rows), expected)
            for name, tensor in zip(expected, read, strict=True):
                assert torch.equal(tensor, expected[name]), name


def test_one_of_several_files_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", tiny_tensors(), fields=[("split.count", 1)])
    assert gguf_config(path)["num_hidden_layers"] == 1
    path = write(tmp_path / "tiny-00001-of-00003.gguf", tiny_tensors(), fields=[("split.count", 3)])
    with pytest.raises(CheckpointError, match="is one of 3 files: merge them first, with llama-gguf-split"):
        GGUFSource(path)


def test_architecture_that_is_no_text(tmp_path):
    path = write(tmp_path / "tiny.gguf", tiny_tensors())
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0\xff\xff\xff\xff\xff"))
    with pytest.raises(CheckpointError, match="tiny.gguf is not a GGUF file, or it is damaged"):
        GGUFSource(path)


def test_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="big.gguf has another byte order"):
        GGUFSource(tmp_path / "big.gguf")


def test_missing_package(smollm2_file, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (lambda: GGUFSource(smollm2_file), lambda: gguf_config(smollm2_file)):
        with pytest.raises(CheckpointError, match="pip install gguf"):
            call()
    with pytest.raises(CheckpointError, match="pip install gguf"):
        save_gguf_tokenizer(smollm2_file, tmp_path)


def test_file_without_tokenizer(tmp_path):
    path = write(tmp_path / "tiny.gguf", tiny_tensors())
    with pytest.raises(CheckpointError, match="tiny.gguf: transformers cannot make a tokenizer from it"):
        save_gguf_tokenizer(path, tmp_path / "tokenizer")


def test_file_without_what_transformers_needs(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("model_type")

    path = write(tmp_path / "tiny.gguf", tiny_tensors())
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match="tiny.gguf: transformers cannot make a configuration from it"):
        gguf_config(path)
