"""The training command in several processes: the losses of one process, and runs that change their number.

The tests start processes once for each number of processes (`training_processes`), and check their output folders.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from core.training_runs import docstrings, losses, metrics, options, train, write
from distributed import training_processes
from distributed.processes import start
from llama_te_core.files.folder_lock import FolderLock
from llama_te_core.train.command import main

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6
# Each document fills a batch, so a step has the same sequences for any number of processes.
TOKENS = {"data__tokens_per_batch": 128, "data__sequence_length": 128, "steps": STEPS, "checkpoint__interval": None}
# In FP32 losses differ by the order of sums only.
TOKENS |= {"model__layer_implementation": "reference"}
# The number of batches in a step, the same for any number of data-parallel processes.
BATCHES = 4

# Sizes of the mesh, other options, and the resulting number of data-parallel processes.
CASES: dict[int, dict[str, tuple[dict[str, Any], int]]] = {
    2: {
        "shard": ({"activation_checkpointing": "full"}, 2),
        "replicate": ({"parallel__replicate": 2}, 2),
        "context": ({"parallel__shard": 1, "parallel__context": 2}, 1),
        "tensor": ({"parallel__tensor": 2, "parallel__shard": 1}, 1),
    },
    4: {
        "shard": ({"parallel__reshard_after_forward": False}, 4),
        "replicate, shard": ({"parallel__replicate": 2, "parallel__shard": 2}, 4),
        "shard, context": ({"parallel__shard": 2, "parallel__context": 2}, 2),
        "shard, tensor": ({"parallel__shard": 2, "parallel__tensor": 2}, 2),
    },
}
BY_NAME = [
    pytest.param(world_size, name, marks=pytest.mark.processes(world_size))
    for world_size, cases in CASES.items()
    for name in cases
]
SAVING = {"checkpoint__interval": 100, "schedule__kind": "constant"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts"), docstrings(126)[:16])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, source, **TOKENS, data__batches_per_step=BATCHES, export__te=True)
    return folder


class Together:
    """The runs of several processes. They start at the first request for a folder."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.done: set[int] = set()

    def folder(self, world_size: int, name: str) -> Path:
        """Return the folder of the run with this name and number of processes."""
        if world_size not in self.done:
            self.done.add(world_size)
            self._run(world_size)
        return self.root / f"{world_size} {name}"

    def _run(self, world_size: int) -> None:
        runs = []
        for name, (changes, ranks) in CASES[world_size].items():
            settings = TOKENS | {"data__batches_per_step": BATCHES // ranks, "export__te": True}
            runs.append((self.folder(world_size, name), self.source, settings | changes))
        saving = TOKENS | SAVING | {"data__batches_per_step": BATCHES // world_size}
        # The signal comes in the second step, and the run reacts in the third or the fourth.
        stop = (BATCHES // world_size) + 1
        runs.append((self.folder(world_size, "stopped"), self.source, saving | {"steps": 100, "stop": stop}))
        spoilt = {"steps": 9, "spoil": 2, "log__interval": 4, "checkpoint__interval": 3}
        runs.append((self.folder(world_size, "spoilt"), self.source, saving | spoilt))
        # The store where processes meet is open before they start, as in torchrun, so no other program can take its
        # port in between.
        stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in runs]
        start(training_processes.run, world_size, [store.port for store in stores], runs)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Together:
    return Together(tmp_path_factory.mktemp("together"), source)


@pytest.mark.parametrize(("world_size", "name"), BY_NAME)
def test_several_processes_have_the_losses_of_one(together: Together, alone: Path, world_size: int, name: str) -> None:
    folder = together.folder(world_size, name)
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    norms, expected = ([row["gradient_norm"] for row in metrics(each)] for each in (folder, alone))
    assert norms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("world_size", "name"), BY_NAME)
def test_several_processes_export_one_model(together: Together, alone: Path, world_size: int, name: str) -> None:
    weights, expected = (
        load_file(each / "te" / "model.safetensors") for each in (together.folder(world_size, name), alone)
    )
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in expected.items()}
    # AdamW makes a step of nearly the learning rate, 2e-3, even where a gradient is a rounding error.
    for key, value in weights.items():
        assert (value - expected[key]).abs().mean() < 2e-5, key
    configs = [(each / "te" / "config.json").read_text() for each in (together.folder(world_size, name), alone)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("world_size", [pytest.param(each, marks=pytest.mark.processes(each)) for each in CASES])
def test_a_signal_to_one_process_stops_all_and_another_number_goes_on(
    together: Together, tmp_path: Path, source: Path, world_size: int
) -> None:
    folder = together.folder(world_size, "stopped")
    stopped = len(losses(folder))
    assert 2 <= stopped <= 4
    assert [each.name for each in (folder / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    settings = TOKENS | SAVING | {"data__batches_per_step": BATCHES, "steps": stopped + 3}
    with pytest.warns(UserWarning, match=f"saved by {world_size} processes and is loaded by 1"):
        more = train(folder, source, **settings)
    assert more == pytest.approx(train(tmp_path, source, **settings), abs=1e-5)


@pytest.mark.parametrize("world_size", [pytest.param(each, marks=pytest.mark.processes(each)) for each in CASES])
def test_a_loss_of_one_process_that_is_nan_keeps_all_from_updates(together: Together, world_size: int) -> None:
    folder = together.folder(world_size, "spoilt")  # the processes check their weights themselves
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert not (folder / "checkpoints").exists()


def environment(**variables: object) -> dict[str, str]:
    """Return the environment of a shell that finds this Python first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    known = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PORT": str(_free_port())}
    return known | {name: str(value) for name, value in variables.items()}


@pytest.mark.processes(2, own_gpus=True)
def test_the_example_for_torchrun(tmp_path: Path, alone: Path, source: Path) -> None:
    arguments = options(tmp_path, source, **TOKENS, data__batches_per_step=BATCHES // 2)
    command = ["bash", str(EXAMPLES / "train_torchrun.sh"), *arguments]
    subprocess.run(command, check=True, env=environment(GPUS=2), timeout=300)
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.processes(2, own_gpus=True)
def test_the_example_for_slurm(tmp_path: Path, alone: Path, source: Path) -> None:
    # The parts of Slurm that the script uses: the name of the first host, and one process for each task.
    programs = {
        "scontrol": "echo localhost; echo another",
        "srun": "[[ $1 = --cpus-per-task=8 ]] && shift && "
        'for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id "$@" & done; wait -n && wait -n',
    }
    slurm = tmp_path / "bin"
    slurm.mkdir()
    for name, program in programs.items():
        (slurm / name).write_text(f"#!/bin/bash\n{program}\n")
        (slurm / name).chmod(0o755)
    variables = environment(SLURM_JOB_NODELIST="localhost", SLURM_NTASKS=2, SLURM_CPUS_PER_TASK=8)
    variables["PATH"] = f"{slurm}{os.pathsep}{variables['PATH']}"
    arguments = options(tmp_path, source, **TOKENS, data__batches_per_step=BATCHES // 2)
    subprocess.run(["bash", str(EXAMPLES / "train.sbatch"), *arguments], check=True, env=variables, timeout=300)
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)


def test_a_mesh_that_does_not_fit_is_refused_by_each_process(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(options(tmp_path, source, parallel__shard=3, parallel__context=2)) == 1
    assert "shard=3, context=2, tensor=1 need 6 processes, but there are 8" in capsys.readouterr().err


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


@pytest.mark.processes(2)
def test_a_folder_of_another_run_ends_all_processes_alike(tmp_path: Path, source: Path) -> None:
    """Rank 0 alone meets the lock; the other process neither hangs nor says something else."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "OMP_NUM_THREADS": 1}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    command = [sys.executable, "-m", "llama_te_core.train", *options(tmp_path / "run", source, **TOKENS)]
    with FolderLock(tmp_path / "run"):
        processes = []
        for rank in range(2):
            own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            processes.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=120)[1] for process in processes]
        assert os.listdir(tmp_path / "run") == [".lock"]
    assert [process.returncode for process in processes] == [1, 1], said
    expected = f"llama-te-train: {tmp_path / 'run'} is being written by pid {os.getpid()} on host"
    assert all(expected in each and "Traceback" not in each for each in said), said
