"""Files of a checkpoint that somebody damaged, or made to harm: each command refuses them in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fuzzing import ROUNDS, damaged, fuzz
from llama_te_convert import export_te_checkpoint
from llama_te_convert.adapter import convert_adapter as make_adapter
from llama_te_convert.cli import main
from llama_te_convert.configs.config_file import has_te_layout, head_sizes, read_config
from llama_te_convert.configs.model_config import hf_config, refuse_quantized, te_config
from llama_te_convert.configs.plain_config import plain_fields, write_plain_config
from llama_te_convert.errors import CheckpointError, one_line
from llama_te_convert.sources.gguf import GGUFSource, gguf_config, save_gguf_tokenizer
from llama_te_convert.sources.safetensors import SafetensorsFile
from llama_te_convert.sources.shard_index import read_index
from llama_te_convert.sources.side_files import copy_side_files, find_side_files
from llama_te_convert.sources.tensor_source import row_chunks
from llama_te_core import NVLlamaForCausalLM


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    """A reader that waits for ever, such as for the writer of a named pipe, is a failure."""

    def stop(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    seconds = 60 * ROUNDS
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
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


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> int:
    """A Llama with fields of every kind and a tokenizer, and the bytes of its header."""
    vocabulary = [*map(chr, range(65, 123)), "<s>", "</s>", "ab", "bc", "abc", "{{"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["a b", "b c", "a bc"])
    writer.add_bos_token_id(58)
    writer.add_eos_token_id(59)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}{% for each in messages %}{{ each['content'] }}{% endfor %}")
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (64, 64), "output_norm": (64,), "output": (64, 64), "rope_freqs": (8,)}
    layer = {"attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    layer |= {"ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in layer.items()}}.items():
        values = generator.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        data = np.ones(shape, np.float32) if name == "rope_freqs" else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind if len(shape) == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return int(gguf.GGUFReader(path).data_offset)


def read_gguf(path: Path) -> None:
    gguf_config(path)
    with closing(GGUFSource(path)) as source:
        for name, info in source.tensors.items():
            for start, stop in row_chunks(info, 0, info.rows):
                source.read(name, start, stop)


def field_type(content: bytes, key: str) -> int:
    """The place of the type of a field."""
    return content.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)


def test_a_text_that_a_changed_byte_makes_an_array(tmp_path: Path, capsys) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    read_gguf(path)
    content = path.read_bytes()
    for key in ("general.architecture", "tokenizer.chat_template", "tokenizer.ggml.model"):
        place = field_type(content, key)
        path.write_bytes(content[:place] + b"\x09" + content[place + 1 :])
        message = refused(path, capsys, commands=("to-te", "inspect"))
        assert f"{path} is not a GGUF file, or it is damaged or not complete: the field '{key}' " in message


@pytest.mark.parametrize(
    ("key", "skip", "new", "message"),
    [
        ("tokenizer.ggml.tokens", 4 + 4, struct.pack("<Q", 2**62), "has 4,611,686,018,427,387,904 elements"),
        ("tokenizer.ggml.tokens", 4 + 4 + 8, struct.pack("<Q", 2**40), "has a text of 1,099,511,627,776 bytes"),
        ("tokenizer.ggml.tokens", 4, struct.pack("<I", 9), "is an array of the type 9"),
        ("tokenizer.ggml.tokens", 4, struct.pack("<I", 77), "is an array of the type 77"),
        ("tokenizer.ggml.model", 0, struct.pack("<I", 77), "has the unknown type 77"),
        ("tokenizer.ggml.model", 4, struct.pack("<Q", 2**63), "has 9,223,372,036,854,775,808 bytes"),
        ("tokenizer.ggml.model", 4, struct.pack("<Q", 2**20), "it ends within its header"),
        ("tokenizer.ggml.add_bos_token", 4, b"\x02", "is neither true nor false"),
        ("llama.rope.freq_base", 4, struct.pack("<f", float("nan")), "is nan, which is not finite"),
        ("llama.block_count", 4, struct.pack("<I", 2**32 - 1), "num_hidden_layers=4294967295 must be a whole number"),
        ("llama.block_count", 4, struct.pack("<I", 0), "num_hidden_layers=0 must be a whole number"),
        ("llama.embedding_length", 4, struct.pack("<I", 2**31), "hidden_size=2147483648 must be a whole number"),
        ("llama.attention.head_count", 4, struct.pack("<I", 0), "transformers cannot make a configuration from it"),
        ("general.architecture", -20, b"llama.context_length", "it has the field 'llama.context_length' twice"),
        ("output_norm.weight", 4, struct.pack("<Q", 2**60), "has the sizes [1152921504606846976]"),
        ("output_norm.weight", 4, struct.pack("<Q", 0), "has the sizes [0], which no tensor can have"),
        ("output_norm.weight", 0, struct.pack("<I", 2**31), "has 2147483648 dimensions"),
        ("output_norm.weight", 4 + 8, struct.pack("<I", 99), "has the unknown type 99"),
        ("output_norm.weight", 4 + 8 + 4, struct.pack("<Q", 2**50), "but the file has"),
        ("output_norm.weight", 4 + 8 + 4, struct.pack("<Q", 8), "is no multiple of 32"),
        ("output_norm.weight", 4 + 8 + 4, struct.pack("<Q", 64), "overlap"),
        ("output.weight", 4, struct.pack("<Q", 63), "has rows of 63 elements, which is no multiple of 32"),
        ("blk.0.attn_norm.weight", -22, b"blk.9.attn_norm.weight", "model.layers.0.input_layernorm.weight is needed"),
        ("blk.0.attn_norm.weight", -22, b"blk.00attn_norm.weight", "a Llama does not have: blk.00attn_norm.weight"),
        ("blk.0.ffn_norm.weight", -21, b"blk.0.ffn_norm.weigh\xff", "the name of a tensor is not UTF-8"),
    ],
    ids=str,
)
def test_headers_that_lie_are_refused(tmp_path: Path, key: str, skip: int, new: bytes, message: str, capsys) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    content = path.read_bytes()
    place = field_type(content, key) + skip
    path.write_bytes(content[:place] + new + content[place + len(new) :])
    assert message in refused(path, capsys)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "zero"])
def test_special_files_that_are_named_as_gguf_are_refused(tmp_path: Path, make: Any, capsys) -> None:
    make(tmp_path / "tiny.gguf")
    assert "tiny.gguf cannot be read: it is a " in refused(
        tmp_path / "tiny.gguf", capsys, commands=("to-te", "inspect")
    )


@pytest.mark.fuzz
def test_damaged_gguf_files(tmp_path: Path, counts: Callable[[str], None]) -> None:
    path = tmp_path / "tiny.gguf"
    header = write_gguf(path)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_gguf(path)

    def damaged_header(seed: bytes, source: random.Random) -> bytes:
        return damaged(seed[:header], source) + seed[header:] if source.random() < 0.9 else damaged(seed, source)

    seed = path.read_bytes()
    found = fuzz(read, [seed], tmp_path, refusals=(CheckpointError,), cases=1000, damage=damaged_header)
    counts(f"GGUF: {found}")
    assert found.accepted > 10 * ROUNDS and found.refused > 100 * ROUNDS


@pytest.mark.fuzz
def test_damaged_gguf_tokenizers(tmp_path: Path, counts: Callable[[str], None]) -> None:
    path = tmp_path / "tiny.gguf"
    header = write_gguf(path)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        save_gguf_tokenizer(path, tmp_path / "tokenizer")

    def damaged_header(seed: bytes, source: random.Random) -> bytes:
        return damaged(seed[:header], source) + seed[header:]

    seed = path.read_bytes()
    found = fuzz(read, [seed], tmp_path, refusals=(CheckpointError,), cases=200, damage=damaged_header)
    counts(f"tokenizers of GGUF files: {found}")
    assert found.refused > 20 * ROUNDS


# --- files beside the weights -----------------------------------------------------------------------------------------


def convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """Convert a checkpoint. Returns the result, and the warnings."""
    capsys.readouterr()
    target = folder.parent / "target"
    assert main(["to-te", str(folder), str(target)]) == 0
    return target, capsys.readouterr().err


def export(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """Export a converted checkpoint that has the same side files. Returns the result, and the warnings."""
    others = [path for path in folder.iterdir() if path.name not in ("config.json", "model.safetensors")]
    bare = folder.parent / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / name, bare / name)
    te = folder.parent / "te"
    assert main(["to-te", str(bare), str(te)]) == 0
    for path in others:
        path.rename(te / path.name)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        export_te_checkpoint(te, folder.parent / "target")
    return folder.parent / "target", "".join(str(each.message) + "\n" for each in shown)


both = pytest.mark.parametrize("copied", [convert, export])


@both
def test_links_out_of_the_folder_are_not_copied(folder: Path, copied: Any, capsys) -> None:
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder.parent / "source-of-others").mkdir()
    (folder.parent / "source-of-others" / "file").write_text("secret")
    links = {
        "LICENSE": str(secret),
        "tokenizer.json": "../secret",
        "vocab.txt": "hop",
        "hop": "../source-of-others/../secret",
        "merges.txt": "../source-of-others/file",
        "README.md": "/proc/self/environ",
        "gone.txt": "nothing",
        "loop.txt": "loop.txt",
    }
    for name, to in links.items():
        (folder / name).symlink_to(to)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").symlink_to(secret)
    (folder / "additional_chat_templates" / "b.jinja").write_text("{{ x }}")
    (folder / "real.txt").write_text("mine")
    (folder / "inside.txt").symlink_to("real.txt")
    target, err = copied(folder, capsys)
    assert err.count("\n") == 1 and "not copied from" in err and "and 1 more" in err
    assert f"'LICENSE' (it is a link to '{secret}', outside of the checkpoint)" in err
    files = {path.name: path for path in target.rglob("*") if path.is_file()}
    assert not files.keys() & {*links, "a.jinja"}
    assert not any(path.is_symlink() or b"secret" in path.read_bytes() for path in files.values())
    assert files["inside.txt"].read_text() == files["real.txt"].read_text() == "mine"
    assert files["b.jinja"].parent == target / "additional_chat_templates"


def test_a_folder_that_is_a_link_is_not_copied(folder: Path, capsys) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "x.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(outside)
    target, err = convert(folder, capsys)
    assert "'additional_chat_templates' (it is a link to a folder)" in err
    assert not (target / "additional_chat_templates").exists()


def test_the_cache_of_the_hub_consists_of_links_that_are_followed(folder: Path, capsys) -> None:
    repository = folder.parent / "hub" / "models--somebody--llama"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "LICENSE").write_text("yes")
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (folder.parent / "secret").write_text("secret")
    (blobs / "f00").symlink_to(folder.parent / "secret")
    (snapshot / "merges.txt").symlink_to("../../blobs/f00")
    moved = folder.parent / "elsewhere"  # the cache itself may be behind a link
    shutil.move(folder.parent / "hub", moved)
    (folder.parent / "hub").symlink_to(moved)
    target = folder.parent / "target"
    capsys.readouterr()
    assert main(["to-te", str(snapshot), str(target)]) == 0
    err = capsys.readouterr().err
    assert "'merges.txt' (it is a link to" in err and err.count("(it is") == 1
    assert (target / "tokenizer.json").read_text() == '{"a": 1}' and (target / "LICENSE").read_text() == "yes"
    assert not (target / "merges.txt").exists() and not (target / "tokenizer.json").is_symlink()


@both
def test_special_and_huge_files_and_odd_names_are_left_out(folder: Path, copied: Any, capsys) -> None:
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "huge.txt").touch()
    os.truncate(folder / "huge.txt", 10**8 + 1)
    (folder / "large.txt").touch()
    os.truncate(folder / "large.txt", 10**6)
    (folder / "a\n\x1b[2Jb.txt").write_text("x")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("x")
    (folder / "Licence").write_text("one")
    (folder / "LICENCE").write_text("two")
    target, err = copied(folder, capsys)
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable()
    for part in ("'pipe.txt' (it is no regular file)", "'zero.txt' (it is no regular file)", "cannot be printed"):
        assert part in err
    assert "'huge.txt' (it has 100,000,001 bytes, but at most 100,000,000 are copied)" in err
    assert "'Licence' (it differs from 'LICENCE' in upper and lower case only)" in err
    names = {path.name for path in target.iterdir()}
    assert {"large.txt", "LICENCE"} <= names
    assert not names & {"pipe.txt", "zero.txt", "huge.txt", "Licence"} and all(name.isprintable() for name in names)


def test_no_side_file_takes_the_place_of_a_file_of_the_result(folder: Path, capsys) -> None:
    """On a disk that takes upper and lower case for one."""
    for name in ("Config.json", "MODEL.SAFETENSORS", "Conversion.json", "Model.safetensors.index.json", "LLAMA_TE.PY"):
        (folder / name).write_text("{}")
    target, _ = convert(folder, capsys)
    names = [path.name for path in target.iterdir()]
    assert len({name.casefold() for name in names}) == len(names)
    assert not {"Config.json", "MODEL.SAFETENSORS", "Conversion.json", "LLAMA_TE.PY"} & set(names)


@both
def test_configurations_that_are_copied_name_no_code(folder: Path, copied: Any, capsys) -> None:
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "é": int(1e30), "model_max_length": 64}
    code = {"auto_map": {"AutoTokenizer": ["somebody/code--tokenizer.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **code}))
    plain = json.dumps(content, separators=(",", ":"))
    (folder / "special_config.json").write_text(plain)
    target, err = copied(folder, capsys)
    assert "the entry auto_map of 'tokenizer_config.json' (it names code)" in err and err.count("(it") == 1
    assert json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8")) == content
    assert (target / "special_config.json").read_text() == plain


def test_a_broken_tokenizer_configuration_is_refused_before_anything_is_written(folder: Path, capsys) -> None:
    te = folder.parent / "te"
    assert main(["to-te", str(folder), str(te)]) == 0
    for content in ("[" * 10**6, '{"a": NaN}', "[]", '{"auto_map": 1, "auto_map": 2}'):
        for each in (folder, te):
            (each / "tokenizer_config.json").write_text(content)
        assert "tokenizer_config.json cannot be used: it " in refused(folder, capsys)
        with pytest.raises(CheckpointError, match="tokenizer_config.json cannot be used: it "):
            export_te_checkpoint(te, folder.parent / "target")
        assert not list(folder.parent.glob("target*"))


def test_an_export_copies_weights_through_links_if_they_are_weights(folder: Path, capsys) -> None:
    te = folder.parent / "te"
    assert main(["to-te", str(folder), str(te)]) == 0
    shutil.move(te / "model.safetensors", folder.parent / "shard")
    (te / "model.safetensors").symlink_to(folder.parent / "shard")
    export_te_checkpoint(te, folder.parent / "target")
    assert (folder.parent / "target" / "model.safetensors").read_bytes() == (folder.parent / "shard").read_bytes()
    (folder.parent / "secret").write_text("secret" * 99)
    (te / "other.safetensors").symlink_to(folder.parent / "secret")
    with pytest.raises(CheckpointError, match="other.safetensors is not a safetensors file"):
        export_te_checkpoint(te, folder.parent / "second")
    assert not (folder.parent / "second").exists()


# --- adapters, loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder: Path) -> Path:
    """A LoRA adapter of the checkpoint."""
    path = folder.parent / "adapter"
    path.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(folder)}))
    module = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {module.format(layer, "A"): torch.ones(2, 64) for layer in range(3)}
    tensors |= {module.format(layer, "B"): torch.ones(64, 2) for layer in range(3)}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def convert_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Convert an adapter. Returns the error, in one line, or nothing."""
    capsys.readouterr()
    status = main(["adapter-to-te", str(adapter), str(adapter.parent / "target")])
    err = capsys.readouterr().err
    assert status == 0 or (err.count("\n") == 1 and not list(adapter.parent.glob("target*")))
    return err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": 0}, "lora_alpha=0, which is not a number above 0"),
        ({"lora_alpha": True}, "lora_alpha=True, which is not a number above 0"),
        ({"r": -1}, "r=-1, which is not a number above 0"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "it must give a number to names of modules"),
        ({"alpha_pattern": {"a*a*a*a*": 2}}, "it must give a number to names of modules"),
        ({"alpha_pattern": {"(": 2}}, "it must give a number to names of modules"),
        ({"alpha_pattern": {"q_proj": "x"}}, "it must give a number to names of modules"),
        ({"alpha_pattern": [1]}, "it must give a number to names of modules"),
        ({"target_parameters": {"a": 1}}, "target_parameters={'a': 1}: it must be a list of names"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5, which is not a name"),
        ({"base_model_name_or_path": "x" * 5000}, "does not exist, and is not the id of a repository"),
        ({"peft_type": {"a": 1}}, "peft_type={'a': 1}"),
    ],
    ids=str,
)
def test_adapters_that_lie_are_refused(adapter: Path, fields: dict[str, Any], message: str, capsys) -> None:
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, **fields}))
    assert message in convert_adapter(adapter, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a[0], b),
        lambda a, b: (a[:, :0], b),
        lambda a, b: (a[:0], b[:, :0]),
        lambda a, b: (a, b[:, :1]),
        lambda a, b: (a, b[:9]),
        lambda a, b: (a[None], b[None]),
    ],
)
def test_factors_that_do_not_fit_are_refused(adapter: Path, change: Any, capsys) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = next(name for name in tensors if "lora_A" in name), next(name for name in tensors if "lora_B" in name)
    tensors[a], tensors[b] = (each.clone() for each in change(tensors[a], tensors[b]))
    save_file(tensors, path)
    assert "adapter_model.safetensors" in convert_adapter(adapter, capsys)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_special_files_of_an_adapter_are_refused(adapter: Path, name: str, capsys) -> None:
    replace(adapter / name, os.mkfifo)
    assert f"{name} cannot be read: it is a named pipe, not a regular file" in convert_adapter(adapter, capsys)


