"""The processes of `test_parallel`: train on a mesh for a step, and compare with a single process."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from conftest import TINY
from distributed.processes import join
from llama_te_core import (
    ContextParallelDataLoaderWrapper,
    DataCollatorForContextParallel,
    NVLlamaConfig,
    NVLlamaForCausalLM,
)
from llama_te_core.parallel.context import shard_context
from llama_te_core.parallel.context_batches import context_part
from llama_te_core.parallel.mesh import make_mesh
from llama_te_core.parallel.parallelize import clip_gradients, parallelize, whole_state_dict
from llama_te_core.parallel.shards import gather_halves, own_part, scatter_halves, whole
from llama_te_core.parallel.sizes import ParallelSizes

PAD = 200  # occurs as a token too: its embedding gets no gradient


@dataclasses.dataclass(frozen=True)
class Case:
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    batch: str = "packed"  # "packed", "packed with padding", "packed long", "padded left", "padded right"
    tied: bool = False
    format: str = "thd"
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    from_meta: bool = False
    through_checkpoint: bool = False
    vocab_size: int = 257

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(self.replicate, self.shard, self.context, self.tensor)

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ", ".join(changed)


CASES = {
    2: [
        Case(shard=2),
        Case(shard=2, tied=True, batch="padded left", dtype=torch.float32),
        Case(shard=2, from_meta=True),
        Case(replicate=2, batch="padded right", tied=True),
        Case(replicate=2),
        Case(tensor=2, from_meta=True),
        Case(tensor=2, from_meta=True, tied=True, batch="packed with padding"),
        Case(tensor=2, tied=True, batch="padded left", through_checkpoint=True),
        Case(tensor=2, batch="padded right", format="bshd", checkpointing=True),
        Case(tensor=2, dtype=torch.float32),
        Case(context=2),
        Case(context=2, batch="packed with padding", tied=True),
        Case(context=2, batch="padded left"),
        Case(context=2, batch="packed long"),  # longer than the smallest table of rotary angles
        Case(context=2, batch="padded right", format="bshd", checkpointing=True),
        Case(context=2, dtype=torch.float32),
    ],
    4: [
        Case(shard=4, batch="padded right"),
        Case(replicate=2, shard=2, tied=True),
        Case(shard=2, tensor=2, through_checkpoint=True),
        Case(shard=2, tensor=2, tied=True, batch="padded left", dtype=torch.float32),
        # torch loads a whole state dict only where rows divide equally.
        Case(shard=2, tensor=2, from_meta=True, vocab_size=256),
        Case(shard=2, context=2, batch="packed with padding"),
        Case(shard=2, context=2, batch="padded left", tied=True),
        Case(context=2, tensor=2, checkpointing=True),
        Case(context=2, tensor=2, batch="packed with padding", dtype=torch.float32),
        Case(context=2, tensor=2, batch="padded right", tied=True, through_checkpoint=True),
        Case(context=4, batch="padded left"),
        Case(replicate=2, context=2),
        Case(replicate=2, tensor=2, batch="padded right", through_checkpoint=True),
    ],
}


def new_model(case: Case) -> NVLlamaForCausalLM:
    """Make a model whose odd vocabulary gives tensor ranks parts of different sizes; the last has the padding token."""
    torch.manual_seed(0)
    config = NVLlamaConfig(
        **{**TINY, "num_hidden_layers": 2, "vocab_size": case.vocab_size, "pad_token_id": PAD},
        tie_word_embeddings=case.tied,
        attn_input_format=case.format,
        layer_implementation="reference",
    )
    model = NVLlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        # transformers makes it 0, where RMSNorm multiplies rounding errors by a thousand.
        model.model.embed_tokens.weight[PAD].normal_()
    model = model.to(case.dtype)
    if case.dtype == torch.float64:
        model.loss_function = _float64_loss  # transformers' own computes in float32
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def new_batch(case: Case, index: int) -> dict[str, Any]:
    """Make sequences of different lengths; the number of labels differs from batch to batch."""
    torch.manual_seed(100 + index)
    lengths = [264, 8] if case.batch == "packed long" else [16, 8, 24 + 8 * index]
    if case.batch.startswith("packed"):
        real = [15, 3, 20] if case.batch == "packed with padding" else lengths
        offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        ids = torch.randint(0, case.vocab_size, (1, sum(lengths)))
        labels = ids.clone()
        labels[0, offsets[:-1].long()] = -100
        labels[0, 5:9] = -100
        ids[0, 3] = PAD
        batch = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": max(lengths)}
        if case.batch == "packed with padding":
            for start, length, slot in zip(offsets.tolist(), real, lengths, strict=False):
                labels[0, start + length : start + slot] = -100
            counts = F.pad(torch.tensor(real).cumsum(0), (1, 0)).to(torch.int32)
            batch |= {"cu_seq_lens_q": counts, "cu_seq_lens_k": counts, "cu_seq_lens_q_padded": offsets}
            batch |= {"cu_seq_lens_k_padded": offsets, "pad_between_seqs": True}
        return {"input_ids": ids, "labels": labels, **batch}
    lengths = [13, 6 + index, 1]  # no multiple of anything
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    if case.batch == "padded left":
        mask = mask.flip(1)
    ids = torch.randint(0, case.vocab_size, mask.shape)
    ids = ids.masked_fill(~mask, PAD)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def _float64_loss(
    logits: torch.Tensor,
    labels: Any,
    vocab_size: int,
    shift_labels: torch.Tensor,
    num_items_in_batch: Any,
    **kwargs: Any,
) -> torch.Tensor:
    total = F.cross_entropy(logits.view(-1, vocab_size), shift_labels.reshape(-1), reduction="sum")
    return total / ((shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def train_alone(case: Case) -> dict[str, Any]:
    """Train in one process, with the batches of the whole mesh one after the other."""
    model = new_model(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = [new_batch(case, index) for index in range(case.replicate * case.shard)]
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    if case.batch == "padded left":  # nothing predicts the first token of a row
        labels -= sum(int((batch["attention_mask"].diff() == 1).sum()) for batch in batches)
    loss = sum(model(**batch, num_items_in_batch=torch.tensor(labels)).loss for batch in batches)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return {"loss": loss.detach(), "gradients": gradients, "norm": norm, "weights": dict(model.state_dict())}


def train_on_mesh(case: Case, folder: Path) -> dict[str, Any]:
    device = torch.get_default_device()
    mesh = make_mesh(case.sizes, device.type)
    if case.from_meta:
        weights = get_model_state_dict(new_model(case))
        with torch.device("meta"):
            model = new_model(case)
        model = parallelize(model, mesh)
        model.init_empty_weights(device)
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model = parallelize(new_model(case), mesh)
    misplaced = [
        name
        for name, weight in model.named_parameters()
        if isinstance(weight, DTensor) and not torch.equal(own_part(whole(weight.detach()), weight), weight.to_local())
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    index = mesh.get_local_rank("replicate") * case.shard + mesh.get_local_rank("shard")
    loss = model(**shard_context(new_batch(case, index), mesh)).loss
    loss.backward()
    loss = loss.detach().clone()
    for name in ("replicate", "shard", "context"):
        dist.all_reduce(loss, group=mesh.get_group(name))
    gradients = {
        name.removeprefix("module."): whole(parameter.grad).clone() for name, parameter in model.named_parameters()
    }
    # Optimizers expect summed gradients, with the placements of the weights.
    misplaced += [
        f"gradient of {name}"
        for name, weight in model.named_parameters()
        if isinstance(weight, DTensor) and weight.grad.placements != weight.placements
    ]
    norm = clip_gradients(model, 0.1)
    optimizer.step()
    result = {
        "loss": loss / (case.replicate * case.shard * case.context),
        "gradients": gradients,
        "norm": norm,
        "misplaced": misplaced,
        "weights": whole_state_dict(getattr(model, "module", model)),
    }
    if case.through_checkpoint:
        result["checkpoint"] = go_through_checkpoint(case, mesh, model, optimizer, folder)
    return result


def go_through_checkpoint(case: Case, mesh: Any, model: Any, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Save, load the whole checkpoint in one process, and load it into a fresh model and optimizer on the mesh."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    saved = folder / str(case).replace(" ", "")
    dcp.save(gather_halves(state), checkpoint_id=saved)
    flat = {f"model.{name}": torch.zeros(value.shape, dtype=value.dtype) for name, value in state["model"].items()}
    dcp.load(flat, checkpoint_id=saved)

    again = parallelize(new_model(case), mesh)
    new_optimizer = torch.optim.AdamW(again.parameters(), lr=0.5)
    like = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, new_optimizer)}
    loaded = gather_halves(like)
    dcp.load(loaded, checkpoint_id=saved)
    loaded = scatter_halves(loaded, like)
    set_model_state_dict(again, loaded["model"])
    set_optimizer_state_dict(again, new_optimizer, loaded["optimizer"])
    differences = [
        name
        for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True)
        if not torch.equal(whole(parameter), whole(other))
        or parameter.placements != other.placements
        or any(
            not torch.equal(whole(value), whole(new_optimizer.state[other][key]))
            or getattr(value, "placements", None) != getattr(new_optimizer.state[other][key], "placements", None)
            for key, value in optimizer.state[parameter].items()
        )
    ]
    return {
        "weights": {name.removeprefix("model."): value for name, value in flat.items()},
        "differences": differences,
        "learning_rate": new_optimizer.param_groups[0]["lr"],
    }


def compute_in_bfloat16() -> float:
    """Return the difference between the losses of a float32 model that computes in bfloat16 and of a bfloat16 model."""
    case = Case(shard=2, dtype=torch.float32)
    mesh = make_mesh(case.sizes, torch.get_default_device().type)
    batch = new_batch(case, mesh.get_local_rank("shard"))
    expected = new_model(case).to(torch.bfloat16)(**batch).loss
    model = parallelize(new_model(case), mesh, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    loss = model(**batch).loss
    loss.backward()
    kept = all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    return float((loss - expected).abs()) if kept else float("inf")


def wrapped_in_fsdp() -> dict[str, list[str]]:
    """Return the modules besides the layers that FSDP wraps, by mesh and dtypes. The models are float32."""

    def wrapped(case: Case, **dtypes: torch.dtype) -> list[str]:
        model = parallelize(new_model(case), make_mesh(case.sizes, torch.get_default_device().type), **dtypes)
        modules = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        layers = [name for name in modules if name.startswith("model.layers.")]
        assert len(layers) == (len(model.model.layers) if modules else 0)
        return [name for name in modules if name not in layers]

    tensor, shard = Case(tensor=2, dtype=torch.float32), Case(shard=2, dtype=torch.float32)
    return {
        "tensor": wrapped(tensor),
        "tensor, float32 summed in bfloat16": wrapped(tensor, compute_dtype=torch.float32, reduce_dtype=torch.bfloat16),
        "tensor, computed in bfloat16": wrapped(tensor, compute_dtype=torch.bfloat16),
        "shard": wrapped(shard),
        "shard, tied": wrapped(dataclasses.replace(shard, tied=True)),
    }


def between_the_layers() -> dict[str, Any]:
    """Return the embeddings, the hidden states and the layers' inputs of a model on tensor ranks."""
    case = Case(tensor=2)
    batch = new_batch(case, 0)
    labels = batch.pop("labels")
    model = new_model(case)
    embeds_BSE = model.model.embed_tokens(batch.pop("input_ids")).detach()

    def run(model: NVLlamaForCausalLM) -> tuple[Any, torch.Tensor]:
        own_BSE = embeds_BSE.clone().requires_grad_()
        count = torch.tensor(7)
        outputs = model(
            inputs_embeds=own_BSE, labels=labels, num_items_in_batch=count, output_hidden_states=True, **batch
        )
        outputs.loss.backward()
        return outputs.hidden_states, own_BSE.grad

    expected, expected_gradient = run(model)
    split = parallelize(new_model(case), make_mesh(case.sizes, torch.get_default_device().type))
    seen: list[int] = []
    for layer in split.model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape[0]))
    states, gradient = run(split)
    return {
        "tokens": [embeds_BSE.shape[1], *seen],
        "hidden states": max(_error(*pair) for pair in zip(states, expected, strict=True)),
        "gradient": _error(gradient, expected_gradient),
    }


