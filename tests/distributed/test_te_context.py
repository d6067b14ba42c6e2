"""Transformer Engine layers whose context group comes from outside compute what whole layers compute, on GPUs."""

import pytest

from distributed import te_context_cases
from distributed.processes import Processes

# Ranks attend to the pieces of a sequence one after the other, and sum in another order.
FURTHER = 1.25


@pytest.fixture(scope="module")
def processes(tmp_path_factory, device):
    return Processes(te_context_cases.run, device, tmp_path_factory.mktemp("processes"))


@pytest.mark.processes(2, device="cuda")
@pytest.mark.parametrize("format", te_context_cases.FORMATS)
def test_split_layers_are_as_precise_as_whole_layers(processes, measured, format):
    for rank, findings in enumerate(processes.of(2)):
        assert format in findings, findings.get("stopped by")
        found = findings[format]
        measured(f"distance from float32, rank {rank}", found["split"], FURTHER * found["whole"])
