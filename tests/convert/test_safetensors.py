"""Files in the safetensors format, compared with the safetensors package, and broken files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llama_te_convert.errors import CheckpointError
from llama_te_convert.layout.tensor_info import TensorInfo
from llama_te_convert.sources.safetensors import DTYPES, SafetensorsFile, SafetensorsFolder, header_bytes
from llama_te_convert.sources.shard_index import read_index
from llama_te_convert.sources.tensor_source import row_chunks
from llama_te_convert.sources.torch_tensors import as_bytes, info_of, read_tensor, torch_dtype

SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of random bits, which may be NaNs."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and as_bytes(one) == as_bytes(other)


@SETTINGS
@given(
    tensors=st.dictionaries(
        st.text('abc.é"\\0', min_size=1, max_size=8),
        st.tuples(st.sampled_from([torch_dtype(name) for name in DTYPES.values()]), SHAPES, st.integers(0, 99)),
        max_size=5,
    )
)
def test_what_the_package_writes_is_read_and_what_is_written_the_package_reads(tmp_path: Path, tensors) -> None:
    made = {name: random_tensor(*arguments) for name, arguments in tensors.items()}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(made, theirs)
    file = SafetensorsFile(theirs)
    assert file.tensors == {name: info_of(x) for name, x in made.items()}
    with ours.open("wb") as out:
        out.write(header_bytes({name: file.tensors[name] for name in made}))
        for name in made:
            info = file.tensors[name]
            for start, stop in row_chunks(info, 0, info.rows):
                out.write(file.read(name, start, stop))
    file.close()
    for name, tensor in load_file(ours).items():
        assert same_bits(tensor, made[name])
    assert load_file(ours).keys() == made.keys()


@SETTINGS
@given(rows=st.integers(1, 9), bounds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_any_rows_are_read(tmp_path: Path, rows: int, bounds: tuple[int, int]) -> None:
    start, stop = sorted(min(bound, rows) for bound in bounds)
    tensor = random_tensor(torch.bfloat16, (rows, 3, 2), rows)
    save_file({"other": torch.ones(5), "x": tensor}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert same_bits(read_tensor(file, "x", start, stop), tensor[start:stop])
    file.close()


def test_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    info = TensorInfo("float32", (10, 4))
    monkeypatch.setattr("llama_te_convert.sources.tensor_source.CHUNK_BYTES", 50)
    assert list(row_chunks(info, 1, 10)) == [(1, 4), (4, 7), (7, 10)]
    monkeypatch.setattr("llama_te_convert.sources.tensor_source.CHUNK_BYTES", 1)
    assert list(row_chunks(info, 8, 10)) == [(8, 9), (9, 10)]
    assert list(row_chunks(TensorInfo("float32", (2**62, 0)), 0, 2**62)) == [(0, 2**62)]


# --- broken files -----------------------------------------------------------------------------------------------------


def write_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b"", None, r"not a safetensors file: it has 16 bytes, and a header of 0"),
        (b"{}", 10**12, r"not a safetensors file"),
        (b"{}", 2**64 - 1, r"not a safetensors file"),
        (b"{x}", None, r"the header of .*model.safetensors cannot be used: it is not valid JSON"),
        (b"\xff\xff", None, r"cannot be used: it is not UTF-8"),
        (b"[" * 100_000, None, r"cannot be used: it has more than 64 levels"),
        (b"[1]", None, r"cannot be used: it does not hold a JSON object"),
        ({"x": 1}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(dtype="F7")}, None, r"entry of tensor 'x' is not valid: its dtype 'F7' is not one of F64, F32"),
        ({"x": entry(dtype=["F32"])}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(shape=(2, -1))}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(shape=(True, 2))}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(shape=2)}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(shape=(3,))}, None, r"entry of tensor 'x' is not valid: F32 \[3\] at \[0, 8\) of 8 bytes"),
        ({"x": entry(shape=(4,), offsets=(0, 16))}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(offsets=(8, 0))}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(offsets=(0, 8, 9))}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(offsets=(0.0, 8.0))}, None, r"entry of tensor 'x' is not valid"),
        ({"x": entry(), "y": entry((1,), (4, 8))}, None, r"the tensors 'x' and 'y' overlap"),
        ({"x": entry(), "y": entry()}, None, r"the tensors 'x' and 'y' overlap"),
        ({"x": entry((1,), (4, 8))}, None, r"has 4 bytes before 'x' that belong to no tensor"),
        ({"x": entry((1,), (0, 4))}, None, r"has 4 bytes at its end that belong to no tensor"),
        ({}, None, r"has 8 bytes at its end that belong to no tensor"),
        ({"x": entry((0, 2**63), (0, 0)), "y": entry()}, None, r"not all whole numbers from 0 that fit in 64 bits"),
        ({"x": entry((1,) * 65 + (2,))}, None, r"it has 66 dimensions, but at most 64 are known"),
        ({"x": entry((2**62,) * 64)}, None, r"entry of tensor 'x' is not valid: F32"),
        ({"x": entry((10**90, 2))}, None, r"not all whole numbers from 0 that fit in 64 bits"),
        (json.dumps({"x": entry(), "y": 0}).replace("y", "x").encode(), None, r"it has the key 'x' twice"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: object, length: int | None, message: str) -> None:
    path = write_file(tmp_path / "model.safetensors", header, b"\0" * 8, length)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


@SETTINGS
@given(data=st.binary(max_size=64), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=4))
def test_fuzzed_files_end_in_the_documented_error(tmp_path: Path, data: bytes, flips: list[tuple[int, int]]) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}, whole)
    content = bytearray(whole.read_bytes())
    for place, change in flips:
        content[place % len(content)] ^= change
    for fuzzed in (data, struct.pack("<Q", len(data)) + data, bytes(content)):
        path = tmp_path / "fuzzed.safetensors"
        path.write_bytes(fuzzed)
        try:
            file = SafetensorsFile(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017  # the file may be valid, but no other error is allowed
            continue
        for name, info in file.tensors.items():
            assert file.read(name, 0, info.rows).nbytes == info.nbytes
        file.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@SETTINGS
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_fuzzed_indexes_end_in_the_documented_error(tmp_path: Path, index: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    try:
        files = set(read_index(path).values())
    except CheckpointError:
        return
    assert all(file and not set(file) & set("/\\\0") and file not in (".", "..") for file in files)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", 3, None]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, file: object) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="shards must lie in the folder itself"):
        SafetensorsFolder(folder)


def test_what_the_index_says_must_be_there(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "one.safetensors", "y": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"one.safetensors does not have the tensor 'y', which the index says"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"two.safetensors cannot be read: No such file"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_gets_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(200)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as writable:
        writable.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"ends within x: the file is not complete"):
        file.read("x", 0, 200)
    file.close()
