"""The state of a training run for a checkpoint: model, optimizer, random numbers, and each process's own state."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Mapping, MutableMapping, Set
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from ...compat.torch import FSDP_CLASS_PREFIX, uncompiled
from ...compat.transformer_engine import MASTER_WEIGHT
from ...files.pickles import PickleFileError, RefusedNameError
from ...files.torch_archive import Region, load_value
from ...layers.collectives import local_part
from ...precision.scaling_state import scaling_state, set_scaling_state

# Loading keeps these options of the given optimizer. The learning rate comes from the checkpoint, since a scheduler may
# compute it from the last rate. Other entries are state: Transformer Engine's optimizer counts its steps in its groups.
_OPTIONS = ("betas", "eps", "weight_decay")


class TrainingCheckpointError(RuntimeError):
    """A checkpoint cannot be saved or loaded."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the model within wrappers of torch.compile and DDP.

    Raises:
        TypeError: The model is not a model of transformers.
    """
    inner: Any = uncompiled(model)
    while isinstance(inner, DistributedDataParallel):
        inner = uncompiled(inner.module)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model is a {type(inner).__name__}: it must be a model of transformers or of this package.")
    return inner


def saved_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration that the model's own `save_pretrained` would write."""
    config = copy.deepcopy(model.config)
    config.architectures = [
        type(model).__name__.removeprefix(FSDP_CLASS_PREFIX)
    ]  # fully_shard makes a class of that name
    config.dtype = model.dtype
    return config


@torch.no_grad()
def weights_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the model's state dict. It shares the model's memory, or the optimizer's for weights kept there in FP32.

    Raises:
        ValueError: Weights exist in a quantized format only.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    for name, value in state.items():
        part = local_part(value)
        if type(part) not in (nn.Parameter, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(part).__name__}, which no checkpoint of a training run can hold: train with "
                "llama_te_core.train.optimizers.make_optimizer, which keeps weights in FP32 too, or with "
                "use_quantized_model_init=False."
            )
    return state


def optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by the names of the parameters, and its groups as bytes."""
    untouched = not optimizer.state
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if untouched:
        # torch has made a state with a step of zero gradients, which would count as a step of training.
        optimizer.state.clear()
        state["state"] = {}
    return {"state": _without_masters(state["state"]), "groups": to_bytes(state["param_groups"])}


def _without_masters(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return an optimizer's state without weights, which belong to the model in a checkpoint."""
    return {name: {key: value for key, value in each.items() if key != MASTER_WEIGHT} for name, each in state.items()}


def empty_optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, saved: Set[str]) -> dict[str, Any]:
    """Return tensors into which torch can load the state of the `saved` parameters."""
    optimizer.zero_grad()
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if state["state"].keys() != saved:
        # torch makes the tensors by a step with gradients of zero, but only where there are neither state nor
        # gradients. Clear the state only if it differs: in some versions Adagrad has its state from the beginning, and
        # no step makes it again.
        optimizer.state.clear()
        state = get_optimizer_state_dict(model, optimizer)
    return _without_masters({name: value for name, value in state["state"].items() if name in saved})


def set_optimizer_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    """Load an optimizer's state, and the options that a run does not set itself.

    Raises:
        TrainingCheckpointError: The groups differ from the saved ones.
    """
    target: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    saved = [sorted(group["params"]) for group in groups]
    there = [sorted(group["params"]) for group in target["param_groups"]]
    if saved != there:
        raise TrainingCheckpointError(
            f"optimizer has groups of {list(map(len, there))} parameters, but the checkpoint has groups of "
            f"{list(map(len, saved))}, or of others: give each group the parameters that it had."
        )
    groups = [
        group | {name: own[name] for name in _OPTIONS if name in own and not (name == "betas" and _moves_betas(group))}
        for group, own in zip(groups, target["param_groups"], strict=True)
    ]
    for name, each in state.items():
        if MASTER_WEIGHT in target["state"].get(name, {}):
            each[MASTER_WEIGHT] = target["state"][name][
                MASTER_WEIGHT
            ]  # loaded with the model's weights, whose memory it is
    # Not strict: a parameter that no step had changed before the save has no state in the checkpoint.
    set_optimizer_state_dict(
        model, optimizer, {"state": state, "param_groups": groups}, options=StateDictOptions(strict=False)
    )


def _moves_betas(group: dict[str, Any]) -> bool:
    """Tell whether a scheduler of torch moves a group's betas. Such a scheduler keeps their range in the group."""
    return "base_momentum" in group


def own_state(model: nn.Module, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that belongs to this process: random numbers, scaling state and `extra`."""
    return {
        "random": _random_state(),
        "scaling": scaling_state(model),
        "extra": {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in extra.items()},
    }


def set_own_state(state: dict[str, Any], model: nn.Module, extra: MutableMapping[str, Any], same_ranks: bool) -> None:
    """Load the state that `own_state` returned. Random numbers need the same number of ranks.

    Raises:
        TrainingCheckpointError: `extra` has a name that the checkpoint lacks.
    """
    for name, value in extra.items():
        if name not in state["extra"]:
            names = ", ".join(map(repr, state["extra"])) or "nothing"
            raise TrainingCheckpointError(f"extra has {name!r}, but the checkpoint has {names} as extra.")
        if isinstance(value, Stateful):
            value.load_state_dict(state["extra"][name])
        else:
            extra[name] = state["extra"][name]
    set_scaling_state(model, state["scaling"])
    if same_ranks:
        _set_random_state(state["random"])


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


def on_host(state: Any) -> Any:
    """Copy a state to the host's memory, so that training does not change the copy."""

    def copied(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: copied(each) for key, each in value.items()}
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", non_blocking=True, copy=True)  # a GPU copies into pinned memory
        return copy.deepcopy(value)

    result = copied(state)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # the copies must end before the next step changes the tensors
    return result


def to_bytes(value: Any) -> bytes:
    """Return the bytes that torch.save writes for a value.

    Raises:
        TrainingCheckpointError: `from_bytes` would refuse them.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getvalue()
    try:
        load_value(Region(data))
    except PickleFileError as error:
        what = f"a {error.name}" if isinstance(error, RefusedNameError) else f"a value that {error}"
        raise TrainingCheckpointError(
            f"the state of a process has {what}, which no checkpoint can hold, since loading it could run any code: "
            "give extra numbers, texts, bytes, tensors, arrays of NumPy, and their lists, tuples, sets and dicts."
        ) from error
    return data


def from_bytes(data: Any) -> Any:
    """Return the value that `to_bytes` saved, with tensors on the host.

    Raises:
        PickleFileError: The bytes are damaged, or hold something else.
    """
    if not isinstance(data, bytes):
        raise PickleFileError(f"is damaged: it holds a {type(data).__name__} where bytes belong")
    return load_value(Region(data))