def test_loading_refuses_layers_that_the_configuration_does_not_have(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    more = {"model.layers.999.input_layernorm.weight": torch.ones(64, dtype=torch.bfloat16)}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.999.input_layernorm.weight', but its .* has 3 layers"):
        NVLlamaForCausalLM.from_pretrained(folder)


# --- random damages ---------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> None:
    with closing(SafetensorsFile(path)) as file:
        for name, info in file.tensors.items():
            for start, stop in row_chunks(info, 0, info.rows):
                file.read(name, start, stop)


@pytest.mark.fuzz
@pytest.mark.parametrize("part", ["file", "header"])
def test_damaged_safetensors(part: str, tmp_path: Path, counts: Callable[[str], None]) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.ones(3, 2),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.ones(()),
        "d": torch.ones(0, 5),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    seed = path.read_bytes()
    length = int.from_bytes(seed[:8], "little")

    def damaged_header(seed: bytes, source: random.Random) -> bytes:
        """Damage the JSON, and keep its length true, so that more files reach the checks of the entries."""
        header = damaged(seed[8 : 8 + length], source)
        return struct.pack("<Q", len(header)) + header + seed[8 + length :]

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_safetensors(path)

    damage = damaged if part == "file" else damaged_header
    found = fuzz(read, [seed], tmp_path, refusals=(CheckpointError,), cases=3000, damage=damage)
    counts(f"safetensors, {part}: {found}")
    assert found.refused > 1000 * ROUNDS


INDEX = {
    "metadata": {"total_size": 9},
    "weight_map": {"a": "one.safetensors", "b": "two.safetensors", "é": "one.safetensors"},
}
CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 257},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rope_theta": 5e5},
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
TE_CONFIG = {**CONFIG, "model_type": "nv_llama", "layer_precision": [None, "fp8", None], "attn_input_format": "thd"}


