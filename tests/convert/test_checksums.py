"""The recorded sizes and checksums of files: written by each conversion, and compared before a result is used again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

import fuzzing
from damages import DAMAGES, delete, flip, flip_and_keep_the_time, truncate
from llama_te_convert import CheckpointError, convert_checkpoint, export_te_checkpoint
from llama_te_convert.cli import main
from llama_te_convert.errors import CheckpointWarning
from llama_te_convert.targets import writer
from llama_te_core import NVLlamaForCausalLM
from llama_te_core.files.checksums import (
    Checksum,
    DamagedChecksumsError,
    file_checksum,
    problems,
    read_checksums,
    record_checksums,
    write_checksums,
)

SHARD = 40_000  # bytes; a tiny model then has several shards
FILES = ("model-00001-of-00012.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json")


@pytest.fixture
def folder(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A folder with a checkpoint of Hugging Face, `hf`, and its conversion, `te`."""
    tiny_llama(num_hidden_layers=5).bfloat16().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"a": 1}')
    convert(tmp_path)
    return tmp_path


def convert(folder: Path, **options: Any) -> Any:
    return convert_checkpoint(str(folder / "hf"), folder / "te", to_te=True, max_shard_bytes=SHARD, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_recorded(folder: Path) -> None:
    te = folder / "te"
    recorded = read_checksums(te)
    assert recorded is not None and set(FILES) < recorded.keys()
    assert recorded.keys() == contents(te).keys() - {"checksums.json"}
    for name, checksum in recorded.items():
        assert checksum == file_checksum(te / name)
        assert checksum.size == (te / name).stat().st_size
    assert problems(te) == []
    NVLlamaForCausalLM.from_pretrained(te, layer_implementation="reference")
    convert_checkpoint(str(te), folder / "back", to_te=False)
    assert problems(folder / "back") == []
    AutoModelForCausalLM.from_pretrained(folder / "back")


@pytest.mark.parametrize("file", [*FILES, "conversion.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_result_is_not_there_already(folder: Path, damage: str, file: str) -> None:
    kept = convert(folder)
    assert kept.kept_bytes == kept.bytes
    DAMAGES[damage](folder / "te" / file)
    before = contents(folder / "te")
    with pytest.raises(CheckpointError) as error:
        convert(folder)
    message = str(error.value)
    assert f"{file} " in message or "not the result of this conversion" in message
    assert "Name another" in message or "name another" in message
    assert contents(folder / "te") == before


def test_further_files_stay_unless_transformers_reads_them_as_weights(folder: Path) -> None:
    (folder / "te" / "notes.txt").write_text("mine")
    assert convert(folder).kept_bytes > 0
    (folder / "te" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has changed since this conversion: model\.safetensors is not of this"):
        convert(folder)


def test_a_folder_whose_checksums_are_gone_is_not_there_already(folder: Path) -> None:
    (folder / "te" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"te has no checksums\.json: it was changed since this conversion"):
        convert(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_source_is_not_converted(folder: Path, capsys, damage: str, file: str) -> None:
    DAMAGES[damage](folder / "te" / file)
    assert main(["to-hf", str(folder / "te"), str(folder / "back")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder / 'te'} has changed since checksums.json was written: " in error
    assert file in error
    assert not (folder / "back").exists()
    with pytest.raises(CheckpointError, match="te has changed since"):
        export_te_checkpoint(folder / "te", folder / "standalone")


def test_a_further_file_of_a_source_is_no_damage(folder: Path) -> None:
    (folder / "te" / "notes.txt").write_text("mine")
    convert_checkpoint(str(folder / "te"), folder / "back", to_te=False)
    assert "notes.txt" in (read_checksums(folder / "back") or {})


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damaged_files(folder: Path, capsys, damage: str, file: str) -> None:
    te = folder / "te"
    (te / "notes.txt").write_text("mine")
    number = len(contents(te)) - 1
    assert main(["verify", str(te)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{number} files: {number - 1} OK, 1 extra."
    assert "extra: notes.txt" in lines and f"OK: {file}" in lines
    (te / "notes.txt").unlink()
    DAMAGES[damage](te / file)
    assert main(["verify", str(te)]) == 1
    lines = capsys.readouterr().out.splitlines()
    state = "missing" if damage == "deleted" else "damaged"
    assert any(line.startswith(f"{state}: {file} ") for line in lines)
    assert main(["verify", str(te), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["whole"]
    assert [each["name"] for each in report["files"] if each["state"] == state][:1] <= [file]


def test_verify_says_which_files_are_newer(folder: Path, capsys) -> None:
    flip(folder / "te" / FILES[0])
    flip_and_keep_the_time(folder / "te" / "config.json")
    assert main(["verify", str(folder / "te")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"damaged: {FILES[0]} has other bytes than checksums.json says (written after checksums.json)" in lines
    assert "damaged: config.json has other bytes than checksums.json says (older than checksums.json)" in lines


def test_verify_of_folders_without_checksums(folder: Path, capsys) -> None:
    assert main(["verify", str(folder / "hf")]) == 1
    assert "hf has no checksums.json, and no folder in it has" in capsys.readouterr().err
    assert main(["verify", str(folder / "nothing")]) == 1
    assert "nothing is not a folder" in capsys.readouterr().err
    assert main(["verify", str(folder / "te"), "--tolerance"]) == 1
    assert "--tolerance has no effect on one folder" in capsys.readouterr().err
    assert main(["verify", str(folder)]) == 1  # not all of it can be compared
    assert "unknown: hf has no checksums.json" in capsys.readouterr().out
    truncate(folder / "te" / "checksums.json")
    assert main(["verify", str(folder / "te")]) == 1
    assert "damaged: checksums.json is damaged" in capsys.readouterr().out


def test_saving_a_model_over_a_result_leaves_no_stale_checksums(folder: Path) -> None:
    NVLlamaForCausalLM.from_pretrained(folder / "te", layer_implementation="reference").save_pretrained(folder / "te")
    assert not (folder / "te" / "checksums.json").exists()
    convert_checkpoint(str(folder / "te"), folder / "back", to_te=False)  # and it converts
    model = AutoModelForCausalLM.from_pretrained(folder / "back")
    model.save_pretrained(folder / "back")  # transformers' own knows nothing of them
    with pytest.raises(
        CheckpointError, match=r"back has changed since .*: .*written after.* remove .*back/checksums\.json instead"
    ):
        convert_checkpoint(str(folder / "back"), folder / "again", to_te=True)


def test_standalone_checkpoints_have_checksums_of_their_own(folder: Path) -> None:
    export_te_checkpoint(folder / "te", folder / "standalone")
    assert problems(folder / "standalone") == []
    assert not (folder / "standalone" / "conversion.json").exists()  # it is not the result of that conversion


@pytest.mark.parametrize("damage", [delete, truncate, flip, flip_and_keep_the_time])
def test_a_shard_that_has_changed_in_an_unfinished_folder_is_written_again(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    expected = contents(folder / "te")
    shutil.rmtree(folder / "te")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, progress=stop)
    partial = folder / "te.partial"
    shards = sorted(partial.glob("*.safetensors"))
    assert len(shards) > 1
    kept = shards[1].stat().st_mtime_ns
    damage(shards[0])
    if damage is delete:
        convert(folder)
    else:
        with pytest.warns(CheckpointWarning, match=rf"te\.partial: {shards[0].name} has .* It is written again\."):
            convert(folder)
    assert contents(folder / "te") == expected
    assert (folder / "te" / shards[1].name).stat().st_mtime_ns == kept


def test_unfinished_folders_whose_checksums_are_damaged_are_written_again(folder: Path) -> None:
    expected = contents(folder / "te")
    (folder / "te").rename(folder / "te.partial")
    flip(folder / "te.partial" / "checksums.json")
    with pytest.warns(CheckpointWarning, match=r"no valid checksum"):
        convert(folder)
    assert contents(folder / "te") == expected


def test_a_lost_write_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network disk that loses the end of a file without an error."""
    shutil.rmtree(folder / "te")
    index = writer._write_index

    def lose(path: Path, planned: Any) -> None:
        truncate(path.parent / FILES[0])
        index(path, planned)

    monkeypatch.setattr(writer, "_write_index", lose)
    with pytest.raises(CheckpointError, match=rf"{FILES[0]} cannot be written: has \d+ bytes after \d+ were written"):
        convert(folder)
    assert not (folder / "te").exists()


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "a\\b", "\0", "é" * 10, "a/b.json", ".metadata"]
)
def test_names_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    write_checksums(tmp_path, {name: Checksum(1, "0" * 32)})
    if name in ("é" * 10, "a/b.json", ".metadata"):
        assert read_checksums(tmp_path) == {name: Checksum(1, "0" * 32)}
    else:
        with pytest.raises(DamagedChecksumsError):
            read_checksums(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"files": 1}', '{"files": {"a": {"size": 1}}}', "[" * 100_000, "\ud800"]
)
def test_content_of_another_form_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "checksums.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedChecksumsError, match=r"checksums\.json is damaged"):
        read_checksums(tmp_path)


def test_files_of_other_kinds_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    record_checksums(tmp_path)
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    assert problems(tmp_path) == ["a cannot be read (it is a named pipe, not a regular file)"]
    (tmp_path / "checksums.json").unlink()
    os.mkfifo(tmp_path / "checksums.json")
    with pytest.raises(DamagedChecksumsError, match="it is a named pipe"):
        read_checksums(tmp_path)


@pytest.mark.fuzz
def test_damaged_checksums_are_always_noticed(folder: Path, tmp_path: Path, counts: Callable[[str], None]) -> None:
    seed = (folder / "te" / "checksums.json").read_bytes()
    target = tmp_path / "fuzz"
    target.mkdir()

    def read(content: bytes) -> None:
        (target / "checksums.json").write_bytes(content)
        assert read_checksums(target)
        if content != seed:
            raise AssertionError("damage was not noticed")

    result = fuzzing.fuzz(read, [seed], tmp_path, refusals=(DamagedChecksumsError,), cases=1000, damage=_really_damaged)
    counts(f"checksums.json: {result}")


def _really_damaged(seed: bytes, source: random.Random) -> bytes:
    content = seed
    while content == seed:
        content = fuzzing.damaged(seed, source)
    return content


@pytest.mark.fuzz
def test_flipped_bits_of_a_result_are_always_noticed(folder: Path, counts: Callable[[str], None]) -> None:
    source, te = random.Random(0), folder / "te"
    files = {path: path.read_bytes() for path in te.iterdir()}
    tries = 300 * fuzzing.ROUNDS
    for _ in range(tries):
        (path,) = source.sample(list(files), 1, counts=[len(each) for each in files.values()])
        bit = source.randrange(8 * len(files[path]))
        damaged = bytearray(files[path])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert len(problems(te) or ()) == 1
        path.write_bytes(files[path])
    counts(f"a converted checkpoint: {tries} flipped bits, all noticed")


def test_a_conversion_still_needs_no_torch() -> None:
    code = "import sys, llama_te_convert.on_disk; assert 'xxhash' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
