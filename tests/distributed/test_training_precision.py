"""Training in BF16 and FP8 on a mesh of processes is as exact as on one: losses, gradients, weights after 20 steps.

The tests compare every run with one process in FP32. A mesh sums in another order, so its rounding errors differ from
the errors of one process, but have the same size. A wrong or missing computation adds to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import precision_cases
from distributed.precision_cases import MESHES, SAVED_AT, STEPS, WARM_UP, Case
from distributed.processes import start

Measured = Callable[[str, float, float], None]

FP8 = ("fp8 delayed", "fp8 current", "fp8 delayed quantized", "fp8 current quantized")

# A multiple of the error of one process in the same precision. Measured on CPUs in BF16: 0.98 to 1.01; 1.08 with 4
# tensor ranks, each of which rounds its terms of a sum.
BOUND = 1.25
# Two results with independent errors of this size differ by 1.4 times the error. Measured on CPUs in BF16: up to 0.6;
# 1 with 4 tensor ranks.
BOUND_APART = 1.5
# Relative; errors of a loss cancel out, so the error of one process is no measure. Measured on CPUs in BF16: 7e-5.
# E4M3 rounds 16 times as coarsely.
BOUND_LOSSES = {"bf16": 3e-4} | dict.fromkeys(FP8, 5e-3)

WORLD_SIZES = (2, 4, 8)
PRECISIONS = {"reference": ["bf16"], "transformer_engine": ["bf16", *FP8]}
ON_FOUR = ("HSDP", "FSDP and context")  # two dimensions of at least two
OF_QUANTIZED = ("FSDP", *ON_FOUR)  # FSDP gathers the weights of these meshes


def cases(world_size: int) -> list[Case]:
    """Return all cases for this number of processes."""
    return [
        Case(layers, compute, mesh)
        for layers, computed in PRECISIONS.items()
        for compute in computed
        for mesh in MESHES
        if (world_size >= 4 or mesh not in ON_FOUR)
        and (not compute.endswith(" quantized") or mesh in OF_QUANTIZED)
        # Reference layers have one kind of context parallelism.
        and (layers != "reference" or mesh not in ("context, all_gather", "context, a2a"))
    ]


def is_for_cpu(world_size: int, case: Case) -> bool:
    """Whether a CPU runs the case: a few cases. `test_parallel` has all meshes of reference layers, more exactly."""
    return case.layers == "reference" and world_size == 4 and case.mesh in ("FSDP", "FSDP and context", "tensor")


def marked(world_size: int, case: Case, *more: Any) -> Any:
    mark = pytest.mark.processes(world_size, device=None if is_for_cpu(world_size, case) else "cuda")
    return pytest.param(world_size, case, *more, id="-".join(map(str, (world_size, case, *more))), marks=mark)


class Runs:
    """The results of runs. The first request for a number of processes runs all cases of that number."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device

    def on_mesh(self, world_size: int, case: Case) -> dict[str, Any]:
        here = [each for each in cases(world_size) if self.device == "cuda" or is_for_cpu(world_size, each)]
        return self._of(world_size, case, here)

    def alone(self, case: Case) -> dict[str, Any]:
        """Return the result of one process."""
        here = [each for each in cases(8) if self.device == "cuda" or is_for_cpu(4, each)]
        return self._of(1, case, list(dict.fromkeys(one for each in here for one in (each.alone, each.exact))))

    def resumed(self, world_size: int, case: Case) -> dict[str, Any]:
        """Return the result of a run that continues from another run's checkpoint."""
        return self._of(world_size, case, [case])

    def _of(self, world_size: int, case: Case, here: list[Case]) -> dict[str, Any]:
        found = self.folder / f"{world_size} {case}.pt"
        if not found.exists():
            start(precision_cases.run, world_size, self.device, self.folder, here)
        result = torch.load(found)
        assert isinstance(result, dict), result
        return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, device: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), device)


def distance(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative distance of all tensors together."""
    assert result.keys() == expected.keys()
    difference = torch.stack([(result[name] - expected[name]).double().norm() for name in expected]).norm()
    return float(difference / torch.stack([value.double().norm() for value in expected.values()]).norm())


def check(measured: Measured, what: str, result: Any, alone: Any, exact: Any) -> None:
    error = distance(alone, exact)
    measured(f"{what} against FP32; one process: {error:.3g}", distance(result, exact), BOUND * error)
    measured(f"{what} against one process", distance(result, alone), BOUND_APART * error)


@pytest.mark.parametrize(
    ("world_size", "case"), [marked(world_size, case) for world_size in WORLD_SIZES for case in cases(world_size)]
)
def test_a_mesh_is_as_exact_as_one_process(runs: Runs, measured: Measured, world_size: int, case: Case) -> None:
    result, alone, exact = runs.on_mesh(world_size, case), runs.alone(case.alone), runs.alone(case.exact)
    measured("losses against one process", distance(result["losses"], alone["losses"]), BOUND_LOSSES[case.compute])
    check(measured, "first gradients", result["gradients"], alone["gradients"], exact["gradients"])
    check(measured, "change of the weights", result["change"], alone["change"], exact["change"])


@pytest.mark.parametrize(
    ("saved_by", "case", "world_size"),
    [
        marked(saved_by, case, world_size)
        for saved_by in WORLD_SIZES
        for case in cases(saved_by)
        if case.mesh == "FSDP"
        for world_size in (1, 2)
        if world_size < saved_by
    ],
)
def test_another_number_of_processes_goes_on(
    runs: Runs, measured: Measured, saved_by: int, case: Case, world_size: int
) -> None:
    runs.on_mesh(saved_by, case)
    result = runs.resumed(world_size, dataclasses.replace(case, resumes=saved_by))
    assert result["losses"].keys() == set(range(SAVED_AT + 1, WARM_UP + STEPS + 1))
    alone, exact = runs.alone(case.alone), runs.alone(case.exact)
    later = {step: alone["losses"][step] for step in result["losses"]}
    measured("later losses against one process", distance(result["losses"], later), BOUND_LOSSES[case.compute])
    check(measured, "change of the weights", result["change"], alone["change"], exact["change"])


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        marked(world_size, case)
        for world_size in WORLD_SIZES
        for case in cases(world_size)
        if case.mesh == "FSDP" and case.compute in ("bf16", "fp8 current", "fp8 current quantized")
    ],
)
def test_processes_gather_weights_in_fp8_where_layers_have_them_so(runs: Runs, world_size: int, case: Case) -> None:
    result = runs.on_mesh(world_size, case)
    layer, head, rest = 0, 0, 0
    for name, weight in result["change"].items():
        byte = 1 if case.has_quantized_weights and weight.dim() == 2 else 2
        if ".layers.0." in name:
            layer += byte * weight.numel() // world_size
        elif name == "lm_head.weight":
            head += 2 * weight.numel() // world_size
        elif ".layers." not in name:
            rest += 2 * weight.numel() // world_size
    assert result["gathered"] == {layer, head, rest}


@pytest.mark.processes(2, device="cuda")
@pytest.mark.parametrize("recipe", ["fp8 delayed", "fp8 current"])
def test_layers_learn_as_well_with_quantized_weights(runs: Runs, measured: Measured, recipe: str) -> None:
    ordinary = Case("transformer_engine", recipe, "FSDP")
    quantized = Case("transformer_engine", f"{recipe} quantized", "FSDP")
    exact = runs.alone(ordinary.exact)["change"]
    error = distance(runs.alone(ordinary)["change"], exact)
    result = distance(runs.alone(quantized)["change"], exact)
    measured(f"change of the weights against FP32; with whole weights: {error:.3g}", result, BOUND * error)
