"""A vocabulary in shards of several processes gives the loss and the gradients of the whole vocabulary.

Shapes: T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_te_core import linear_cross_entropy

SHARD = Path(__file__).with_name("vocabulary_shard.py")
WORLD_SIZE = 3


def case(ranks: list[int], rows: list[int], **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(ranks))
    labels_T = torch.randint(sum(rows), (17,), generator=generator)
    labels_T[::6] = -100
    return {
        "ranks": ranks,
        "rows": rows,
        "hidden_TE": torch.randn(17, 6, generator=generator, dtype=torch.float64),
        # Large enough that only the largest logit of all shards keeps exp from overflowing.
        "weight_VE": 1000 * torch.randn(sum(rows), 6, generator=generator, dtype=torch.float64),
        "labels_T": labels_T,
        "hidden_requires_grad": True,
        "weight_requires_grad": True,
        "options": {"z_loss": 1e-3},
        "kernels": False,
    } | changes


CASES = {
    "three": case([0, 1, 2], [4, 4, 4]),
    "three, uneven": case([0, 1, 2], [5, 1, 7]),
    "two": case([0, 1], [6, 6], options={"num_items": 9}),
    "two others, uneven": case([1, 2], [3, 8]),  # ranks in the group are not those in the world
    "frozen head": case([0, 1, 2], [5, 1, 7], weight_requires_grad=False),
    "frozen decoder": case([0, 1, 2], [5, 1, 7], hidden_requires_grad=False),
    "no token": case([0, 1, 2], [4, 4, 4], labels_T=torch.full((17,), 12)),
}
if sys.platform == "linux":  # Triton is built for it alone
    CASES["three, uneven, kernels"] = case([0, 1, 2], [5, 1, 7], kernels=True)
    CASES["two, kernels"] = case([0, 1], [6, 6], kernels=True, options={"num_items": 9})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    torch.save({"world_size": WORLD_SIZE, "cases": CASES}, folder / "problem.pt")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    processes = [subprocess.Popen([sys.executable, SHARD, folder, str(rank)], env=env) for rank in range(WORLD_SIZE)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * WORLD_SIZE
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "no token"])
def test_shards_are_as_good_as_the_whole(results, name):
    this = CASES[name]
    hidden_TE = this["hidden_TE"].clone().requires_grad_()
    weight_VE = this["weight_VE"].clone().requires_grad_()
    loss = linear_cross_entropy(hidden_TE, weight_VE, this["labels_T"], **this["options"])
    loss.backward()
    assert [rank for rank in range(WORLD_SIZE) if name in results[rank]] == this["ranks"]
    for rank, grad_weight in zip(this["ranks"], weight_VE.grad.split(this["rows"]), strict=True):
        result = results[rank][name]
        torch.testing.assert_close(result["loss"], loss.detach(), atol=0, rtol=1e-12)
        for tensor, gradient in (("hidden", hidden_TE.grad), ("weight", grad_weight)):
            if this[f"{tensor}_requires_grad"]:
                torch.testing.assert_close(result[tensor], gradient, atol=1e-12, rtol=1e-12)
            else:
                assert result[tensor] is None


def test_a_label_beyond_all_shards_is_refused_by_each(results):
    for result in results:
        assert "labels contain 12, but the vocabulary has 12 tokens" in result["no token"]
