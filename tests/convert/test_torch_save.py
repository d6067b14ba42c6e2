"""Checkpoints of `torch.save`: the reader returns their tensors and runs no code in them."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import hostile_pickles
from convert.malicious import Malicious
from fuzzing import fuzz
from llama_te_convert.errors import CheckpointError
from llama_te_convert.sources.file_names import TORCH_SAVE
from llama_te_convert.sources.torch_save import TorchSaveSource
from llama_te_convert.sources.torch_tensors import info_of, read_tensor

SINGLE, INDEX = TORCH_SAVE


def tensors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 5, generator=generator)
    return {
        "model.embed_tokens.weight": weight,
        "model.norm.weight": weight[0].bfloat16(),
        "lm_head.weight": weight.half().T,  # not contiguous
        "parameter": torch.nn.Parameter(weight[3:7] * 2),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "numbers": torch.arange(7),
    }


def save_shards(folder, values, files):
    file_of = {name: files[at % len(files)] for at, name in enumerate(values)}
    for file in files:
        torch.save({name: value for name, value in values.items() if file_of[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def assert_same(folder, expected):
    source = TorchSaveSource(folder)
    assert source.tensors == {name: info_of(value) for name, value in expected.items()}
    for name, value in expected.items():
        rows = source.tensors[name].rows
        for start, stop in ((0, rows), (0, 1), (1, rows), (rows // 2, rows // 2)):
            if not start <= stop <= rows or not (value.dim() or start < stop):
                continue
            wanted = value[start:stop] if value.dim() else value
            part = read_tensor(source, name, start, stop)
            assert part.is_contiguous() and part.dtype == value.dtype and not part.requires_grad
            assert torch.equal(part, wanted), (name, start, stop)
    source.close()


def test_one_file(tmp_path):
    torch.save(tensors(), tmp_path / SINGLE)
    assert_same(tmp_path, tensors())


def test_shards(tmp_path):
    save_shards(tmp_path, tensors(), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"])
    source = TorchSaveSource(tmp_path)
    assert source.tensors.keys() == tensors().keys()
    assert_same(tmp_path, {name: tensors()[name] for name in source.tensors})


def test_file_is_read_when_rows_are(tmp_path):
    path = tmp_path / SINGLE
    torch.save({"a": torch.zeros(1000, 1000)}, path)
    source = TorchSaveSource(tmp_path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(torch.ones(10).numpy().tobytes())
    assert read_tensor(source, "a", 0, 1000).count_nonzero() >= 9
    source.close()


def test_tensor_that_a_shard_lacks(tmp_path):
    save_shards(tmp_path, tensors(), ["a.bin"])
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["missing"] = "a.bin"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a.bin does not have the tensor 'missing', which the index says it has"):
        TorchSaveSource(tmp_path)


@pytest.mark.parametrize("file", ["../a.bin", "/etc/passwd", "sub/a.bin", "..", "", 3])
def test_shards_outside_of_the_folder(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=f"{INDEX} says that 'a' is in .*: shards must lie in the folder itself"):
        TorchSaveSource(tmp_path)


def test_index_that_is_none(tmp_path):
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        TorchSaveSource(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="pytorch_model.bin cannot be read: No such file"):
        TorchSaveSource(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "a.bin"}}))
    with pytest.raises(CheckpointError, match="a.bin cannot be read: No such file"):
        TorchSaveSource(tmp_path)


def test_code_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    for value in (Malicious(trace), {"a": torch.zeros(2), "b": Malicious(trace)}):
        torch.save(value, tmp_path / SINGLE)
        with pytest.raises(
            CheckpointError, match=r"pytorch_model.bin is refused: it asks for \w+.mkdir, .*could run any code"
        ):
            TorchSaveSource(tmp_path)
        assert not trace.exists()
    torch.load(tmp_path / SINGLE, weights_only=False)
    assert trace.exists()  # torch.load would have run it


def test_plain_pickle_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    (tmp_path / SINGLE).write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(CheckpointError, match="does not have the format that torch.save writes since torch 1.6"):
        TorchSaveSource(tmp_path)
    assert not trace.exists()


def test_older_format(tmp_path):
    torch.save(tensors(), tmp_path / SINGLE, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="since torch 1.6: .* If it is older .* load it with torch"):
        TorchSaveSource(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, part):
    torch.save({"a": torch.zeros(100, 100)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(
        CheckpointError, match="pytorch_model.bin is (damaged or not complete: its zip directory|not complete)"
    ) as error:
        TorchSaveSource(tmp_path)
    assert "\n" not in str(error.value)


def test_other_files(tmp_path):
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="it begins with b'vers'. Download it again"):
        TorchSaveSource(tmp_path)
    with zipfile.ZipFile(tmp_path / SINGLE, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not a file of torch.save: "):
        TorchSaveSource(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        ({"a": torch.zeros(2), "step": 3}, "holds a int as 'step', not only tensors by name"),
        ({"model": {"a": torch.zeros(2)}}, "holds a dict as 'model', not only tensors by name"),
        ({3: torch.zeros(2)}, "holds a Tensor as 3, not only tensors by name"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "has a tensor that is sparse, not an ordinary one"),
        ({"a": torch.zeros(2, 2, device="meta")}, "has a tensor that is on the device meta, not an ordinary one"),
    ],
)
def test_other_contents(tmp_path, value, message):
    torch.save(value, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=message):
        TorchSaveSource(tmp_path)


TRUNCATED = """
import os, sys
from pathlib import Path
from llama_te_convert.errors import CheckpointError
from llama_te_convert.sources.torch_save import TorchSaveSource

folder = Path(sys.argv[1])
source = TorchSaveSource(folder)
os.truncate(folder / "pytorch_model.bin", 2_000_000)
for name in ("rows", "columns"):
    try:
        source.read(name, 900, 1000)
    except CheckpointError as error:
        print(error)
"""


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    """A process that had mapped the file would end with SIGBUS."""
    torch.save({"rows": torch.zeros(1000, 1000), "columns": torch.zeros(1000, 1000).T}, tmp_path / SINGLE)
    child = subprocess.run(
        [sys.executable, "-c", TRUNCATED, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert child.returncode == 0, child
    assert child.stdout.count("pytorch_model.bin is not complete: it has become shorter while it was read.") == 2


@pytest.mark.parametrize("attack", hostile_pickles.attacks(Path("/nonexistent")))
def test_hostile_files(tmp_path, attack):
    trace = tmp_path / "was_run"
    torch.save(tensors(), tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()

    def read(content):
        (tmp_path / SINGLE).write_bytes(content)
        TorchSaveSource(tmp_path).close()

    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr("archive/data.pkl", hostile_pickles.attacks(trace)[attack])
    hostile_pickles.assert_harmless(read, whole, hostile.getvalue(), tmp_path, CheckpointError)
    assert not trace.exists()


@pytest.mark.fuzz
def test_damaged_files(tmp_path, counts):
    torch.save(tensors(), tmp_path / SINGLE)

    def read(content):
        (tmp_path / SINGLE).write_bytes(content)
        source = TorchSaveSource(tmp_path)
        try:
            for name, info in source.tensors.items():
                if info.nbytes:
                    source.read(name, 0, info.rows)
        finally:
            source.close()

    found = fuzz(read, [(tmp_path / SINGLE).read_bytes()], tmp_path, refusals=(CheckpointError,), cases=1500)
    counts(f"pytorch_model.bin: {found}")
