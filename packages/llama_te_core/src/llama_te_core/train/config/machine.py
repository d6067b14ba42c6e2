"""The checks of a configuration against the machine: packages, GPUs and files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ...layers import transformer_engine_problem
from .model import config_json
from .run import TrainConfig


def check_machine(config: TrainConfig, world_size: int) -> None:
    """Refuse a run that this machine cannot do.

    Args:
        config: The run.
        world_size: The number of processes.

    Raises:
        FileNotFoundError: `model.checkpoint` or `log.inspect` is a path that does not exist.
        RuntimeError: A package or a GPU is missing.
        ValueError: The mesh, the data or the checkpoint do not fit.
    """
    config.parallel.sizes.resolve(world_size)
    problem = transformer_engine_problem()
    if config.precision.is_quantized and (problem or config.model.layer_implementation == "reference"):
        problem = problem or "model.layer_implementation is 'reference'"
        raise RuntimeError(
            f"precision.compute={config.precision.compute!r} needs Transformer Engine layers on an NVIDIA GPU, but "
            f"{problem}. Use precision.compute='bf16' here."
        )
    if config.profile.memory_at is not None and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile.memory_at={config.profile.memory_at} records a GPU's memory, and torch finds no GPU: use null."
        )
    if config.log.wandb_project is not None:
        _needs("wandb", f"log.wandb_project={config.log.wandb_project!r}", "wandb")
    if config.log.inspect is not None:
        _needs("nvdlfw_inspect", f"log.inspect={config.log.inspect!r}", "nvdlfw-inspect")
        if not Path(config.log.inspect).is_file():
            raise FileNotFoundError(
                f"log.inspect={config.log.inspect!r} is no file: give a YAML file of features, such as "
                "examples/inspect.yaml."
            )
    if config.export.hf:
        from ...models.conversion import conversion  # here, since it imports transformers

        conversion("export.hf=True")
    checkpoint = config.model.checkpoint
    if checkpoint is None:
        return
    path = Path(checkpoint)
    if not path.exists() and (path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1):
        raise FileNotFoundError(f"model.checkpoint={checkpoint!r} is no path that exists, and no hub id (owner/name).")
    if config.model.is_converted:
        from ...models.conversion import conversion  # here, since it imports transformers

        converter = conversion(f"model.checkpoint={checkpoint!r} is not in the Transformer Engine layout, and this")
        if content := config_json(path):
            config.check_model(converter.te_config(content))  # before the conversion, which takes minutes
    elif (path / ".metadata").is_file():
        raise ValueError(
            f"model.checkpoint={checkpoint!r} is a checkpoint of a run, which goes on in its own folder. To begin "
            f"another run with its weights, convert it (llama-te-convert to-hf {checkpoint} ./start) and give ./start, "
            "or give the `te` folder that a finished run exports."
        )
    elif path.is_dir():
        config.check_model(config.model_config(path))


def _needs(module: str, why: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RuntimeError(f"{why} needs the package {package}: pip install {package}")
