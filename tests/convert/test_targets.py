"""The target folder of each command that writes one: the right result, or a refusal in one line before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llama_te_convert import CheckpointError, convert_adapter, convert_checkpoint, export_te_checkpoint
from llama_te_core.files.folder_lock import lock_beside, removing

Command = Callable[[Path], object]


@pytest.fixture(params=["to-te", "to-hf", "adapter-to-te", "standalone"])
def command(
    request: pytest.FixtureRequest, tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path
) -> tuple[Path, Command]:
    """A source, and a command that converts or exports it to the folder that it is given."""
    hf, te, adapter = tmp_path / "in" / "hf", tmp_path / "in" / "te", tmp_path / "in" / "adapter"
    tiny_llama(num_hidden_layers=1).save_pretrained(hf)
    convert_checkpoint(str(hf), te, to_te=True)
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(hf)}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    commands: dict[str, tuple[Path, Command]] = {
        "to-te": (hf, lambda folder: convert_checkpoint(str(hf), folder, to_te=True)),
        "to-hf": (te, lambda folder: convert_checkpoint(str(te), folder, to_te=False)),
        "adapter-to-te": (adapter, lambda folder: convert_adapter(adapter, folder, to_te=True)),
        "standalone": (te, lambda folder: export_te_checkpoint(te, folder)),
    }
    return commands[request.param]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(run: Command, folder: Path, message: str) -> None:
    """The command ends with a message of one line, and changes nothing."""
    everything = Path.cwd()
    before = contents(everything), sorted(everything.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert (contents(everything), sorted(everything.rglob("*"))) == before


def test_targets_with_a_right_result(
    command: tuple[Path, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = command
    before = contents(source)
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "plain")
    expected = contents(tmp_path / "plain")
    assert expected
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later/te")
    for folder in ("empty", "link", "dangling", "slash/", source / "inside"):
        run(Path(folder))
        assert contents(Path(folder)) == expected, folder
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == expected
    assert contents(tmp_path / "later" / "te") == expected
    assert {name: each for name, each in contents(source).items() if not name.startswith("inside")} == before
    left = [path for path in tmp_path.rglob("*") if path.name.endswith((".lock", ".partial", ".unfinished"))]
    assert left == []


def test_targets_that_are_refused(
    command: tuple[Path, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = command
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "current").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    there = "exists( already| and is not the result of this conversion)"
    own = "exists already|is the source|has the .* layout already"
    refuses(run, source, own)
    refuses(run, source.parent, "exists already|holds the source")
    refuses(run, Path("file"), "^file is a file: name a new folder")
    refuses(run, Path("file/in"), "^file/in cannot be (made|used)")
    refuses(run, Path("mine"), there)
    refuses(run, Path("loop"), "^loop cannot be used")
    refuses(run, Path("n" * 256), "n cannot be (made|used|written): .*File name too long")
    refuses(run, Path("n" * 250), "n.* cannot be written: File name too long")
    refuses(run, Path("/proc/here"), "/proc.* cannot be (made|written)")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
        refuses(run, Path("mounted"), "^mounted is a mount point, which cannot be replaced: name a folder in it")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        refuses(run, Path("other"), "^other cannot be made: .* cannot be written")
    monkeypatch.chdir(tmp_path / "current")
    for name in ("", ".", "./", "../current", tmp_path / "current"):
        refuses(run, Path(name), "is the current folder, whose place the new folder would take: name a folder in it")
    with pytest.raises(CheckpointError, match=f"{there}|holds the source"):
        run(Path(".."))


def test_a_target_that_another_process_writes(command: tuple[Path, Command], tmp_path: Path) -> None:
    _, run = command
    with (
        lock_beside(tmp_path / "out"),
        pytest.raises(CheckpointError, match=f"is being written by pid {os.getpid()} on"),
    ):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out")


def test_a_source_that_another_process_removes(command: tuple[Path, Command], tmp_path: Path) -> None:
    source, run = command
    if (source / "adapter_config.json").exists():
        return  # an adapter is read at once
    with removing(source), pytest.raises(CheckpointError, match="is being removed or replaced by another process"):
        run(tmp_path / "out")


def test_a_source_is_kept_while_it_is_read(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "hf")
    tried = []

    def remove(done: int, total: int) -> None:
        with pytest.raises(RuntimeError, match="is being read by another process"), removing(tmp_path / "hf"):
            pass
        tried.append(done)

    convert_checkpoint(str(tmp_path / "hf"), tmp_path / "te", to_te=True, progress=remove)
    assert tried
    with removing(tmp_path / "hf"):
        pass
