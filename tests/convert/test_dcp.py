"""Checkpoints of torch.distributed.checkpoint: the reader returns their bits and runs no code in them."""

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import hostile_pickles
from convert.malicious import Malicious
from fuzzing import fuzz
from llama_te_convert import convert_llama_hf_to_te
from llama_te_convert.errors import CheckpointError
from llama_te_convert.layout.mapping import map_names
from llama_te_convert.sources.dcp import DCPSource
from llama_te_convert.sources.file_names import DCP_METADATA
from llama_te_convert.sources.torch_tensors import info_of, read_tensor
from llama_te_core.files.torch_archive import StoredTensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
EMBEDDING = "model.embed_tokens.weight"


def save(folder, state, **options):
    dcp.save(state, checkpoint_id=folder, no_dist=True, **options)
    return folder


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(folder, expected):
    source = DCPSource(folder)
    assert source.tensors == {name: info_of(value) for name, value in expected.items()}
    for name, value in expected.items():
        rows = source.tensors[name].rows
        for start, stop in ((0, rows), (0, 1), (rows // 3, rows), (rows // 2, rows // 2), (1, rows - 1)):
            if start <= stop <= rows and (value.dim() or start < stop):
                part = read_tensor(source, name, start, stop)
                assert part.is_contiguous() and part.dtype == value.dtype and not part.requires_grad
                assert torch.equal(bits(part), bits(value[start:stop] if value.dim() else value)), (name, start, stop)
    source.close()


def changed(folder, change):
    """Change `.metadata`."""
    metadata = pickle.loads((folder / DCP_METADATA).read_bytes())
    change(metadata)
    (folder / DCP_METADATA).write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize("to_te", [False, True], ids=["hf", "te"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state": {"model": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"app": {f"_orig_mod.{name}": value for name, value in state.items()}},
    ],
    ids=["plain", "model", "app", "prefix", "both"],
)
def test_model_is_found(tiny_llama, tmp_path, wrap, to_te):
    model = tiny_llama(tie_word_embeddings=False)
    state = (convert_llama_hf_to_te(model) if to_te else model).state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    assert_same(save(tmp_path, wrap(state)), state)
    assert map_names(DCPSource(tmp_path).tensors, to_te=not to_te)


@pytest.mark.parametrize("to_te", [False, True], ids=["hf", "te"])
def test_model_is_found_without_a_flattening_planner(tiny_llama, tmp_path, to_te):
    state = tiny_llama(tie_word_embeddings=False).state_dict()
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    assert_same(save(tmp_path, {f"model.{name}": value for name, value in state.items()}, planner=planner), state)


def test_decoder_alone(tiny_llama, tmp_path):
    state = tiny_llama().model.state_dict()
    source = DCPSource(save(tmp_path, {"model": state}))
    assert source.tensors.keys() == state.keys()
    assert map_names(source.tensors, to_te=True)


def test_all_else_is_left_out(tiny_llama, tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    state = model.state_dict()
    extra = {
        "model.layers.0.self_attention._extra_state": torch.zeros(4, dtype=torch.uint8),
        "model.layers.1.self_attention._extra_state": b"bytes",
    }
    named = get_optimizer_state_dict(model, optimizer)
    everything = {"model": {**state, **extra}, "optimizer": optimizer.state_dict(), "named": named, "step": 3}
    everything["scheduler"] = {"last": torch.tensor(2), "weight": torch.ones(3)}
    assert_same(save(tmp_path / "nested", everything), state)
    flat = {**state, **extra, "optimizer": named, "step": 3}
    assert_same(save(tmp_path / "flat", flat), state)


def test_dtypes_and_shapes(tmp_path):
    weight = torch.randn(6, 4)
    state = {
        EMBEDDING: weight.bfloat16(),
        "half": weight.half(),
        "fp8": weight.to(torch.float8_e4m3fn),
        "numbers": torch.arange(5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "no_columns": torch.empty(4, 0),
        "cube": torch.randn(3, 4, 5),
        "transposed": weight.T,
        "parameter": torch.nn.Parameter(weight),
        "view": weight[2:4],
    }
    assert_same(save(tmp_path, {"model": state}), state)


def test_parts_are_held_no_longer_than_needed(tmp_path, monkeypatch):
    state = {EMBEDDING: torch.randn(8, 4), **{f"model.{name}.weight": torch.randn(8, 4) for name in "abcd"}}
    source = DCPSource(save(tmp_path, state))
    loaded = []
    whole = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda stored: loaded.append(1) or whole(stored))
    for row in range(8):  # three tensors in turns, as query, key and value rows are read
        for name in "abc":
            read_tensor(source, f"model.{name}.weight", row, row + 1)
    assert len(loaded) == 3
    read_tensor(source, "model.d.weight", 0, 8)
    assert len(source._held) == 3
    read_tensor(source, "model.a.weight", 0, 8)
    assert len(loaded) == 5
    source.close()
    assert not source._held


SHARDED = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaForCausalLM

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model = LlamaForCausalLM.from_pretrained(f"{folder}/model")
mesh = init_device_mesh("cpu", (2,))
columns = {
    name: distribute_tensor(tensor, mesh, [Shard(1) if tensor.dim() > 1 else Replicate()])
    for name, tensor in model.state_dict().items()
}
dcp.save({"model": columns}, checkpoint_id=f"{folder}/columns")
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
optimizer.step()
state, optimizer_state = get_state_dict(model, optimizer)
dcp.save({"app": {"model": state, "optim": optimizer_state}}, checkpoint_id=f"{folder}/rows")
dist.destroy_process_group()
"""


def test_sharded_over_two_processes(tiny_llama, tmp_path):
    # The vocabulary is 257, so the ranks have parts of different sizes.
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, env=environment, text=True) for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for folder in ("rows", "columns"):
        assert len(list((tmp_path / folder).glob("*.distcp"))) == 2
        assert_same(tmp_path / folder, model.state_dict())


def test_code_in_metadata_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    folder = save(tmp_path / "a", {EMBEDDING: torch.zeros(2, 2)})
    assert DCPSource(folder).tensors

    changed(folder, lambda metadata: vars(metadata).update(storage_meta=Malicious(trace)))
    with pytest.raises(CheckpointError, match=r".metadata is refused: it asks for \w+.mkdir, .* could run any code"):
        DCPSource(folder)
    assert not trace.exists()
    pickle.loads((folder / DCP_METADATA).read_bytes())
    assert trace.exists()  # torch's own reader would have run it


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "torch"),
        ("torch.serialization", "load"),
        ("pathlib", "os.system"),
    ],
)
def test_only_names_that_metadata_need(tmp_path, module, name):
    pickled = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(each)]) + each.encode() for each in (module, name)) + b"\x93."
    (tmp_path / DCP_METADATA).write_bytes(pickled)
    with pytest.raises(CheckpointError, match=f"is refused: it asks for {module}.{name}, "):
        DCPSource(tmp_path)


def test_classes_are_not_changed_by_a_pickle(tmp_path):
    """A pickle can set attributes on a class that it is allowed to name."""
    module, name = (b"\x8c" + bytes([len(each)]) + each for each in (Metadata.__module__.encode(), b"Metadata"))
    attributes = b"}\x8c\x07planted\x88s"
    (tmp_path / DCP_METADATA).write_bytes(b"\x80\x04" + module + name + b"\x93N" + attributes + b"\x86b.")
    with pytest.raises(CheckpointError, match="sets the state of a Constructor, which is not allowed"):
        DCPSource(tmp_path)
    assert not hasattr(Metadata, "planted")
    assert DCPSource(save(tmp_path / "a", {EMBEDDING: torch.zeros(2, 2)})).tensors


def test_code_in_tensors_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    folder = save(tmp_path / "a", {EMBEDDING: torch.zeros(2, 2)})
    (file,) = folder.glob("*.distcp")
    torch.save(Malicious(trace), file)

    def fit(metadata):
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, file.stat().st_size

    source = DCPSource(changed(folder, fit))
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight at byte 0 cannot be read: it is refused: it asks for \w+\.mkdir"
    ):
        read_tensor(source, EMBEDDING, 0, 2)
    assert not trace.exists()


def test_damaged_files(tmp_path):
    folder = save(tmp_path / "a", {EMBEDDING: torch.randn(20, 20)})
    source = DCPSource(folder)
    (file,) = folder.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"at byte 0 cannot be read: it is not complete: it has \d+ bytes"):
        read_tensor(source, EMBEDDING, 0, 20)
    torch.save(torch.zeros(3), file)
    fitted = changed(
        folder,
        lambda metadata: [vars(place).update(length=file.stat().st_size) for place in metadata.storage_data.values()],
    )
    with pytest.raises(CheckpointError, match="at byte 0 cannot be read: it is not the tensor that the metadata"):
        read_tensor(DCPSource(fitted), EMBEDDING, 0, 20)
    file.unlink()
    with pytest.raises(CheckpointError, match="distcp cannot be read: No such file"):
        read_tensor(source, EMBEDDING, 0, 20)


def test_missing_metadata(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=".metadata cannot be read: No such file or directory. torch.distributed.checkpoint writes",
    ):
        DCPSource(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: it has no end"),
        (b"text", "is damaged: the stack is empty"),
        (b"\x80\x04N.", "is not valid metadata of torch.distributed.checkpoint: it has a NoneType where a Metadata"),
        (b"\x80\x04]\x94.", "is not valid metadata of torch.distributed.checkpoint: it has a list where a Metadata"),
    ],
)
def test_metadata_that_is_none(tmp_path, content, message):
    (tmp_path / DCP_METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=f".metadata {message}"):
        DCPSource(tmp_path)


def test_no_model(tmp_path):
    save(tmp_path, {"net": {f"weight{number}": torch.zeros(1) for number in range(10)}})
    with pytest.raises(CheckpointError, match="holds no Llama: .* It holds net.weight0, .*net.weight7 and 2 more"):
        DCPSource(tmp_path)
    save(tmp_path / "empty", {"step": 1})
    with pytest.raises(CheckpointError, match="It holds no tensors"):
        DCPSource(tmp_path / "empty")


def test_several_models(tmp_path):
    state = {EMBEDDING: torch.zeros(2, 2)}
    save(tmp_path, {"model": state, "ema": state})
    with pytest.raises(CheckpointError, match="more than one model, in 'model.', 'ema.'. Save only the one to convert"):
        DCPSource(tmp_path)


def change_chunk(**values):
    return lambda metadata: vars(metadata.state_dict_metadata[EMBEDDING].chunks[0]).update(values)


def change_place(**values):
    return lambda metadata: [vars(place).update(values) for place in metadata.storage_data.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_chunk(sizes=torch.Size((3, 2))), "has 8 elements, and its parts have 6"),
        (change_chunk(offsets=torch.Size((1, 0))), r"has the shape \[4, 2\], but a part of \[4, 2\] at \[1, 0\]"),
        (change_chunk(sizes=(-4, 2)), r"\(-4, 2\) are not whole numbers from 0"),
        (change_chunk(sizes="ab"), "'ab' are not whole numbers from 0"),
        (change_place(relative_path="../outside"), "is in '../outside', but files must lie in the folder itself"),
        (change_place(relative_path=Path("/etc/passwd")), "but files must lie in the folder itself"),
        (change_place(offset=-1), "are not whole numbers from 0"),
        (change_place(transform_descriptors=["zstd"]), r"is transformed by \['zstd'\], .* save without extensions"),
        (lambda metadata: metadata.storage_data.clear(), "has a part that is stored nowhere"),
        (lambda metadata: vars(metadata).update(storage_data=None), "it has no storage_data"),
        (lambda metadata: vars(metadata).pop("state_dict_metadata"), "it has no state_dict_metadata"),
    ],
)
def test_metadata_that_is_not_valid(tmp_path, change, message):
    folder = changed(save(tmp_path, {EMBEDDING: torch.randn(4, 2)}), change)
    with pytest.raises(CheckpointError, match=f"is not valid metadata of torch.distributed.checkpoint: .*{message}"):
        DCPSource(folder)


def test_dtype_that_is_none(tmp_path):
    def change(metadata):
        metadata.state_dict_metadata[EMBEDDING].properties.dtype = "float32"

    with pytest.raises(CheckpointError, match="model.embed_tokens.weight has no dtype"):
        DCPSource(changed(save(tmp_path, {EMBEDDING: torch.randn(4, 2)}), change))


@pytest.mark.parametrize("attack", hostile_pickles.attacks(Path("/nonexistent")))
def test_hostile_metadata(tmp_path, attack):
    trace = tmp_path / "was_run"
    whole = (save(tmp_path, {EMBEDDING: torch.zeros(2, 2)}) / DCP_METADATA).read_bytes()

    def read(content):
        (tmp_path / DCP_METADATA).write_bytes(content)
        DCPSource(tmp_path)

    hostile = hostile_pickles.attacks(trace)[attack]
    hostile_pickles.assert_harmless(read, whole, hostile, tmp_path, CheckpointError)
    assert not trace.exists()


def test_parts_that_overlap_and_leave_a_gap(tmp_path):
    """Else the gap would hold what was in the memory before."""
    state = {EMBEDDING: torch.zeros(4, 2)}

    def change(metadata):
        (part,) = metadata.state_dict_metadata[EMBEDDING].chunks
        metadata.state_dict_metadata[EMBEDDING].chunks = [
            type(part)(torch.Size((0, 0)), torch.Size((2, 2))),
            type(part)(torch.Size((1, 0)), torch.Size((2, 2))),
        ]
        (place,) = metadata.storage_data.values()
        (index,) = metadata.storage_data
        for first in (0, 1):
            metadata.storage_data[type(index)(EMBEDDING, torch.Size((first, 0)))] = place

    with pytest.raises(CheckpointError, match="embed_tokens.weight has parts that overlap"):
        DCPSource(changed(save(tmp_path, state), change))


@pytest.mark.fuzz
def test_damaged_metadata(tmp_path, counts):
    folders = [
        save(tmp_path / "a", {EMBEDDING: torch.zeros(6, 2), "model.norm.weight": torch.ones(2), "step": 3}),
        save(tmp_path / "b", {"app": {"model": {EMBEDDING: torch.zeros(6, 2)}}}),
    ]
    seeds = [(folder / DCP_METADATA).read_bytes() for folder in folders]

    def read(content):
        for folder in folders:  # the places of either
            (folder / DCP_METADATA).write_bytes(content)
            source = DCPSource(folder)
        for name, info in source.tensors.items():
            if info.nbytes < 2**20:
                with contextlib.suppress(CheckpointError):
                    read_tensor(source, name, 0, info.rows)

    found = fuzz(read, seeds, tmp_path, refusals=(CheckpointError,), cases=1500)
    counts(f"metadata of torch.distributed.checkpoint: {found}")
