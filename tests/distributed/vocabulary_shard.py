"""One of several processes that share a vocabulary; started by test_linear_cross_entropy.py.

Arguments: the folder for the problem and the results, and this process's rank.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from llama_te_core import linear_cross_entropy


def main(folder: Path, rank: int) -> None:
    problem = torch.load(folder / "problem.pt")
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=problem["world_size"])
    results = {}
    for name, case in problem["cases"].items():
        group = dist.new_group(case["ranks"])  # every process has to take part
        if rank in case["ranks"]:
            with kernels() if case["kernels"] else nullcontext():
                results[name] = loss_and_gradients(case, group)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def kernels() -> Any:
    """Make the loss run its Triton kernels in the interpreter (TRITON_INTERPRET=1)."""
    from llama_te_core.loss import kernels as cross_entropy_kernels

    passes = (cross_entropy_kernels.statistics, cross_entropy_kernels.write_gradient)
    return mock.patch.object(sys.modules["llama_te_core.loss.linear_cross_entropy"], "_passes", return_value=passes)


def loss_and_gradients(case: dict[str, Any], group: dist.ProcessGroup) -> dict[str, torch.Tensor | None] | str:
    """Return the loss and the gradients by name, or the error's message."""
    hidden_TE = case["hidden_TE"].T.contiguous().T.requires_grad_(case["hidden_requires_grad"])
    weight_VE = case["weight_VE"].split(case["rows"])[dist.get_rank(group)].clone()
    weight_VE.requires_grad_(case["weight_requires_grad"])
    try:
        loss = linear_cross_entropy(
            hidden_TE, weight_VE, case["labels_T"], vocabulary_group=group, chunk_tokens=5, **case["options"]
        )
    except ValueError as error:
        return str(error)
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden_TE.grad, "weight": weight_VE.grad}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
