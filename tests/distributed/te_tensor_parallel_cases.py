"""The processes of `test_te_tensor_parallel`: run a model of TE layers, split and whole.

On CPUs the layers come from `core.fake_transformer_engine`, in float64; on GPUs from Transformer Engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from core.fake_transformer_engine import FakeTransformerEngine
from distributed.processes import join
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM, next_token_labels
from llama_te_core.parallel.context import shard_context
from llama_te_core.parallel.mesh import make_mesh
from llama_te_core.parallel.parallelize import parallelize
from llama_te_core.parallel.shards import whole
from llama_te_core.parallel.sizes import ParallelSizes
from llama_te_core.train.activation_checkpointing import checkpoint_activations
from llama_te_core.train.training_loss import return_loss_alone

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.05,
}
LENGTHS = [64, 16, 48]
TOKENS = sum(LENGTHS)  # a multiple of 16 on each of 2 ranks, for FP8
PASSES = 3  # over the same batch, so that delayed scaling has scales


@dataclasses.dataclass(frozen=True)
class Case:
    shard: int = 1
    tensor: int = 2
    recipe: str | None = None
    batch: str = "packed"  # the lengths in "padded" are not divisible by the number of ranks
    format: str = "thd"
    checkpointing: bool = False
    from_meta: bool = False
    loss_alone: bool = False

    @property
    def world_size(self) -> int:
        return self.shard * self.tensor

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ", ".join(changed) or "plain"


CASES = [
    Case(),
    Case(loss_alone=True),
    Case(checkpointing=True),
    Case(from_meta=True),
    Case(batch="padded"),
    Case(batch="padded", format="bshd"),
    Case(shard=2, batch="padded"),
    Case(shard=2, from_meta=True, loss_alone=True),
]
FP8_CASES = [
    Case(recipe=recipe, **options)
    for recipe in ("DelayedScaling", "Float8CurrentScaling")
    for options in ({}, {"checkpointing": True}, {"batch": "padded"}, {"shard": 2, "loss_alone": True})
]


def run(rank: int, world_size: int, device: str, folder: Path) -> None:
    """Run one process; it writes its findings to a file."""
    own = join(rank, world_size, device, folder / "store")
    findings: dict[str, Any] = {}
    try:
        for case in CASES + (FP8_CASES if device == "cuda" else []):
            if case.world_size == world_size:
                findings[str(case)] = found(case, own)
        findings["refusals"] = refusals(own)
    except Exception:
        findings["stopped by"] = traceback.format_exc()
    torch.save(findings, folder / f"findings-{rank}.pt")
    dist.destroy_process_group()


def found(case: Case, device: torch.device) -> dict[str, Any]:
    """Return loss, gradients and weights of high-precision reference layers, whole TE layers and split TE layers."""
    with transformer_engine(device) as fake:
        dtype = torch.bfloat16 if fake is None else torch.float64
        weights = {name: weight.to(dtype) for name, weight in new_weights().items()}
        truth = new_model(case, "reference", torch.float32 if fake is None else torch.float64, weights)
        alone = new_model(case, "transformer_engine", dtype, weights)
        if case.loss_alone:
            return_loss_alone(truth, None)
            return_loss_alone(alone, None)
        results = {"truth": passes(case, truth, None), "alone": passes(case, alone, None)}
        mesh = make_mesh(ParallelSizes(shard=case.shard, tensor=case.tensor), device.type)
        if fake is not None:
            fake.layers.clear()
        if case.from_meta:
            with torch.device("meta"):
                model = new_model(case, "transformer_engine", dtype, {})
            assert all(weight.is_meta for weight in model.parameters())
        else:
            model = new_model(case, "transformer_engine", dtype, weights)
        if case.checkpointing:
            checkpoint_activations(model, "full")
        if case.loss_alone:
            return_loss_alone(model, mesh)
        parallelize(model, mesh)
        if case.from_meta:
            model.init_empty_weights(device)
            set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))
        results["mesh"] = passes(case, model, mesh)
        found_weights = {name: whole(weight.detach()) for name, weight in model.named_parameters()}
    results["weights"] = {name: torch.equal(weight, weights[name]) for name, weight in found_weights.items()}
    results["layers"] = [arguments_of(layer) for layer in model.model.layers]
    if fake is not None:
        results["built"] = [
            {name: layer.arguments[name] for name in ("device", "set_parallel_mode", "sequence_parallel")}
            | {"ranks": dist.get_process_group_ranks(layer.arguments["tp_group"])}
            for layer in fake.layers
            if layer.arguments["tp_group"] is not None
        ]
    return results


def arguments_of(layer: Any) -> dict[str, Any]:
    """Return the shapes of the local part of each weight and of the layer's inputs."""
    local = {
        name: list(weight.to_local().shape)
        for name, weight in layer.named_parameters()
        if isinstance(weight, DTensor) and weight.device_mesh["tensor"].size() > 1
    }
    return {"local": local, "tokens": layer.tokens_seen}


