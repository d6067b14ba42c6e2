"""The model of a run: built in parts on each process, filled from a seed or a checkpoint, written as a whole.

Weights depend on the seed or the checkpoint alone, not on how many processes there are: each process makes or reads one
whole tensor at a time and keeps its part.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..models.configuration_nvllama import NVLlamaConfig
from ..models.modeling_nvllama import NVLlamaForCausalLM
from ..parallel.mesh import parallelize, process_rank, whole_state_dict
from ..parallel.tensor import own_part
from .activation_checkpointing import checkpoint_activations
from .activation_offload import offload_activations
from .config import DTYPES, TrainConfig
from .optimizers import quantized_parameters, scale_parts_as_one, set_value
from .training_loss import return_loss_alone

# The whole tensor of a name, of the shape and dtype of the one given, on its device.
Weights = Callable[[str, torch.Tensor], torch.Tensor]


def build_model(
    config: TrainConfig, model_config: NVLlamaConfig, weights: Weights, mesh: DeviceMesh | None, device: torch.device
) -> tuple[NVLlamaForCausalLM, nn.Module]:
    """The model in training mode, split over the mesh, whose call returns the loss.

    Args:
        config: The run.
        model_config: The model's configuration.
        weights: Where its values come from.
        mesh: None for one process.
        device: Where it is trained.

    Returns:
        The model, and what is called in its place, which may be DDP's wrapper around it.

    Raises:
        RuntimeError: This machine cannot compute in the run's precision.
        ValueError: The model cannot be shared out over the mesh, or the weights are of another.
    """
    precision, parallel = config.precision, config.parallel
    sizes = (1, 1, 1, 1) if mesh is None else mesh.shape
    # Whole on no process, or to be quantized, which FSDP has to have split before it can gather it.
    in_parts = sizes[1] * sizes[2] * sizes[3] > 1 or (precision.quantized_weights and mesh is not None)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(precision.weights_dtype)
    try:
        with torch.device("meta" if in_parts else device):
            model = NVLlamaForCausalLM(model_config, **precision.recipes())
    finally:
        torch.set_default_dtype(dtype)
    model.tie_weights()
    return_loss_alone(model, mesh, z_loss=config.optimizer.z_loss, chunk_tokens=config.optimizer.loss_chunk_tokens)
    checkpoint_activations(model, config.activation_checkpointing)
    offload_activations(model, config.activation_offload_layers)
    if not in_parts:
        fill(model, weights)
    called: nn.Module = model
    if mesh is not None:
        if precision.quantized_weights:
            _check_even_rows(model, sizes[1] * sizes[2])
        called = parallelize(
            model,
            mesh,
            compute_dtype=precision.compute_dtype,
            reduce_dtype=DTYPES[precision.reduce],
            reshard_after_forward=parallel.reshard_after_forward,
            context_kind=parallel.context_kind,
        )
    if in_parts:
        model.init_empty_weights(device)
        scale_parts_as_one(model)
        fill(model, weights)
    model.train()
    return model, called


def _check_even_rows(model: NVLlamaForCausalLM, parts: int) -> None:
    for name, weight in model.model.layers.named_parameters():
        if weight.dim() == 2 and weight.shape[0] % parts:
            raise ValueError(
                f"parallel.shard x context={parts} does not divide the {weight.shape[0]} rows of layers.{name}, but "
                "Transformer Engine gathers quantized weights of equal parts alone: choose numbers that do, or use "
                "precision.quantized_weights=False."
            )


@torch.no_grad()
def fill(model: NVLlamaForCausalLM, weights: Weights) -> None:
    """Give a model's parameters their values, each process its part; tied ones once.

    Args:
        model: Before or after `parallelize`.
        weights: Where values come from; asked for each parameter in turn.
    """
    quantized = set(quantized_parameters(model))
    for name, parameter in model.named_parameters():
        value = weights(name, parameter)
        if isinstance(parameter, DTensor):
            value = own_part(value, parameter)
        set_value(parameter, value, parameter in quantized)


def random_weights(seed: int, config: NVLlamaConfig) -> Weights:
    """Normally distributed matrices, and norms of ones, the same for any number of processes.

    Args:
        seed: Decides the values, with each parameter's name.
        config: Tells the standard deviation.
    """

    def weights(name: str, like: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if whole.dim() == 1:
            return whole.fill_(1)
        generator = torch.Generator(like.device).manual_seed((seed << 32) + zlib.crc32(name.encode()))
        return whole.normal_(0, config.initializer_range, generator=generator)

    return weights


def checkpoint_weights(folder: Path) -> Weights:
    """The tensors of a folder that `NVLlamaForCausalLM.save_pretrained` or `llama-te-convert to-te` has written.

    Args:
        folder: With its safetensors files, and their index if there are several.

    Raises:
        FileNotFoundError: There are none.
    """
    index = folder / "model.safetensors.index.json"
    files: dict[str, str] = {}
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", "pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise FileNotFoundError(
            f"model.checkpoint={str(folder)!r} has no model.safetensors and no index of several: give the folder of a "
            "whole checkpoint."
        )

    def weights(name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in files:
            raise ValueError(f"model.checkpoint={str(folder)!r} has no {name}: it is of another model, or not whole.")
        with safe_open(folder / files[name], "pt") as file:
            whole = file.get_tensor(name)
        if whole.shape != like.shape:
            raise ValueError(
                f"model.checkpoint={str(folder)!r} has {name} of {list(whole.shape)}, but its config.json means "
                f"{list(like.shape)}: they do not fit together."
            )
        return whole.to(like.device, like.dtype)

    return weights


def converted(checkpoint: str, folder: Path) -> Path:
    """The folder of a Hugging Face checkpoint in the Transformer Engine layout; rank 0 converts it once.

    Args:
        checkpoint: A folder, hub id or GGUF file.
        folder: Where to; all processes see it.
    """
    if process_rank() == 0:
        from llama_te_convert import convert_checkpoint

        convert_checkpoint(checkpoint, folder, to_te=True)
    if dist.is_initialized():
        dist.barrier()
    return folder


def export_te(model: NVLlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write a model as `from_pretrained` loads it, from rank 0, which gathers it on the host; all processes call this.

    Args:
        model: Split or not.
        tokenizer: Goes along; None for none.
        folder: Replaced if it is there.
    """
    state = whole_state_dict(model)
    if process_rank() != 0:
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def export_hf(folder_te: Path, folder_hf: Path) -> None:
    """Convert an exported folder to Hugging Face's layout; rank 0 alone, which needs no other for it.

    Args:
        folder_te: What `export_te` wrote.
        folder_hf: Replaced if it is there.
    """
    if process_rank() == 0:
        from llama_te_convert import convert_checkpoint

        shutil.rmtree(folder_hf, ignore_errors=True)
        convert_checkpoint(str(folder_te), folder_hf, to_te=False)
