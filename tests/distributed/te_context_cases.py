"""The processes of `test_te_context`: Transformer Engine layers that get a context group from outside."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distributed.processes import join
from distributed.te_tensor_parallel_cases import SIZES, Case, new_model, new_weights
from llama_te_core import ContextParallelDataLoaderWrapper, DataCollatorForContextParallel
from llama_te_core.parallel.context_batches import context_part

# Multiples of 4 for 2 ranks, longer together than the smallest table of rotary angles.
SLOTS, LENGTHS = [384, 64, 128], [381, 64, 120]
FORMATS = ("thd", "bshd")


def new_batch(format: str) -> dict[str, Any]:
    generator = torch.Generator("cpu").manual_seed(3)
    if format == "bshd":
        ids_BS = torch.randint(0, SIZES["vocab_size"], (2, 384), generator=generator, device="cpu")
        return {"input_ids": ids_BS, "labels": ids_BS.clone()}
    offsets = torch.tensor([0, *SLOTS], device="cpu").cumsum(0).to(torch.int32)
    counts = torch.tensor([0, *LENGTHS], device="cpu").cumsum(0).to(torch.int32)
    ids_1T = torch.randint(0, SIZES["vocab_size"], (1, sum(SLOTS)), generator=generator, device="cpu")
    labels_1T = torch.full_like(ids_1T, -100)
    for start, length in zip(offsets.tolist(), LENGTHS, strict=False):
        labels_1T[0, start + 1 : start + length] = ids_1T[0, start + 1 : start + length]
    return {
        "input_ids": ids_1T,
        "labels": labels_1T,
        "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long, device="cpu"),
        "cu_seq_lens_q": counts,
        "cu_seq_lens_k": counts,
        "cu_seq_lens_q_padded": offsets,
        "cu_seq_lens_k_padded": offsets,
        "max_length_q": max(SLOTS),
        "max_length_k": max(SLOTS),
        "pad_between_seqs": True,
    }


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return [tokens, V] in float32."""
    device = torch.get_default_device()
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.no_grad():
        result: torch.Tensor = model(**moved).logits.float().flatten(0, 1)
    return result


def distances(format: str) -> dict[str, float]:
    """Return the distances of whole and of split layers in bfloat16 from float32."""
    mesh = init_device_mesh("cuda", (1, 2), mesh_dim_names=("dp", "cp"))["cp"]
    batch, weights, case = new_batch(format), new_weights(), Case(format=format)
    parts = DataCollatorForContextParallel(lambda batch: batch, mesh, format, is_causal_lm=True)(batch)
    loader = ContextParallelDataLoaderWrapper([parts] if mesh.get_local_rank() == 0 else None, mesh)
    part = next(iter(loader))
    truth = new_model(case, "reference", torch.float32, weights).eval()
    whole = new_model(case, "transformer_engine", torch.bfloat16, weights).eval()
    split = new_model(case, "transformer_engine", torch.bfloat16, weights).eval()
    group = mesh.get_group()
    for layer in split.model.layers:
        layer.set_context_parallel_group(group, dist.get_process_group_ranks(group), torch.cuda.Stream())
    place = torch.arange(batch["labels"].numel(), device="cpu").view(batch["labels"].shape)
    seen = context_part({**batch, "place": place}, mesh.get_local_rank(), 2)["place"].flatten()
    real = (part["shift_labels"].flatten() != -100).cuda()
    expected = logits(truth, batch)[seen.cuda()][real]
    results = {"whole": logits(whole, batch)[seen.cuda()][real], "split": logits(split, part)[real]}
    return {name: float((value - expected).norm() / expected.norm()) for name, value in results.items()}


def run(rank: int, world_size: int, device: str, folder: Path) -> None:
    """Run one process; it writes its findings to a file."""
    join(rank, world_size, device, folder / "store")
    findings: dict[str, Any] = {}
    try:
        findings = {format: distances(format) for format in FORMATS}
    except Exception:
        findings["stopped by"] = traceback.format_exc()
    torch.save(findings, folder / f"findings-{rank}.pt")
    dist.destroy_process_group()