@contextlib.contextmanager
def transformer_engine(device: torch.device) -> Iterator[FakeTransformerEngine | None]:
    """Use Transformer Engine itself on a GPU; elsewhere install the fake within the context."""
    if device.type == "cuda":
        yield None
        return
    has_gpu = torch.cuda.is_available
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeTransformerEngine().install(patch)
        from llama_te_core.layers import selection as layers

        assert layers.transformer_engine_problem() is None  # remembered, so that torch can learn the truth again
        patch.setattr(torch.cuda, "is_available", has_gpu)
        yield fake
    layers.transformer_engine_problem.cache_clear()


def new_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = NVLlamaForCausalLM(NVLlamaConfig(**SIZES, layer_implementation="reference"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
    device = torch.get_default_device()
    return {name: weight.to(device) for name, weight in model.state_dict().items()}


def new_model(
    case: Case, implementation: str, dtype: torch.dtype, weights: dict[str, torch.Tensor]
) -> NVLlamaForCausalLM:
    """Make a model, with these weights if there are any."""
    options: dict[str, Any] = {}
    if case.recipe is not None and implementation == "transformer_engine":
        from transformer_engine.common import recipe

        options["fp8_recipe"] = getattr(recipe, case.recipe)()
    config = NVLlamaConfig(
        **SIZES,
        attn_input_format=case.format,
        layer_implementation=implementation,
        layer_precision=["fp8"] * 2 if options else None,
    )
    model = NVLlamaForCausalLM(config, **options).to(dtype)
    if weights:
        model.load_state_dict(weights)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(_see_tokens)
    return model.train()


def _see_tokens(layer: Any, inputs: Any) -> None:
    layer.tokens_seen = list(inputs[0].shape[:-1])


def new_batch(case: Case, index: int) -> dict[str, Any]:
    """Make the batch of one process of the dimension `shard`."""
    generator = torch.Generator("cpu").manual_seed(100 + index)
    device = torch.get_default_device()
    if case.batch == "packed":
        offsets = torch.tensor([0, *LENGTHS], device="cpu").cumsum(0).to(torch.int32)
        ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS), generator=generator, device="cpu")
        labels = ids.clone()
        labels[0, offsets[:-1].long()] = -100
        offsets = offsets.to(device)
        batch = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": max(LENGTHS)}
        return {"input_ids": ids.to(device), "labels": labels.to(device), **batch}
    mask = torch.arange(29, device="cpu") < torch.tensor([29, 14 + index, 6], device="cpu")[:, None]
    ids = torch.randint(0, SIZES["vocab_size"], mask.shape, generator=generator, device="cpu")
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def passes(case: Case, model: Any, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return loss and gradients of the last of several passes over the batches of all processes."""
    if mesh is None:
        batches = [new_batch(case, index) for index in range(case.shard)]
        for batch in batches:
            batch["shift_labels"] = next_token_labels(batch.pop("labels"), batch.get("attention_mask"))
        count = sum((batch["shift_labels"] != -100).sum() for batch in batches)
        batches = [batch | {"num_items_in_batch": count} for batch in batches]
    else:
        batches = [shard_context(new_batch(case, mesh.get_local_rank("shard")), mesh)]
    for _ in range(PASSES):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            outputs = model(**batch)
            loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
            loss.backward()
            total += loss.detach().double()
    if mesh is not None and case.shard > 1:
        dist.all_reduce(total, group=mesh.get_group("shard"))
        total /= case.shard
    gradients = {
        name: whole(grad).detach().double().cpu()
        for name, grad in ((name, weight.grad) for name, weight in model.named_parameters())
    }
    return {"loss": float(total), "gradients": gradients}


def refusals(device: torch.device) -> dict[str, str]:
    """Return the error messages for requests that split layers cannot fulfil."""
    heard = {}
    with transformer_engine(device) as fake:
        dtype = torch.bfloat16 if fake is None else torch.float64
        mesh = make_mesh(ParallelSizes(tensor=2), device.type)
        model = new_model(Case(), "transformer_engine", dtype, new_weights())
        model.config.use_quantized_model_init = True
        with pytest.raises(ValueError, match="tensor=2") as error:
            parallelize(model, mesh)
        heard["quantized"] = str(error.value)
        model.config.use_quantized_model_init = False
        parallelize(model, mesh)
        offsets = torch.tensor([0, 5], dtype=torch.int32)
        with pytest.raises(ValueError, match="5 tokens") as error:
            model(input_ids=torch.ones(1, 5, dtype=torch.long), cu_seq_lens_q=offsets, max_length_q=5)
        heard["tokens"] = str(error.value)
        with pytest.raises(ValueError, match="past_key_values") as error:
            model.model.layers[0](torch.zeros(2, SIZES["hidden_size"], dtype=dtype), inference_params=object())
        heard["cache"] = str(error.value)
    return heard
