"""The model of a run, built in parts on each process, with weights from a seed or a checkpoint.

Weights depend on the seed or the checkpoint alone, not on the number of processes: each process makes or reads one
whole tensor at a time and keeps its part.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..files.input_files import read_json
from ..models.causal_lm import NVLlamaForCausalLM
from ..models.configuration_nvllama import NVLlamaConfig
from ..parallel.parallelize import parallelize
from ..parallel.shards import own_part
from .activation_checkpointing import checkpoint_activations
from .activation_offload import offload_activations
from .config import TrainConfig
from .optimizers import quantized_parameters, scale_parts_as_one, set_value
from .training_loss import return_loss_alone

# Returns the whole tensor of a parameter's name, with the shape, dtype and device of the given tensor.
Weights = Callable[[str, torch.Tensor], torch.Tensor]


def build_model(
    config: TrainConfig, model_config: NVLlamaConfig, weights: Weights, mesh: DeviceMesh | None, device: torch.device
) -> tuple[NVLlamaForCausalLM, nn.Module]:
    """Build the model in training mode, split over the mesh. Calling it returns the loss.

    Args:
        config: The run.
        model_config: The model's configuration.
        weights: The source of its values.
        mesh: None for one process.
        device: The device of the training.

    Returns:
        The model, and the module to call, which may be DDP's wrapper around the model.

    Raises:
        RuntimeError: This machine cannot compute in the run's precision.
        ValueError: The mesh cannot share the model out, or the weights belong to another model.
    """
    precision, parallel = config.precision, config.parallel
    sizes = (1, 1, 1, 1) if mesh is None else mesh.shape
    # No process holds the whole model; and FSDP must split quantized weights before it can gather them.
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
            reduce_dtype=precision.reduce_dtype,
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
                "Transformer Engine gathers quantized weights in equal parts only: choose numbers that do, or use "
                "precision.quantized_weights=False."
            )


@torch.no_grad()
def fill(model: NVLlamaForCausalLM, weights: Weights) -> None:
    """Set the values of a model's parameters, on each process its part; tied parameters once.

    Args:
        model: Before or after `parallelize`.
        weights: The source of the values.
    """
    quantized = set(quantized_parameters(model))
    for name, parameter in model.named_parameters():
        value = weights(name, parameter)
        if isinstance(parameter, DTensor):
            value = own_part(value, parameter)
        set_value(parameter, value, parameter in quantized)


def random_weights(seed: int, config: NVLlamaConfig) -> Weights:
    """Return normally distributed matrices, and norms of ones, the same for any number of processes.

    Args:
        seed: Decides the values, together with each parameter's name.
        config: Gives the standard deviation.
    """

    def weights(name: str, like: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if whole.dim() == 1:
            return whole.fill_(1)
        generator = torch.Generator(like.device).manual_seed((seed << 32) + zlib.crc32(name.encode()))
        return whole.normal_(0, config.initializer_range, generator=generator)

    return weights


def _weight_map(index: Path) -> dict[str, str]:
    """Return the names of files by tensor, from the index of a checkpoint."""
    try:
        files = read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"model.checkpoint: {index} {error}.") from error
    if not isinstance(files, dict) or any(not isinstance(name, str) or "/" in name for name in files.values()):
        raise ValueError(f"model.checkpoint: {index} has no weight_map of tensors and files of its folder.")
    return files


def checkpoint_weights(folder: Path, *, tied: bool = False) -> Weights:
    """Return the tensors of a folder that `NVLlamaForCausalLM.save_pretrained` or `llama-te-convert to-te` wrote.

    Args:
        folder: Holds safetensors files, and an index if there are several.
        tied: Whether the model's head is its embedding.

    Raises:
        FileNotFoundError: There are none.
        ValueError: The head is tied, but the folder has a head with other values, which would be lost.
    """
    index = folder / "model.safetensors.index.json"
    files: dict[str, str] = {}
    # The single file comes first, as in transformers: an index beside it is left from an earlier save.
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", "pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    elif index.is_file():
        files = _weight_map(index)
    else:
        raise FileNotFoundError(
            f"model.checkpoint={str(folder)!r} has no model.safetensors and no index of several: give the folder of a "
            "whole checkpoint."
        )

    def stored(name: str) -> torch.Tensor:
        with safe_open(folder / files[name], "pt") as file:
            return cast(torch.Tensor, file.get_tensor(name))

    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if tied and {head, embeddings} <= files.keys() and not torch.equal(stored(head), stored(embeddings)):
        raise ValueError(
            f"model.checkpoint={str(folder)!r} has {head} and {embeddings} with different values, but its config.json "
            "has tie_word_embeddings=true: training would lose the head. Set tie_word_embeddings to false there."
        )

    def weights(name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in files:
            raise ValueError(
                f"model.checkpoint={str(folder)!r} has no {name}: it belongs to another model, or is not whole."
            )
        whole = stored(name)
        if whole.shape != like.shape:
            raise ValueError(
                f"model.checkpoint={str(folder)!r} has {name} of {list(whole.shape)}, but its config.json asks for "
                f"{list(like.shape)}: they do not fit together."
            )
        return whole.to(like.device, like.dtype)

    return weights