@pytest.mark.fuzz
def test_damaged_indexes(tmp_path: Path, counts: Callable[[str], None]) -> None:
    path = tmp_path / "model.safetensors.index.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert all("/" not in file for file in read_index(path).values())

    found = fuzz(read, [json.dumps(INDEX).encode()], tmp_path, refusals=(CheckpointError,), cases=3000)
    counts(f"indexes of shards: {found}")
    assert found.accepted > 100 * ROUNDS and found.refused > 1000 * ROUNDS


NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    64,
    2**31,
    2**63,
    10**30,
    0.0,
    -0.5,
    1e-300,
    1e308,
    True,
    None,
    "",
    "4",
    [],
    [1],
    {},
    {"a": 1},
]


def damaged_value(seed: bytes, source: random.Random) -> bytes:
    """Damage the text, or give fields other values, which reaches the checks of the numbers."""
    if source.random() < 0.4:
        return damaged(seed, source)
    content = json.loads(seed)
    for _ in range(source.randint(1, 2)):
        fields = content if source.random() < 0.7 else content["rope_scaling"]
        if isinstance(fields, dict) and fields:
            fields[source.choice(sorted(fields))] = source.choice(NUMBERS)
    return json.dumps(content).encode()


@pytest.mark.fuzz
def test_damaged_configurations(tmp_path: Path, counts: Callable[[str], None]) -> None:
    def read(content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        config = read_config(tmp_path)
        refuse_quantized(config)
        (hf_config if has_te_layout(config) else te_config)(config).save_pretrained(tmp_path / "other")
        head_sizes(config, "somewhere")
        if (fields := plain_fields(config)) is not None:
            write_plain_config(fields, tmp_path, to_te=not has_te_layout(config))

    seeds = [json.dumps(CONFIG).encode(), json.dumps(TE_CONFIG).encode()]
    found = fuzz(read, seeds, tmp_path, refusals=(CheckpointError,), cases=1500, damage=damaged_value)
    counts(f"config.json: {found}")
    assert found.accepted > 50 * ROUNDS and found.refused > 500 * ROUNDS


@pytest.mark.fuzz
def test_damaged_adapters(adapter: Path, counts: Callable[[str], None], tmp_path: Path) -> None:
    weights, config = (adapter / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    seeds = [weights.read_bytes(), config.read_bytes()]

    def read(content: bytes) -> None:
        is_config = content[:1] == b"{"
        weights.write_bytes(seeds[0] if is_config else content)
        config.write_bytes(content if is_config else seeds[1])
        with tempfile.TemporaryDirectory(dir=tmp_path) as target:
            make_adapter(adapter, Path(target) / "new", base=str(tmp_path / "source"), to_te=True)

    found = fuzz(read, seeds, tmp_path, refusals=(CheckpointError,), cases=400)
    counts(f"adapters: {found}")
    assert found.accepted > 20 * ROUNDS and found.refused > 100 * ROUNDS


@pytest.mark.fuzz
def test_damaged_tokenizer_configurations(tmp_path: Path, counts: Callable[[str], None]) -> None:
    seed = json.dumps(
        {"auto_map": {"AutoTokenizer": ["a--b.C", None]}, "model_max_length": int(1e30), "x": [{"y": "é"}]}
    )

    def read(content: bytes) -> None:
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files = find_side_files(tmp_path, lambda name, _: name == "tokenizer_config.json")
        copy_side_files(files, tmp_path / "copy")
        assert "auto_map" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_bytes())

    found = fuzz(read, [seed.encode()], tmp_path, refusals=(CheckpointError,), cases=1500)
    counts(f"tokenizer_config.json: {found}")
    assert found.accepted > 50 * ROUNDS and found.refused > 500 * ROUNDS
