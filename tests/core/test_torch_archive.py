"""Files of torch.save: the reader returns what torch.load returns, and refuses files that are made to do harm."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hostile_pickles
from convert.malicious import Malicious
from fuzzing import fuzz
from hostile_pickles import PROTO, name, text
from llama_te_core.files import torch_archive
from llama_te_core.files.pickles import PickleFileError
from llama_te_core.files.torch_archive import Region, StoredTensor, load_value, stored_value


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read(content: bytes) -> Any:
    """Read a file in both ways."""
    value = load_value(Region(content))
    for each in stored_value(Region(content)).values():
        if isinstance(each, StoredTensor):
            each.read()
    return value


def archive(pickled: bytes, storage: bytes = b"\0" * 64, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file with this pickle and one storage."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", storage)
    return buffer.getvalue()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def sizes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, count: int = 16, key: str = "0") -> bytes:
    """The pickle of one tensor of float32 by the name "a"."""
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + number(count) + b"tQ"
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + number(offset) + sizes(shape) + sizes(strides) + b"\x89" + hooks + b"t"
    return PROTO + b"}" + text("a") + name("torch._utils", "_rebuild_tensor_v2") + arguments + b"Rs."


DTYPES = [
    dtype
    for dtype in sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
    if not re.fullmatch(r"torch\.(q.*|bits.*|u?int[1-7]|complex32)", str(dtype))  # torch.save cannot write them
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    value = torch.arange(48, dtype=torch.uint8).view(dtype)
    read_back = read(saved({"a": value}))["a"]
    assert read_back.dtype == dtype and torch.equal(read_back.view(torch.uint8), value.view(torch.uint8))


def test_tensors_of_every_form() -> None:
    weight = torch.randn(6, 4)
    values = {
        "contiguous": weight,
        "transposed": weight.T,
        "rows": weight[2:4],
        "every other row": weight[::2],
        "columns": weight[:, 1:3],
        "every other column": weight[:, ::2],
        "cube": torch.randn(3, 4, 5).permute(2, 0, 1),
        "scalar": torch.tensor(2.0),
        "one element of many": weight[3, 2],
        "empty": torch.empty(0, 4),
        "no columns": torch.empty(4, 0),
        "parameter": torch.nn.Parameter(weight),
        "one row": weight[:1],
        "one column": weight[:, :1],
    }
    content = saved(values)
    loaded, stored = load_value(Region(content)), stored_value(Region(content))
    for name_, value in values.items():
        assert torch.equal(loaded[name_], value) and loaded[name_].dtype == value.dtype, name_
        assert loaded[name_].stride() == value.stride() and type(loaded[name_]) is type(value), name_
        assert torch.equal(stored[name_].read(), value), name_
        if stored[name_].shape and stored[name_].has_whole_rows:
            rows = stored[name_].shape[0]
            for start, stop in ((0, rows), (0, min(1, rows)), (rows // 2, rows)):
                assert torch.equal(stored[name_].read_rows(start, stop), value[start:stop]), name_
    assert not stored["transposed"].has_whole_rows and stored["columns"].has_whole_rows
    loaded["contiguous"][2, 0] = 7
    assert loaded["rows"][0, 0] == 7  # they share a storage again


def test_values() -> None:
    value = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "nested": [{"a": ({1, 2}, b"\xff", bytearray(b"a"), 1j, None, True, -(10**30), 1e-300)}],
        "types": (torch.float8_e4m3fn, torch.device("cuda", 1), torch.Size((1, 2))),
        "counter": collections.Counter("aab"),
        "numbers": (np.float32(1.5), np.int64(-3), np.bool_(True)),
    }
    loaded = load_value(Region(saved(value)))
    numpy_state, expected = loaded.pop("numpy"), value.pop("numpy")
    assert type(numpy_state[1]) is np.ndarray and np.array_equal(numpy_state[1], expected[1])
    assert torch.equal(loaded.pop("torch"), value.pop("torch"))
    assert loaded == value
    assert [type(each) for each in loaded["numbers"]] == [type(each) for each in value["numbers"]]


def test_a_part_of_a_file(tmp_path: Path) -> None:
    first, second = saved({"a": torch.ones(3)}), saved({"a": torch.zeros(3)})
    (tmp_path / "file").write_bytes(b"before" + first + second)
    with (tmp_path / "file").open("rb") as file:
        for begin, content, value in ((6, first, 1), (6 + len(first), second, 0)):
            read_back = load_value(Region(file.fileno(), begin, len(content)))
            assert read_back["a"].eq(value).all()
        with pytest.raises(PickleFileError, match="is not complete: it has"):
            Region(file.fileno(), 6 + len(first), len(second) + 1)


def overlapping() -> bytes:
    """An archive whose directory names one record many times."""
    content = archive(tensor((4,), (1,)), b"\0" * 10_000)
    end = content.rindex(b"PK\x05\x06")
    start = content.index(b"PK\x01\x02")
    entry = content[content.rindex(b"PK\x01\x02") : end]
    entries = content[start:end] + b"".join(entry.replace(b"data/0", b"data/%d" % (n % 10)) for n in range(60_000))
    fields = list(struct.unpack("<4s4H2LH", content[end : end + 22]))
    fields[3] = fields[4] = 60_002
    fields[5] = len(entries)
    return content[:start] + entries + struct.pack("<4s4H2LH", *fields)


def bomb() -> bytes:
    """An archive of 1 MB that would become 1 GB."""
    return archive(tensor((2**28,), (1,), count=2**28), bytes(2**30), zipfile.ZIP_DEFLATED)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip bomb": (bomb, "is refused: its .* bytes would become"),
    "compressed": (lambda: archive(tensor((4,), (1,)), bytes(range(64)), zipfile.ZIP_DEFLATED), "is refused: "),
    "overlapping records": (overlapping, "is refused: its .* bytes would become"),
    "beyond the storage": (lambda: archive(tensor((17,), (1,), count=16)), r"tensor of \[17\] reaches beyond"),
    "stride beyond": (lambda: archive(tensor((4, 4), (5, 1))), "reaches beyond its storage"),
    "offset beyond": (lambda: archive(tensor((4,), (1,), 13)), "reaches beyond its storage"),
    "huge offset": (lambda: archive(tensor((4,), (1,), 2**62)), "reaches beyond its storage"),
    "negative offset": (lambda: archive(tensor((4,), (1,), -1)), "are not whole numbers from 0"),
    "negative stride": (lambda: archive(tensor((4,), (-1,), 8)), "are not whole numbers from 0"),
    "negative size": (lambda: archive(tensor((-4,), (1,))), "are not whole numbers from 0"),
    "stride of zero": (lambda: archive(tensor((2**40,), (0,))), "repeats the elements of a smaller storage"),
    "huge sizes": (lambda: archive(tensor((2**62, 2**62), (0, 0))), "repeats the elements"),
    "fewer strides": (lambda: archive(tensor((4, 4), (1,))), "reaches beyond"),
    "storage beyond": (lambda: archive(tensor((4,), (1,), count=17)), "storage '0' has 64 bytes, not 68"),
    "negative storage": (lambda: archive(tensor((0,), (1,), count=-1)), "storage '0' has 64 bytes, not -4"),
    "missing storage": (lambda: archive(tensor((4,), (1,), key="1")), "it has no record 'archive/data/1'"),
    "storage outside": (lambda: archive(tensor((4,), (1,), key="../../a")), "it has no record"),
    "tensor without storage": (
        lambda: archive(PROTO + name("torch._utils", "_rebuild_tensor_v2") + b"(NNNNNNtR."),
        "a tensor has no storage",
    ),
    "storage by a text": (lambda: archive(PROTO + text("storage") + b"Q."), "it names a storage in another form"),
    "bytearray of 2^40": (
        lambda: archive(PROTO + name("builtins", "bytearray") + number(2**40) + b"\x85R."),
        "bytes have another form|asks for builtins.bytearray",
    ),
    "array of objects": (
        lambda: archive(PROTO + name("numpy", "dtype") + b"(" + text("O8") + b"\x89\x88tR."),
        "does not consist of numbers|asks for numpy.dtype",
    ),
    "array of 2^40": (
        lambda: archive(PROTO + name("numpy", "dtype") + b"(" + text("(1099511627776,)u1") + b"\x89\x88tR."),
        "is damaged|asks for numpy.dtype",
    ),
    "set of shared tuples": (
        lambda: archive(PROTO + name("builtins", "set") + b"](" + hostile_pickles.shared_tuples(20) + b"e\x85R."),
        "has a tuple as a key|asks for builtins.set",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(attack: str, tmp_path: Path) -> None:
    make, message = ATTACKS[attack]
    content = make()
    with pytest.raises(PickleFileError, match=message):
        read(content)
    hostile_pickles.assert_harmless(read, saved({"a": torch.ones(3)}), content, tmp_path, PickleFileError)


@pytest.mark.parametrize("attack", hostile_pickles.attacks(Path("/nonexistent")))
def test_hostile_pickles(attack: str, tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    content = archive(hostile_pickles.attacks(trace)[attack])
    hostile_pickles.assert_harmless(
        read, saved({"a": torch.ones(3)}), content, tmp_path, (PickleFileError, AttributeError)
    )
    assert not trace.exists()


def test_code_is_not_run(tmp_path: Path) -> None:
    content = saved({"a": torch.zeros(2), "b": Malicious(tmp_path / "was_run")})
    for reader in (load_value, stored_value):
        with pytest.raises(PickleFileError, match=r"is refused: it asks for \w+\.mkdir, .* could run any code"):
            reader(Region(content))
    assert not (tmp_path / "was_run").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "was_run")))
    assert (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, 2, device="meta"), "on the device meta"),
    ],
)
def test_other_tensors(value: torch.Tensor, kind: str) -> None:
    with pytest.raises(PickleFileError, match=f"has a tensor that is {kind}, not an ordinary one"):
        stored_value(Region(saved({"a": value})))


def test_big_endian() -> None:
    content = saved({"a": torch.ones(1)})
    with pytest.raises(PickleFileError, match="has big-endian numbers"):
        stored_value(Region(content.replace(b"little", b"bigbig")))


def test_directory_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_archive, "_MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(PickleFileError, match="has a directory of .* bytes, too many"):
        stored_value(Region(saved({"a": torch.ones(1)})))


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    """A mapped file would end the process with SIGBUS."""
    path = tmp_path / "file"
    path.write_bytes(saved({"a": torch.zeros(1000, 1000)}))
    with path.open("rb") as file:
        stored = stored_value(Region(file.fileno()))["a"]
        assert stored.read_rows(900, 910).eq(0).all()
        os.truncate(path, path.stat().st_size // 2)
        assert stored.read_rows(0, 10).eq(0).all()
        with pytest.raises(PickleFileError, match="is not complete: it has become shorter while it was read"):
            stored.read_rows(900, 910)


@pytest.mark.fuzz
def test_damaged_files(tmp_path: Path, counts: Any) -> None:
    seeds = [
        saved({"a": torch.arange(6.0).view(2, 3).T, "b": torch.nn.Parameter(torch.ones(2)), "c": torch.tensor(3)}),
        saved({"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.ones(2, dtype=torch.bfloat16)[1:]}),
        saved(collections.OrderedDict(a=torch.empty(0, 3))),
    ]
    found = fuzz(read, seeds, tmp_path, refusals=(PickleFileError, AttributeError), cases=2000)
    counts(f"files of torch.save: {found}")
    values = [saved({"numpy": np.random.get_state()[1], "b": (b"\xff", {1}, np.float32(2), torch.device("cpu"))})]
    found = fuzz(lambda content: load_value(Region(content)), values, tmp_path, refusals=(PickleFileError,), cases=1000)
    counts(f"values of torch.save: {found}")
