"""Checkpoints of several processes: a run continues as if it had not stopped, and any number of processes can load.

Four processes save, two load this checkpoint and save again, and the tests load both checkpoints in one process.
"""

from __future__ import annotations

import re
import signal

import pytest
import torch
import torch.multiprocessing
from transformers import AutoConfig, AutoModelForCausalLM

from distributed import checkpoint_run
from distributed.checkpoint_run import Run
from distributed.processes import start
from llama_te_convert import convert_llama_te_to_hf
from llama_te_convert.cli import main
from llama_te_core.train.checkpoint.checkpoints import Checkpoints

DISTRIBUTIONS = ["fsdp", "hsdp", "ddp", "tensor"]
# The checkpoints that two processes load: the run that saved each, and the folder for the second save.
LOADED = {
    "fsdp of 4 as fsdp": ("fsdp", "fsdp of 4, then 2"),
    "ddp of 4 as fsdp": ("ddp", "ddp of 4, then fsdp of 2"),
    "hsdp of 4 as ddp": ("hsdp", "hsdp of 4, then ddp of 2"),
    "tensor of 4 as fsdp": ("tensor", "tensor of 4, then fsdp of 2"),
    "fsdp of 4 as tensor": ("fsdp", "fsdp of 4, then tensor of 2"),
    "1 as fsdp": ("plain", "1, then fsdp of 2"),
    "1 as tensor": ("plain", "1, then tensor of 2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def found_by(world_size: int, device, folder):
    start(checkpoint_run.run, world_size, device, folder)
    return [torch.load(folder / f"found-{world_size}-{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def plain(folder):
    """The state of a run in one process, which saved a checkpoint."""
    run = Run("plain")
    run.train(2)
    checkpoints = Checkpoints(folder / "plain")
    checkpoints.save(2, run.module, run.optimizer, {"rank": 0})
    checkpoints.wait()
    return run.state()


@pytest.fixture(scope="module")
def four(folder, device):
    return found_by(4, device, folder)


@pytest.fixture(scope="module")
def two(folder, device, four, plain):
    return found_by(2, device, folder)


def assert_same(a, b) -> None:
    for part_a, part_b in zip(a, b, strict=True):
        assert part_a.keys() == part_b.keys()
        for name, tensor in part_a.items():
            assert tensor.dtype == part_b[name].dtype and torch.equal(tensor, part_b[name]), name


@pytest.mark.processes(4)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_each_process_goes_on_as_it_would_have(four, name):
    for rank, found in enumerate(four):
        assert_same(found[name]["loaded"], found[name]["saved"])
        assert found[name]["placed"]
        assert_same(found[name]["resumed"], found[name]["gone on"])
        assert found[name]["rank"] == rank
    assert not torch.equal(four[0][name]["random"], four[2][name]["random"])
    weights, _ = four[0][name]["saved"]
    later, _ = four[0][name]["gone on"]
    assert not any(torch.equal(weights[key], later[key]) for key in weights)


@pytest.mark.processes(4)
def test_tensor_ranks_without_fsdp_go_on_and_others_do_from_there(folder, two):
    for rank, found in enumerate(two):
        saved = found["tensor"]["saved"]
        assert_same(found["tensor"]["loaded"], saved)
        assert found["tensor"]["placed"]
        assert_same(found["tensor"]["resumed"], found["tensor"]["gone on"])
        for name in ("tensor as fsdp", "fsdp as tensor"):
            assert_same(found[name]["loaded"], saved)
            assert found[name]["warnings"] == [] and found[name]["rank"] == rank
    weights, _ = two[0]["tensor"]["saved"]
    later, _ = two[0]["tensor"]["gone on"]
    assert not any(torch.equal(weights[key], later[key]) for key in weights)
    for name in ("tensor", "tensor, then fsdp", "and tensor"):
        run = Run("plain")
        with pytest.warns(UserWarning, match="saved by 2 processes and is loaded by 1"):
            Checkpoints(folder / "two" / name).load(2, run.module, run.optimizer)
        assert_same(run.state(), two[0]["tensor"]["saved"])


@pytest.mark.processes(4)
@pytest.mark.parametrize("name", LOADED)
def test_two_processes_load_what_four_or_one_saved(four, two, plain, name):
    source, _ = LOADED[name]
    expected = plain if source == "plain" else four[0][source]["saved"]
    for found in two:
        assert_same(found[name]["loaded"], expected)
        assert found[name]["rank"] == 0
        assert found[name]["random numbers go on"]
        (warning,) = found[name]["warnings"]
        saved = 1 if source == "plain" else 4
        assert warning == (
            f"step 2 was saved by {saved} processes and is loaded by 2: weights and the optimizer's state are the "
            "same, random numbers go on as they are, and extra comes from rank 0 (in a run of llama-te-train the place "
            "of all ranks in the data: no document is lost or repeated)."
        )


@pytest.mark.processes(4)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_one_process_loads_what_four_saved(folder, four, name):
    run = Run("plain")
    with pytest.warns(UserWarning, match="saved by 4 processes and is loaded by 1"):
        Checkpoints(folder / name).load(2, run.module, run.optimizer)
    assert_same(run.state(), four[0][name]["saved"])


@pytest.mark.processes(4)
@pytest.mark.parametrize("name", LOADED)
def test_one_process_loads_what_two_saved_again(folder, four, two, plain, name):
    source, again = LOADED[name]
    run = Run("plain")
    with pytest.warns(UserWarning, match="saved by 2 processes and is loaded by 1"):
        Checkpoints(folder / again).load(2, run.module, run.optimizer)
    assert_same(run.state(), plain if source == "plain" else four[0][source]["saved"])


@pytest.mark.processes(4)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_checkpoint_of_four_converts(folder, four, name, tmp_path):
    saved = folder / name / "step-00000002"
    assert AutoConfig.from_pretrained(saved).architectures == ["NVLlamaForCausalLM"]
    assert main(["to-hf", str(saved), str(tmp_path / "hf")]) == 0
    run = Run("plain")
    run.model.load_state_dict(four[0][name]["saved"][0])
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same([converted.state_dict()], [convert_llama_te_to_hf(run.model).state_dict()])


@pytest.mark.processes(4)
def test_all_processes_hear_of_an_error(folder, four):
    there = folder / "fsdp"
    for found in four:
        found["errors"]["full"] = re.sub(r"\(a checkpoint .*? free\)", "(...)", found["errors"]["full"])
        assert found["errors"] == {
            "missing": f"{there} has no checkpoint of step 99: there are 2.",
            "old": f"step=2: it must be an integer larger than 2, since {there}/step-00000002 exists. Remove it to go "
            "back behind it.",
            "full": f"step 3 cannot be saved to {there}: the disk is full (rank 1): make room, or keep fewer "
            "checkpoints (...). The last checkpoint is of step 2.",
            "steps": [2, 3],
        }


@pytest.mark.processes(4)
def test_all_processes_go_on_from_the_checkpoint_before_a_damaged_one(folder, four):
    for rank, found in enumerate(each["damaged"] for each in four):
        assert found["step"] == 1
        assert_same(found["loaded"], found["before"])
        assert len(found["warnings"]) == (rank == 0)
        assert "has no undamaged checkpoint: step 1: __2_0.distcp has other bytes" in found["error"]
    assert "step 2: __3_0.distcp has other bytes than checksums.json says" in four[0]["damaged"]["warnings"][0]
    left = sorted(path.name for path in (folder / "damaged").iterdir())
    assert left == ["step-00000001", "step-00000002.damaged"]


@pytest.mark.processes(2)
def test_one_process_that_is_killed_leaves_whole_checkpoints(device, tmp_path):
    """The other processes get an error."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=checkpoint_run.killed_while_saving, args=(rank, device, tmp_path)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    finally:
        for process in processes:
            process.kill()
    heard = (tmp_path / "heard").read_text()
    assert heard.startswith(f"step 2 cannot be saved to {tmp_path}/run: RuntimeError: ")
    assert heard.endswith(". The last checkpoint is of step 1.")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == [1]
    run = Run("plain")
    with pytest.warns(UserWarning, match="saved by 2 processes and is loaded by 1"):
        checkpoints.load(1, run.module, run.optimizer)
