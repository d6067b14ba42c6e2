"""Files of a checkpoint that somebody damaged, or made to harm: each command refuses them in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llama_te_convert.cli import main
from llama_te_convert.errors import one_line


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    """A reader that waits for ever, such as for the writer of a named pipe, is a failure."""

    def stop(*_: object) -> None:
        raise AssertionError("took more than 60 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A whole checkpoint."""
    path = tmp_path / "source"
    tiny_llama().bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def shards(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A whole checkpoint of several shards."""
    path = tmp_path / "source"
    tiny_llama().bfloat16().save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *, commands: tuple[str, ...] = ("to-te",)) -> str:
    """Run commands, which must refuse the folder in one line and write nothing. Returns the line of the last one."""
    capsys.readouterr()
    for command in commands:
        target = folder.parent / "target"
        arguments = {"to-te": [folder, target], "inspect": [folder], "verify": [folder, folder]}[command]
        assert main([command, *map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("llama-te-convert: "), (out, err)
        assert not list(folder.parent.glob("target*"))
    return err


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


SPECIAL = [
    (os.mkfifo, "it is a named pipe, not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
    (lambda path: path.symlink_to("/dev/tty"), "it is a device, not a regular file"),
    (os.mkdir, "it is a folder, not a regular file"),
]


@pytest.mark.parametrize(("make", "kind"), SPECIAL, ids=["pipe", "zero", "terminal", "folder"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_special_files_are_refused(folder: Path, name: str, make: Any, kind: str, capsys) -> None:
    replace(folder / name, make)
    message = refused(folder, capsys, commands=("to-te", "inspect", "verify"))
    assert f"{folder / name} cannot be read: {kind}" in message


@pytest.mark.parametrize(("make", "kind"), SPECIAL[:2], ids=["pipe", "zero"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"])
def test_special_files_among_shards_are_refused(shards: Path, name: str, make: Any, kind: str, capsys) -> None:
    path = next(shards.glob("model-00002*")) if name.startswith("model-") else shards / name
    replace(path, make)
    assert f"{path} cannot be read: {kind}" in refused(shards, capsys, commands=("to-te", "inspect"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 10**6, "it has more than 64 levels of lists and objects"),
        (b'{"a":' * 10**5, "it has more than 64 levels of lists and objects"),
        (b'{"a": 1, "a": 2}', "it has the key 'a' twice"),
        (b'{"a": NaN}', "it has the number NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it has an integer of 5,000 digits"),
        (b"\xff" * 100, "it is not UTF-8"),
        (b"", "it is not valid JSON"),
        (b"[]", "it does not hold a JSON object"),
        (b'{"\\ud800": 1}', "it has the text"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_cannot_be_used_is_refused(shards: Path, name: str, content: bytes, message: str, capsys) -> None:
    (shards / name).write_bytes(content)
    assert f"{shards / name} cannot be used: {message}" in refused(shards, capsys, commands=("to-te", "inspect"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_gigabyte_is_refused_before_it_is_read(shards: Path, name: str, capsys) -> None:
    os.truncate(shards / name, 2**30)
    assert "it has 1,073,741,824 bytes, but at most 33,554,432 are read" in refused(shards, capsys)


def test_safetensors_of_absurd_size_are_refused_before_they_are_read(folder: Path, capsys) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**30))
    os.truncate(folder / "model.safetensors", 2**31)
    assert "it has 2147483648 bytes, and a header of 1073741824" in refused(folder, capsys)
    (folder / "model.safetensors").write_bytes(b"")
    assert "it has 0 bytes" in refused(folder, capsys)


def test_a_file_outside_of_the_folder_is_not_read(shards: Path, capsys) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    outside = next(shards.glob("*.safetensors")).rename(shards.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(outside), "a\nb", "\x1b[31mred", ".", "", None):
        changed = dict.fromkeys(index["weight_map"], name)
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        assert "shards must lie in the folder itself" in refused(shards, capsys)


def test_a_tensor_of_the_index_that_is_nowhere_or_in_two_shards_is_refused(shards: Path, capsys) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "another": file}}))
    assert f"{file} does not have the tensor 'another', which the index says it has" in refused(shards, capsys)
    path.write_text(json.dumps(index))
    other = sorted(set(index["weight_map"].values()) - {file})[-1]
    tensors = load_file(shards / other)
    save_file({**tensors, name: torch.zeros(2)}, shards / other)
    assert f"has the tensor '{name}', which another file of the checkpoint has too" in refused(shards, capsys)
    path.write_text(json.dumps({"weight_map": {}}))
    assert "it has no weight_map that names files" in refused(shards, capsys)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.999.input_layernorm.weight",
        "model.layers.01.input_layernorm.weight",
        "model.layers.-1.input_layernorm.weight",
        "model.layers.1e1.input_layernorm.weight",
        "model.layers.٣.input_layernorm.weight",
        f"model.layers.{'9' * 5000}.input_layernorm.weight",
        "model.layers..input_layernorm.weight",
        "\n\x1b[31mmodel.norm.weight",
    ],
    ids=lambda name: ascii(name)[:24],
)
def test_a_tensor_of_no_layer_is_refused_by_name(folder: Path, name: str, capsys) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensors["model.norm.weight"].clone()}, folder / "model.safetensors")
    message = refused(folder, capsys)
    assert "999" in message or ("No rule for: " in message and one_line(name) in message)
    assert main(["inspect", str(folder)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_many_empty_rows_take_no_time(folder: Path, capsys) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": torch.empty(2**40, 0, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    assert "model.norm.weight is [1099511627776, 0], but the configuration asks for [64]" in refused(folder, capsys)
    assert main(["inspect", str(folder)]) == 1


def test_long_and_odd_text_of_a_file_is_shown_in_one_short_line(folder: Path, capsys) -> None:
    content = json.loads((folder / "config.json").read_text())
    for value in ("x" * 10**6, "\n\x1b[2J", "\u202e", {"a": "\r"}):
        (folder / "config.json").write_text(json.dumps({**content, "num_attention_heads": value, "model_type": value}))
        message = refused(folder, capsys)
        assert len(message) < 5000 and message.rstrip("\n").isprintable()


def test_a_conversion_reads_weights_and_configuration_through_links(folder: Path) -> None:
    """As in the cache of the hub, or where somebody has shards on several disks."""
    for name in ("config.json", "model.safetensors"):
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    assert main(["to-te", str(folder), str(folder.parent / "target")]) == 0
    assert not (folder.parent / "target" / "model.safetensors").is_symlink()
