"""Checkpoints converted to the Transformer Engine layout while they are read into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from llama_te_core.models.conversion import ConvertedCheckpoint

from .configs.architectures import architecture_of
from .configs.config_file import head_sizes
from .configs.model_config import refuse_quantized, te_config
from .errors import CheckpointError
from .layout.row_ranges import converted_tensors
from .layout.tensor_info import TensorInfo
from .sources.checkpoint import find_checkpoint, find_gguf, open_checkpoint, refuse_adapter
from .sources.own_head import has_own_head
from .sources.torch_tensors import as_bytes, torch_dtype
from .targets.new_folder import kept_whole
from .targets.stream import TensorStream, stream
from .verify.report_text import layer_of

_TE_TENSOR = "self_attention.layernorm_qkv.weight"


def load_converted(
    source: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    allow_pickle: bool = False,
    hub_options: Mapping[str, Any] | None = None,
) -> ConvertedCheckpoint | None:
    """Read a checkpoint and convert it to the Transformer Engine layout.

    Args:
        source: A folder, the id of a repository on the hub, or a GGUF file.
        gguf_file: The GGUF file in the folder or repository.
        revision: A branch, a tag or a commit of the repository; `None` takes its main branch.
        subfolder: The folder of the checkpoint inside the source.
        variant: The variant of the weights, such as "fp16" for `model.fp16.safetensors`.
        allow_pickle: Whether to read `pytorch_model.bin` if there is nothing else. No code in it is run.
        hub_options: Further arguments of huggingface_hub's downloads, such as `token`.

    Returns:
        The converted checkpoint; `None` if its tensors have the Transformer Engine layout already.

    Raises:
        CheckpointError: The checkpoint cannot be read or converted.
    """
    find: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "hub_options": hub_options or {}}
    if gguf_file is not None:
        path = find_gguf(source, gguf_file, **find)
    else:
        path = find_checkpoint(source, allow_pickle=allow_pickle, **find)
    refuse_adapter(path)
    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(kept_whole(path))
        checkpoint = open_checkpoint(path, variant=variant, allow_pickle=allow_pickle)
        until_the_end.enter_context(contextlib.closing(checkpoint.source))
        if checkpoint.is_te or any(name.endswith(_TE_TENSOR) for name in checkpoint.source.tensors):
            return None
        refuse_quantized(checkpoint.config)
        changes = {"tie_word_embeddings": False} if has_own_head(checkpoint) else {}
        config = te_config(checkpoint.config, **changes)
        for name in checkpoint.source.tensors:
            if (layer_of(name) or 0) >= config.num_hidden_layers:
                raise CheckpointError(
                    f"{checkpoint.path} has the tensor {name!r}, but its configuration has {config.num_hidden_layers} "
                    "layers: correct num_hidden_layers there."
                )
        sizes = head_sizes(checkpoint.config, checkpoint.path)
        rules = architecture_of(checkpoint.config).rules
        tensors = converted_tensors(checkpoint.source.tensors, sizes, to_te=True, rules=rules)
        loaded = {each.name: _read(stream(each, checkpoint.source)) for each in tensors}
    return ConvertedCheckpoint(config, loaded, path.parent if path.is_file() else path)


def _read(tensor: TensorStream) -> torch.Tensor:
    info: TensorInfo = tensor.info
    made = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="cpu")
    if info.nbytes:
        view, done = as_bytes(made), 0
        for chunk in tensor.chunks():
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
    return made
