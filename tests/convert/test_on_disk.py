"""Conversion on disk: it equals the conversion in memory, is complete or absent, and continues after an interrupt."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from llama_te_convert import CheckpointError, convert_checkpoint, convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import NVLlamaForCausalLM, NVLlamaForSequenceClassification
from llama_te_core.files.folder_lock import lock_beside

SHARD = 40_000  # bytes; a tiny model then has several shards


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A checkpoint of several shards, with a tokenizer, a licence and files that a conversion does not copy."""
    folder = tmp_path / "source"
    tiny_llama(num_hidden_layers=5).bfloat16().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "LICENSE").write_text("yes")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    for left in ("old.bin", "flax_model.msgpack", "modeling.py", ".hidden"):
        (folder / left).write_text("no")
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["causal LM", "sequence classification"])
def test_there_and_back_is_what_memory_gives(tiny_llama, tmp_path: Path, kind: str, tied: bool) -> None:
    classes: dict[str, Any] = {"sequence classification": {"model_class": LlamaForSequenceClassification}}
    model = tiny_llama(tie_word_embeddings=tied, **classes.get(kind, {})).bfloat16()
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    report = convert_checkpoint(str(tmp_path / "hf"), tmp_path / "te", to_te=True, max_shard_bytes=SHARD)
    expected = convert_llama_hf_to_te(model)
    expected.save_pretrained(tmp_path / "expected")
    same(tensors(tmp_path / "te"), tensors(tmp_path / "expected"))
    assert report.tensors == len(tensors(tmp_path / "te"))
    assert report.bytes == sum(x.nbytes for x in tensors(tmp_path / "te").values())
    assert (report.kept_bytes, report.folder) == (0, str(tmp_path / "te"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("te", "expected")]
    assert configs[0] == configs[1]
    te_class = NVLlamaForCausalLM if kind == "causal LM" else NVLlamaForSequenceClassification
    loaded = te_class.from_pretrained(tmp_path / "te")
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name

    convert_checkpoint(str(tmp_path / "te"), tmp_path / "back", to_te=False, max_shard_bytes=SHARD)
    same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    again = AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    assert again == {
        **AutoConfig.from_pretrained(tmp_path / "hf").to_dict(),
        **{k: again[k] for k in ("_name_or_path",) if k in again},
    }
    if kind == "causal LM":
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        ids = torch.arange(3, 20)[None]
        assert torch.equal(back(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits)


def test_what_is_carried_along_and_what_is_not(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(str(source), tmp_path / "te", to_te=True, max_shard_bytes=SHARD)
    names = {name for name in contents(tmp_path / "te") if not name.endswith(".safetensors")}
    assert names == {
        "config.json", "generation_config.json", "llama_te.py", "conversion.json", "checksums.json",
        "model.safetensors.index.json", "tokenizer.json", "LICENSE", "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    convert_checkpoint(str(tmp_path / "te"), tmp_path / "hf", to_te=False)
    names = {name for name in contents(tmp_path / "hf") if not name.endswith(".safetensors")}
    assert names == {
        "config.json", "generation_config.json", "conversion.json", "checksums.json", "tokenizer.json", "LICENSE",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    assert len(list((tmp_path / "te").glob("*.safetensors"))) > 3
    assert max(path.stat().st_size for path in (tmp_path / "te").glob("*.safetensors")) < SHARD + 5000


def test_dtype_and_fields(source: Path, tmp_path: Path) -> None:
    fields = {"attn_input_format": "bshd", "layer_precision": [None, "fp8", "fp8", "fp8", None]}
    convert_checkpoint(
        str(source), tmp_path / "te", to_te=True, dtype=torch.float32, config_changes=fields, max_shard_bytes=SHARD
    )
    exact = convert_llama_hf_to_te(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)).float()
    made = tensors(tmp_path / "te")
    for name, parameter in exact.named_parameters():
        assert torch.equal(made[name], parameter), name
    config = AutoConfig.from_pretrained(tmp_path / "te")
    assert (config.attn_input_format, config.layer_precision, config.dtype) == (
        "bshd",
        fields["layer_precision"],
        torch.float32,
    )


def test_parts_smaller_than_tensors(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(str(source), tmp_path / "whole", to_te=True)
    monkeypatch.setattr("llama_te_convert.sources.tensor_source.CHUNK_BYTES", 700)
    convert_checkpoint(str(source), tmp_path / "parts", to_te=True)
    same(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))


@pytest.mark.parametrize("to_te", [True, False])
def test_distributed_checkpoints_convert_without_a_model(tiny_llama, tmp_path: Path, to_te: bool) -> None:
    """Training saves model and optimizer with torch.distributed.checkpoint; `config.json` lies beside them."""
    hf = tiny_llama().bfloat16()
    te = convert_llama_hf_to_te(hf)
    trained, expected = (hf, te) if to_te else (te, hf)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimizer.step()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_((hf if to_te else te).get_parameter(name))
    state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    trained.config.save_pretrained(tmp_path / "dcp")
    convert_checkpoint(str(tmp_path / "dcp"), tmp_path / "new", to_te=to_te, max_shard_bytes=SHARD)
    reference = convert_llama_hf_to_te(trained) if to_te else convert_llama_te_to_hf(trained)
    made = tensors(tmp_path / "new")
    assert made.keys() == dict(reference.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        assert torch.equal(made[name], parameter), name
    assert not list((tmp_path / "new").glob("*.distcp"))


def test_fp8_for_serving_engines(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    convert_checkpoint(str(tmp_path / "te"), tmp_path / "fp8", to_te=False, fp8=True)
    made, plain = tensors(tmp_path / "fp8"), tensors(source)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert config["model_type"] == "llama"
    quantized = {name for name in plain if name.endswith("_proj.weight")}
    assert made.keys() == plain.keys() | {f"{name}_scale" for name in quantized}
    for name, tensor in plain.items():
        if name not in quantized:
            assert torch.equal(made[name], tensor), name
            continue
        assert (made[name].dtype, made[f"{name}_scale"].shape) == (torch.float8_e4m3fn, (1,))
        dequantized = made[name].float() * made[f"{name}_scale"]
        # Half of the last of 3 bits; below 2^-6 times the scale, half of the smallest number, 2^-9.
        bound = torch.maximum(tensor.float().abs() * 2**-4, made[f"{name}_scale"] * 2**-10) * (1 + 1e-6)
        assert bool(((dequantized - tensor.float()).abs() <= bound).all()), name
    with pytest.raises(CheckpointError, match="quantized by 'compressed-tensors'"):
        convert_checkpoint(str(tmp_path / "fp8"), tmp_path / "again", to_te=True)


# --- errors -----------------------------------------------------------------------------------------------------------


def break_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../../norm.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        everything = tensors(folder)
        change(everything)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def without_layer(layer: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(everything: dict[str, torch.Tensor]) -> None:
        for name in [name for name in everything if name.startswith(f"model.layers.{layer}.")]:
            del everything[name]

    return change


def set_field(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_index, r"'../../norm.safetensors': shards must lie in the folder itself"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), r"cannot be read: No such file"),
        (lambda folder: (folder / "config.json").unlink(), r"config.json cannot be read: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json cannot be used: it is not valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            r"config.json cannot be used: it does not hold a JSON object",
        ),
        (
            set_field(num_attention_heads=8),
            r"cannot become .*qkv.*: 128 rows of queries, keys and values do not fit",
        ),
        (set_field(num_attention_heads=None), r"num_attention_heads=None must be a whole number from 1"),
        (set_field(num_attention_heads="4"), r"num_attention_heads='4' must be a whole number from 1"),
        (set_field(num_hidden_layers=-5), r"num_hidden_layers=-5 must be a whole number from 1 to 1,024"),
        (set_field(rms_norm_eps=-1e-6), r"rms_norm_eps=-1e-06 must be a finite number from 0"),
        (set_field(rms_norm_eps=float("nan")), r"it has the number NaN, which is not finite"),
        (set_field(rope_theta=float("inf")), r"it has the number Infinity, which is not finite"),
        (set_field(num_hidden_layers=4), r"has layers 4, but the configuration has 4 layers"),
        (set_field(num_hidden_layers=6), r"has 6 layers, but layers 5 are missing"),
        (set_field(head_dim=8), r"cannot become .*qkv.*: 128 rows of queries, keys and values do not fit"),
        (set_field(vocab_size=2**31), r"vocab_size=2147483648 must be a whole number from 1 to 2,147,483,647"),
        (set_field(vocab_size=2**30), r"embed_tokens.weight is .*, but the configuration asks for \[1073741824, 64\]"),
        (set_field(model_type="gpt2"), r"gpt2"),
        (set_field(hidden_act="gelu"), r"hidden_act='gelu' is not supported"),
        (
            set_field(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
            r"rope_type='spiral': it must be one of default, linear, ",
        ),
        (set_field(rope_parameters=None, rope_scaling={"type": "su", "factor": 2.0}), r"rope_type='su': it must be"),
    ],
)
def test_a_broken_source_is_refused_before_a_byte_is_written(
    source: Path, tmp_path: Path, damage, message: str
) -> None:
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    assert not list(tmp_path.glob("te*"))


def test_an_option_that_is_wrong_can_be_put_right(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attn_input_format='sbhd' is not known"):
        convert_checkpoint(str(source), tmp_path / "te", to_te=True, config_changes={"attn_input_format": "sbhd"})
    convert_checkpoint(str(source), tmp_path / "te", to_te=True, config_changes={"attn_input_format": "bshd"})
    assert AutoConfig.from_pretrained(tmp_path / "te").attn_input_format == "bshd"


def test_layouts_and_options_that_do_not_go_together(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has the Hugging Face layout already"):
        convert_checkpoint(str(source), tmp_path / "hf", to_te=False)
    convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    with pytest.raises(CheckpointError, match="has the Transformer Engine layout already"):
        convert_checkpoint(str(tmp_path / "te"), tmp_path / "again", to_te=True)
    with pytest.raises(CheckpointError, match="fp8 is a layout of Hugging Face checkpoints"):
        convert_checkpoint(str(source), tmp_path / "fp8", to_te=True, fp8=True)
    with pytest.raises(CheckpointError, match="does not exist, and is not the id of a repository"):
        convert_checkpoint(str(tmp_path / "nothing"), tmp_path / "x", to_te=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no tensors: looked for model.safetensors"):
        convert_checkpoint(str(tmp_path / "empty"), tmp_path / "x", to_te=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, but not a GGUF file"):
        convert_checkpoint(str(tmp_path / "file"), tmp_path / "x", to_te=True)


# --- a target that is there -------------------------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    first = convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "te").iterdir()}
    second = convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    assert (second.kept_bytes, second.bytes) == (first.bytes, first.bytes)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "te").iterdir()}
    other = {"dtype": torch.float32}, {"config_changes": {"attn_input_format": "bshd"}}
    for options in other:
        with pytest.raises(CheckpointError, match="exists and is not the result of this conversion"):
            convert_checkpoint(str(source), tmp_path / "te", to_te=True, **options)
    (source / "tokenizer.json").write_text('{"a": 2, "b": 3}')
    with pytest.raises(CheckpointError, match="exists and is not the result of this conversion"):
        convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "te").iterdir()}


def test_somebody_elses_folder_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "te").mkdir()
    convert_checkpoint(str(source), tmp_path / "te", to_te=True)  # an empty folder is allowed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not the result of this conversion"):
        convert_checkpoint(str(source), tmp_path / "mine", to_te=True)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is the unfinished result of another conversion"):
        convert_checkpoint(str(source), tmp_path / "other", to_te=True)
    assert (tmp_path / "mine" / "file").read_text() == (tmp_path / "other.partial" / "file").read_text() == "mine"


def test_two_at_a_time(source: Path, tmp_path: Path) -> None:
    holder = rf"te is being written by pid {os.getpid()} on host .*: wait for it to end, or name another folder\.$"
    with lock_beside(tmp_path / "te"), pytest.raises(CheckpointError, match=holder):
        convert_checkpoint(str(source), tmp_path / "te", to_te=True)
    convert_checkpoint(str(source), tmp_path / "te", to_te=True)


# --- interruptions ----------------------------------------------------------------------------------------------------


def convert(source: Path, folder: Path) -> None:
    convert_checkpoint(str(source), folder, to_te=True, max_shard_bytes=SHARD)


def test_interrupted_between_parts(source: Path, tmp_path: Path) -> None:
    """A run continues after an exception as after a signal, and writes the unfinished shard again."""
    convert(source, tmp_path / "expected")
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(str(source), tmp_path / "te", to_te=True, max_shard_bytes=SHARD, progress=stop)
    assert not (tmp_path / "te").exists()
    kept = list((tmp_path / "te.partial").glob("*.safetensors"))
    assert kept
    report = convert_checkpoint(str(source), tmp_path / "te", to_te=True, max_shard_bytes=SHARD)
    assert 0 < report.kept_bytes < report.bytes
    assert contents(tmp_path / "te") == contents(tmp_path / "expected")


def test_a_small_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    with pytest.raises(CheckpointError, match=r"needs 0.00 GB more, but its disk has 0.00 GB free"):
        convert(source, tmp_path / "te")
    assert not list((tmp_path / "te.partial").glob("*.safetensors*"))


def test_nothing_is_written_where_nothing_may_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.* cannot be (made|used): .*(is a file|Not a directory)"):
        convert(source, tmp_path / "file" / "te")


def test_the_real_model_from_gguf_there_and_back(
    smollm2: PreTrainedModel, smollm2_file: Path, smollm2_tokenizer: Any, tmp_path: Path
) -> None:
    """From GGUF to the TE layout to the Hugging Face layout: each step has the same tensors and the same text."""
    convert_checkpoint(str(smollm2_file), tmp_path / "te", to_te=True, max_shard_bytes=200_000_000)
    convert_checkpoint(str(tmp_path / "te"), tmp_path / "hf", to_te=False)
    assert len(list((tmp_path / "te").glob("*.safetensors"))) > 1
    te = NVLlamaForCausalLM.from_pretrained(tmp_path / "te")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(hf) is type(smollm2)
    for model in (convert_llama_te_to_hf(te), hf):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, smollm2.get_parameter(name)), name
    texts = []
    for model, folder in ((smollm2, None), (te, "te"), (hf, "hf")):
        tokenizer = smollm2_tokenizer if folder is None else AutoTokenizer.from_pretrained(tmp_path / folder)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert texts[0] == texts[1] == texts[2]
    assert "Paris" in texts[0]


@settings(deadline=None, derandomize=True, database=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(
        st.text(max_size=12)
        | st.sampled_from(["", "\n", "model.", "model.layers.1.", "model.layers.٣.mlp.up_proj.weight", "a/../../b"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    config=st.dictionaries(
        st.sampled_from(
            ["num_attention_heads", "head_dim", "architectures", "model_type", "rope_scaling", "vocab_size"]
        ),
        st.none() | st.integers(-3, 9) | st.text(max_size=3) | st.lists(st.lists(st.text(max_size=2)), max_size=2),
        max_size=2,
    ),
)
def test_fuzzed_checkpoints_end_in_the_documented_error(tmp_path: Path, names: list[str], config: dict) -> None:
    """Tensor names and configuration fields may be anything. Only the target's folder is written."""
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file({name: torch.ones(2, 2) for name in names}, folder / "model.safetensors")
    basic = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 4, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps({**basic, **config}))
    before = {path for path in tmp_path.rglob("*") if "te.partial" not in str(path)}
    with pytest.raises(CheckpointError):
        convert_checkpoint(str(folder), tmp_path / "te", to_te=True)
    assert {path for path in tmp_path.rglob("*") if "te.partial" not in str(path)} == before