def context_from_outside(case: Case) -> dict[str, Any]:
    """Split sequences by the layers' own method and the loader, as the BioNeMo recipe does; return the differences."""
    device = torch.get_default_device()
    mesh = init_device_mesh(device.type, (1, 2), mesh_dim_names=("dp", "cp"))["cp"]
    batches = [new_batch(case, index) for index in range(2)]
    if case.format == "bshd":
        batches = [{name: value[:, :12] for name, value in batch.items()} for batch in batches]
        batches[0]["attention_mask"] = torch.ones_like(batches[0]["attention_mask"])
    collate = DataCollatorForContextParallel(lambda batch: batch, mesh, case.format, is_causal_lm=True)
    model, split = new_model(case).eval(), new_model(case).eval()
    for layer in split.model.layers:
        layer.set_context_parallel_group(mesh.get_group(), dist.get_process_group_ranks(mesh.get_group()), None)

    def load() -> Any:
        yield from map(collate, batches)
        raise KeyError("no such field")

    loader = ContextParallelDataLoaderWrapper(load() if mesh.get_local_rank() == 0 else None, mesh)
    found: dict[str, Any] = {"logits": [], "loss": []}
    try:
        for batch, part in zip(batches, iter(loader), strict=False):
            found["fields"] = sorted(part)
            part = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in part.items()}
            with torch.no_grad():
                expected, actual = model(**batch), split(**part)
            # Where each token of the part stands in the whole batch.
            place = torch.arange(batch["labels"].numel()).view(batch["labels"].shape)
            seen = context_part({**batch, "place": place}, mesh.get_local_rank(), 2)["place"]
            real = part["shift_labels"] != -100
            found["logits"].append(_error(actual.logits[real], expected.logits.flatten(0, 1)[seen][real]))
            total = torch.stack((actual.loss * real.sum(), real.sum()))
            dist.all_reduce(total, group=mesh.get_group())
            found["loss"].append(_error(total[0] / total[1], expected.loss))
        next(loader)
    except (KeyError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def refusals() -> dict[str, str]:
    """Return the error messages for requests that a mesh cannot fulfil."""
    heard: dict[str, str] = {}

    def hear(name: str, ask: Any) -> None:
        try:
            ask()
        except (ValueError, RuntimeError) as error:
            heard[name] = str(error)

    config = {**TINY, "layer_implementation": "reference"}
    device = torch.get_default_device().type
    if dist.get_world_size() == 4:
        width = NVLlamaForCausalLM(NVLlamaConfig(**{**config, "hidden_size": 65, "head_dim": 16}))
        hear("width", lambda: parallelize(width, make_mesh(ParallelSizes(tensor=2), device)))
        return heard
    hear("processes", lambda: make_mesh(ParallelSizes(tensor=4), device))
    mesh = make_mesh(ParallelSizes(tensor=2), device)
    heads = NVLlamaForCausalLM(NVLlamaConfig(**{**config, "num_key_value_heads": 1}))
    hear("heads", lambda: parallelize(heads, mesh))
    features = NVLlamaForCausalLM(NVLlamaConfig(**{**config, "intermediate_size": 97}))
    hear("features", lambda: parallelize(features, mesh))
    split = parallelize(NVLlamaForCausalLM(NVLlamaConfig(**config)), mesh)
    odd = {"input_ids": torch.ones(1, 5, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32)}
    hear("tokens", lambda: split(**odd))
    return heard


def errors_of(case: Case, folder: Path) -> dict[str, Any]:
    """Return the largest differences between mesh and single process, relative to each tensor's largest value."""
    alone, mesh = train_alone(case), train_on_mesh(case, folder)
    errors: dict[str, Any] = {"loss": _error(mesh["loss"], alone["loss"]), "norm": _error(mesh["norm"], alone["norm"])}
    errors["misplaced"] = mesh["misplaced"]
    for kind in ("gradients", "weights"):
        errors[f"missing {kind}"] = sorted(alone[kind].keys() ^ mesh[kind].keys())
        errors[kind] = {name: _error(value, alone[kind][name]) for name, value in mesh[kind].items()}
    if case.through_checkpoint:
        checkpoint = mesh["checkpoint"]
        errors["checkpoint"] = checkpoint["differences"]
        errors["learning rate"] = checkpoint["learning_rate"] - 0.01
        errors["checkpoint weights"] = {
            name: _error(checkpoint["weights"][name], alone["weights"][name]) for name in checkpoint["weights"]
        }
    return errors


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return float("inf")
    return float((value.cpu() - expected.cpu()).abs().max() / expected.abs().max())


def run(rank: int, world_size: int, device: str, folder: Path) -> None:
    """Run one process; it writes its findings to a file."""
    join(rank, world_size, device, folder / "store")
    findings: dict[str, Any] = {}
    try:
        for case in CASES[world_size]:
            findings[str(case)] = errors_of(case, folder)
        if world_size == 2:
            findings["bfloat16"] = compute_in_bfloat16()
            findings["wrapped in FSDP"] = wrapped_in_fsdp()
            findings["between the layers"] = between_the_layers()
            for case in (Case(batch="packed with padding"), Case(batch="padded right", format="bshd")):
                findings[f"context from outside, {case.format}"] = context_from_outside(case)
        findings["refusals"] = refusals()
    except Exception:
        findings["stopped by"] = traceback.format_exc()
    torch.save(findings, folder / f"findings-{rank}.pt")
    dist.destroy_process_group()
