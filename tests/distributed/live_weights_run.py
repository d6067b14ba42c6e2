"""A process that trains shards of a model, and gives their weights to an engine of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distributed.processes import join
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_infer import Engine, SamplingParams

PROMPT = [5, 77, 31, 200, 8, 41, 9, 17, 130, 66, 12]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def run(rank: int, world_size: int, device: str, folder: Path) -> None:
    own = join(rank, world_size, device, folder / "rendezvous")
    torch.manual_seed(0)
    config = NVLlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    trained = NVLlamaForCausalLM(config).to(own)
    served = copy.deepcopy(trained)
    mesh = init_device_mesh(device, (world_size,))
    for layer in trained.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    engine = Engine(served, max_batch_size=2, page_size=16 if device == "cuda" else 4)
    before = engine.generate([PROMPT], GREEDY)[0].outputs[0].token_ids

    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.02)
    ids = torch.tensor([PROMPT], device=own)
    trained(ids, labels=ids).loss.backward()
    optimizer.step()
    engine.update_weights(trained)
    after = engine.generate([PROMPT], GREEDY)[0].outputs[0].token_ids

    whole = copy.deepcopy(served)
    with torch.no_grad():
        for (name, parameter), target in zip(trained.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(parameter.full_tensor(), target), name
    torch.save({"before": before, "after": after}, folder / f"findings-{rank}.pt")
    dist.destroy_process_group()
