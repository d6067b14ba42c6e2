"""Opening a checkpoint of any supported format."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..configs.config_file import CONFIG_NAME, has_te_layout, read_config
from ..errors import CheckpointError, CheckpointWarning, first_line
from .file_names import (
    ADAPTER_CONFIG,
    DCP_METADATA,
    DISTRIBUTED_SHARD,
    SAFETENSORS,
    TORCH_SAVE,
    left_over,
    variants,
    weights_named_by_config,
)
from .safetensors import SafetensorsFolder
from .tensor_source import TensorSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Files to download from a repository on the hub beside the weights: those that a conversion reads or copies.
_HUB_PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*", "README.md"]
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: Its location, for messages.
        config: The content of its `config.json`, or the equivalent that was read from a GGUF file.
        source: Its tensors.
    """

    path: str
    config: dict[str, Any]
    source: TensorSource

    @property
    def is_te(self) -> bool:
        """Whether it has the Transformer Engine layout."""
        return has_te_layout(self.config)


def find_checkpoint(
    location: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    allow_pickle: bool = False,
    hub_options: Mapping[str, Any] = _NO_OPTIONS,
) -> Path:
    """Find the folder or file of a checkpoint. A repository on the hub is downloaded into huggingface_hub's cache.

    Args:
        location: A local folder, a GGUF file, or the id of a repository on the hub ("organisation/name").
        revision: A branch, a tag or a commit of the repository; `None` takes its main branch.
        subfolder: The folder of the checkpoint inside the folder or repository.
        allow_pickle: Whether to download `.bin` files if the repository has no others.
        hub_options: Further arguments of huggingface_hub's download.

    Raises:
        CheckpointError: There is no such checkpoint, or an option does not apply to it.
    """
    path = Path(location).expanduser()
    if not path.exists():
        path = _download(location, revision, subfolder, allow_pickle, hub_options)
    elif revision is not None:
        raise CheckpointError(f"revision={revision!r} has no effect: {location} is a local path.")
    if not subfolder:
        return path
    if path.is_file():
        raise CheckpointError(f"subfolder={subfolder!r} has no effect: {location} is a file.")
    if not (path / subfolder).is_dir():
        raise CheckpointError(f"{location} has no folder {subfolder!r}.")
    return path / subfolder


def check_hub_id(location: str) -> None:
    """Refuse a location that is no local path and cannot be the id of a repository on the hub.

    Raises:
        CheckpointError: The message names the location.
    """
    if not _HUB_ID.fullmatch(location):
        raise CheckpointError(f"{location} does not exist, and is not the id of a repository on the hub (owner/name).")


def find_gguf(
    location: str,
    name: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    hub_options: Mapping[str, Any] = _NO_OPTIONS,
) -> Path:
    """Find a GGUF file by the folder or repository that it lies in, as transformers does.

    Args:
        location: A local folder, or the id of a repository on the hub.
        name: The file's name in it, or the path of a local file.
        revision: A branch, a tag or a commit of the repository.
        subfolder: The folder of the file inside the folder or repository.
        hub_options: Further arguments of huggingface_hub's download.

    Raises:
        CheckpointError: There is no such file.
    """
    folder = Path(location).expanduser() / subfolder
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    if folder.exists():
        raise CheckpointError(f"{folder} has no file {name!r}.")
    check_hub_id(location)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(location, name, subfolder=subfolder or None, revision=revision, **hub_options))
    except Exception as error:  # any failure of the download is reported in one line
        raise not_on_the_hub(location, error) from error


def refuse_adapter(path: Path) -> None:
    """Refuse a folder that has an adapter beside a model.

    Raises:
        CheckpointError: The message names the folder.
    """
    if (path / ADAPTER_CONFIG).is_file() and (path / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path} has an adapter ({ADAPTER_CONFIG}) beside the model, and transformers loads both: merge it into "
            "the model (merge_and_unload), or move its files to another folder."
        )


def _download(
    location: str, revision: str | None, subfolder: str, allow_pickle: bool, hub_options: Mapping[str, Any]
) -> Path:
    check_hub_id(location)
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    for weights in ("*.safetensors", "*.bin") if allow_pickle else ("*.safetensors",):
        patterns = [prefix + pattern for pattern in (weights, *_HUB_PATTERNS)]
        try:
            path = Path(snapshot_download(location, revision=revision, allow_patterns=patterns, **hub_options))
        except Exception as error:  # any failure of the download is reported in one line
            raise not_on_the_hub(location, error) from error
        if any((path / prefix).glob(weights)):
            return path
    _refuse_without_weights(location, revision, prefix, allow_pickle)
    return path


