"""Which files of a folder are read, compared with transformers, which reads the same folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from llama_te_convert import convert_checkpoint, convert_llama_hf_to_te
from llama_te_convert.cli import main
from llama_te_convert.errors import CheckpointError, CheckpointWarning
from llama_te_convert.sources.checkpoint import find_checkpoint, open_checkpoint
from llama_te_convert.sources.torch_tensors import read_tensor
from llama_te_core.train.setup import checkpoint_weights

SHARD = "40KB"


def save_bin(model: PreTrainedModel, folder: Path, *, shards: int = 1) -> None:
    """Save `.bin` files, which transformers does not write any more."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    file_of = {name: f"pytorch_model-{at % shards}.bin" for at, name in enumerate(tensors)}
    for file in set(file_of.values()):
        torch.save({name: value for name, value in tensors.items() if file_of[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def beside(folder: Path, model: PreTrainedModel, **options: Any) -> None:
    """Save a model into a folder without removing other files there, as a copy of a save does."""
    model.save_pretrained(folder / "new", **options)
    shutil.copytree(folder / "new", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "new")


def single_over_shards(folder: Path, old: PreTrainedModel, new: PreTrainedModel) -> dict[str, Any]:
    old.save_pretrained(folder, max_shard_size=SHARD)
    beside(folder, new)
    return {}


def single_over_an_index_whose_shards_are_gone(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    single_over_shards(folder, old, new)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    return {}


def shards_over_a_single_file(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    old.save_pretrained(folder)
    beside(folder, new, max_shard_size=SHARD)
    return {}


def safetensors_and_bin(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    save_bin(old, folder)
    new.save_pretrained(folder, max_shard_size=SHARD)
    return {}


def bin_and_index_of_bin(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    new.config.save_pretrained(folder)
    save_bin(old, folder, shards=2)
    save_bin(new, folder)
    return {}


def a_variant_that_is_not_asked_for(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    new.save_pretrained(folder)
    beside(folder, old, variant="fp16")
    return {}


def a_variant_that_is_asked_for(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    old.save_pretrained(folder)
    beside(folder, new, variant="fp16", max_shard_size=SHARD)
    return {"variant": "fp16"}


def a_subfolder(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    old.save_pretrained(folder)
    new.save_pretrained(folder / "inner")
    return {"subfolder": "inner"}


def a_file_that_the_configuration_names(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    new.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    beside(folder, old)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "weights.safetensors"}))
    return {}


def an_index_that_leaves_out_a_tensor(folder: Path, old: Any, new: Any) -> dict[str, Any]:
    new.save_pretrained(folder, max_shard_size=SHARD)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    return {}


FOLDERS = [
    (single_over_shards, "model.safetensors is read"),
    (single_over_an_index_whose_shards_are_gone, "model.safetensors.index.json is left out"),
    (shards_over_a_single_file, "is left out"),
    (safetensors_and_bin, "pytorch_model.bin is left out"),
    (bin_and_index_of_bin, "pytorch_model.bin.index.json is left out"),
    (a_variant_that_is_not_asked_for, "model.fp16.safetensors is left out"),
    (a_variant_that_is_asked_for, "model.safetensors is left out"),
    (a_subfolder, None),
    (a_file_that_the_configuration_names, "model.safetensors is left out"),
    (an_index_that_leaves_out_a_tensor, None),
]


@pytest.fixture
def models(tiny_llama: Callable[..., PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An older and a newer model of the same sizes."""
    return tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1, seed=1)


@pytest.mark.parametrize(("make", "warning"), FOLDERS, ids=[make.__name__ for make, _ in FOLDERS])
def test_the_same_weights_as_in_transformers(make: Any, warning: str | None, models: Any, tmp_path: Path) -> None:
    options = make(tmp_path, *models)
    oracle = LlamaForCausalLM.from_pretrained(tmp_path, **options).state_dict()
    path = find_checkpoint(str(tmp_path), subfolder=options.get("subfolder", ""))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = open_checkpoint(path, variant=options.get("variant"), allow_pickle=True)
    with contextlib.closing(opened.source) as source:
        assert source.tensors.keys() == oracle.keys()
        for name, info in source.tensors.items():
            assert torch.equal(read_tensor(source, name, 0, info.rows), oracle[name]), name
    messages = [str(each.message) for each in caught if each.category is CheckpointWarning]
    assert len(messages) == (warning is not None)
    assert warning is None or warning in messages[0]


def test_a_conversion_takes_the_newer_weights(models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, te = tmp_path / "hf", tmp_path / "te"
    single_over_shards(folder, *models)
    capsys.readouterr()
    assert main(["to-te", str(folder), str(te)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"llama-te-convert: warning: {folder} has more weights than one model")
    converted = load_file(te / "model.safetensors")
    assert torch.equal(converted["lm_head.weight"], models[1].lm_head.weight)
    assert sorted(path.name for path in te.glob("model*")) == ["model.safetensors"]


def test_training_starts_from_the_newer_weights(models: Any, tmp_path: Path) -> None:
    single_over_shards(tmp_path, *(convert_llama_hf_to_te(model) for model in models))
    head = models[1].lm_head.weight
    assert torch.equal(checkpoint_weights(tmp_path)("lm_head.weight", head), head)


def test_a_variant_is_converted(models: Any, tmp_path: Path) -> None:
    folder, te = tmp_path / "hf", tmp_path / "te"
    models[0].save_pretrained(folder, variant="fp16")
    with pytest.raises(CheckpointError, match=r"no weights without a variant, but of 'fp16': name one with --variant"):
        convert_checkpoint(str(folder), te, to_te=True)
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'fp8', but of 'fp16'"):
        convert_checkpoint(str(folder), te, to_te=True, variant="fp8")
    convert_checkpoint(str(folder), te, to_te=True, variant="fp16")
    assert torch.equal(load_file(te / "model.safetensors")["lm_head.weight"], models[0].lm_head.weight)


def test_a_tensor_in_two_shards_is_refused(models: Any, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path, max_shard_size=SHARD)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    tensors = load_file(shards[1])
    save_file({**tensors, **dict(list(load_file(shards[0]).items())[:1])}, shards[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"which another file of the checkpoint has too"):
        open_checkpoint(tmp_path)


def test_what_has_no_effect_is_refused(models: Any, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path / "hf")
    for options, message in (
        ({"revision": "main"}, r"revision='main' has no effect"),
        ({"subfolder": "inner"}, r"has no folder 'inner'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(str(tmp_path / "hf"), tmp_path / "te", to_te=True, **options)


def test_an_adapter_beside_the_model_is_refused(models: Any, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter .* beside the model, and transformers loads both"):
        convert_checkpoint(str(tmp_path / "hf"), tmp_path / "te", to_te=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter of PEFT, without a model: .* adapter-to-te"):
        convert_checkpoint(str(tmp_path / "adapter"), tmp_path / "te", to_te=True)


def test_shards_that_transformers_reads_before_all_else_are_refused(models: Any, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"save_pretrained\(distributed_checkpoint=True\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model-00001-of-00002.bin"], r"pickle files .* say --allow-pickle"),
        (["model-Q4_K_M.gguf"], r"has GGUF files, such as model-Q4_K_M.gguf: download one of them"),
        (["adapter_config.json", "adapter_model.bin"], r"is an adapter of PEFT"),
        (["config.json"], r"has no tensors"),
    ],
)
def test_a_hub_repository_without_safetensors(files: list[str], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *arguments, **options: files)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint("owner/name", tmp_path / "te", to_te=True)


def test_the_options_reach_the_hub(models: Any, tmp_path: Path, monkeypatch) -> None:
    models[0].save_pretrained(tmp_path / "repository" / "inner")
    calls = []

    def download(*arguments: Any, **options: Any) -> str:
        calls.append((arguments, options))
        return str(tmp_path / "repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert_checkpoint("owner/name", tmp_path / "te", to_te=True, revision="v1", subfolder="inner")
    ((arguments, options),) = calls
    assert (arguments, options["revision"]) == (("owner/name",), "v1")
    assert "inner/*.safetensors" in options["allow_patterns"]
    assert torch.equal(load_file(tmp_path / "te" / "model.safetensors")["lm_head.weight"], models[0].lm_head.weight)


@pytest.mark.parametrize(
    "content", ["[", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}', "[" * 9999]
)
def test_training_refuses_a_bad_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.checkpoint: .*model\.safetensors\.index\.json"):
        checkpoint_weights(tmp_path)