def _refuse_without_weights(location: str, revision: str | None, prefix: str, allow_pickle: bool) -> None:
    """Refuse a repository on the hub whose weights were not downloaded, and say which weights it has."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(location, revision=revision)
    except Exception as error:  # such as no connection
        raise CheckpointError(
            f"{location} has no .safetensors files in huggingface_hub's cache, and the hub cannot be asked for others: "
            f"{first_line(error)}"
        ) from error
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if not allow_pickle and any(name.startswith("pytorch_model") and name.endswith(".bin") for name in own):
        raise _pickled(location)
    files = [name for name in own if name.endswith(".gguf")]
    if files:
        raise CheckpointError(f"{location} has GGUF files, such as {files[0]}: download one of them and name the file.")
    if ADAPTER_CONFIG in own:
        raise _adapter_alone(location)


def _pickled(location: object) -> CheckpointError:
    return CheckpointError(
        f"{location} has its tensors in pickle files ({TORCH_SAVE.single_file}), which can run code when they are "
        "read: say --allow-pickle to read them with a reader that runs none."
    )


def _adapter_alone(location: object) -> CheckpointError:
    return CheckpointError(
        f"{location} is an adapter of PEFT, without a model: convert it with llama-te-convert adapter-to-te, or "
        "adapter-to-hf for one of the Transformer Engine layout."
    )


def not_on_the_hub(location: str, error: Exception) -> CheckpointError:
    """The error for a checkpoint that is neither a local path nor available on the hub."""
    return CheckpointError(
        f"{location} is not a local path, and cannot be downloaded from the hub: {first_line(error)}"
    )


def open_checkpoint(path: Path, *, variant: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint: safetensors (one file or shards), GGUF, or PyTorch's distributed format.

    A folder may have weights in several files of which one save is newer. The order is that of transformers: the file
    that `transformers_weights` in `config.json` names, `model.safetensors`, its index, `pytorch_model.bin`, its index.
    A `CheckpointWarning` names the weights that are left out.

    Args:
        path: A folder, or a GGUF file.
        variant: The variant of the weights, such as "fp16" for `model.fp16.safetensors`.
        allow_pickle: Whether to read `pytorch_model.bin` files. No code in them is run.

    Raises:
        CheckpointError: The path is not a checkpoint, or the checkpoint is not valid.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file, but not a GGUF file: give the folder of the checkpoint.")
        if variant:
            raise CheckpointError(f"variant={variant!r} has no effect: {path} is a file.")
        from .gguf import GGUFSource, gguf_config

        return Checkpoint(str(path), gguf_config(path), GGUFSource(path))
    if any(DISTRIBUTED_SHARD.fullmatch(each.name) for each in path.iterdir()):
        raise CheckpointError(
            f"{path} has the shards of save_pretrained(distributed_checkpoint=True), which transformers reads before "
            "other files: load it with transformers and save it without distributed_checkpoint."
        )
    safetensors, torch_save = SAFETENSORS.of_variant(variant), TORCH_SAVE.of_variant(variant)
    config = read_config(path) if (path / CONFIG_NAME).exists() else {}
    entry = weights_named_by_config(config, path) or safetensors.find(path)
    source: TensorSource
    if entry is not None:
        config = config or read_config(path)
        source = SafetensorsFolder(path, entry)
        read = {entry, *source.files}
    elif variant is None and (path / DCP_METADATA).exists():
        from .dcp import DCPSource

        config = config or read_config(path)
        source, read = DCPSource(path), {DCP_METADATA}
    elif (entry := torch_save.find(path)) is not None:
        if not allow_pickle:
            raise _pickled(path)
        from .torch_save import TorchSaveSource

        config = config or read_config(path)
        source = TorchSaveSource(path, entry)
        read = {entry, *source.files}
    else:
        raise _no_tensors(path, variant)
    names = left_over(path, read)
    if names:
        warnings.warn(
            f"{path} has more weights than one model: {_some(sorted(read))} is read, as transformers reads it, and "
            f"{_some(names)} is left out. Remove the files that are out of date.",
            CheckpointWarning,
            stacklevel=2,
        )
    return Checkpoint(str(path), config, source)


def _no_tensors(path: Path, variant: str | None) -> CheckpointError:
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter_alone(path)
    others = [each for each in variants(path) if each != variant]
    if others:
        wanted = "without a variant" if variant is None else f"of the variant {variant!r}"
        return CheckpointError(
            f"{path} has no weights {wanted}, but of {', '.join(map(repr, others))}: name one with --variant "
            f"{others[0]}."
        )
    searched = [*SAFETENSORS.of_variant(variant), DCP_METADATA, TORCH_SAVE.of_variant(variant).single_file]
    return CheckpointError(f"{path} has no tensors: looked for {', '.join(searched)}. For GGUF, name the file.")


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
