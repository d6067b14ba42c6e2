"""GGUF files of a Llama, dequantized to float32, with the tensor names and values of transformers.

llama.cpp rotates neighbouring elements of a head, and transformers rotates the two halves of a head. The file therefore
has the query and key rows in another order, and this reader restores transformers' order.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_te_core.checkpoint_format import check_values
from llama_te_core.data.tokenizer_files import load_tokenizer
from llama_te_core.files.input_files import open_file

from ..errors import CheckpointError
from ..layout.tensor_info import TensorInfo
from .gguf_header import GGUFHeader, GGUFTensor, OtherByteOrderError, read_gguf_header
from .tensor_source import read_exactly

_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,8})\.(?P<rest>\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"
# transformers computes the rotary frequencies from the configuration.
_COMPUTED = re.compile(r"rope_freqs\.weight|blk\.[0-9]+\.attn_rot_embd\.weight")
# llama.cpp uses these values for Llama 3.1 and later. The file stores only the factors that result.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file.

    Attributes:
        offset: Position of its first byte.
        nbytes: Its bytes in the file.
        quantization: Its type in the file, an entry of `gguf.GGMLQuantizationType`.
        permuted_heads: Number of heads whose rows have llama.cpp's order; 0 if the rows are in transformers' order.
    """

    offset: int
    nbytes: int
    quantization: Any
    permuted_heads: int


class GGUFSource:
    """The tensors of a Llama's GGUF file.

    Args:
        path: The file.

    Raises:
        CheckpointError: The package `gguf` is not installed; the file cannot be read or does not hold a Llama; or a
            tensor does not belong to a Llama or has a type that `gguf` cannot dequantize.
    """

    concurrent = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, _Stored] = {}
        self._gguf = _import_gguf(path)
        self._file = _open(path)
        try:
            self._add_all(_read_header(self._gguf, self._file, path))
        except BaseException:
            self._file.close()
            raise

    def _add_all(self, header: GGUFHeader) -> None:
        unknown = []
        for tensor in header.tensors:
            name = _hf_name(tensor.name)
            if name is not None:
                self._add(name, tensor, header)
            elif not _COMPUTED.fullmatch(tensor.name):
                unknown.append(tensor.name)
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise CheckpointError(
                f"{self.path} has tensors that a Llama does not have: {', '.join(unknown[:8])}{more}. Mixtures of "
                "experts and biases are not supported."
            )

    def _add(self, name: str, tensor: GGUFTensor, header: GGUFHeader) -> None:
        shape, quantization = tensor.shape, self._gguf.GGMLQuantizationType(tensor.quantization)
        try:
            _, block_bytes = self._gguf.GGML_QUANT_SIZES[quantization]
            self._gguf.dequantize(np.zeros((1, block_bytes), np.uint8), quantization)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} has the type {quantization.name}, which the package gguf cannot "
                "dequantize. Take a file of another type, such as F16, BF16 or Q8_0."
            ) from error
        heads = 0
        if ".q_proj." in name or ".k_proj." in name:
            heads = _heads(header, self.path, key=".k_proj." in name)
            if len(shape) != 2 or shape[0] % (2 * heads):
                raise CheckpointError(
                    f"{self.path}: {tensor.name} {list(shape)} does not have the rows of {heads} heads."
                )
        self.tensors[name] = TensorInfo("float32", shape)
        self._stored[name] = _Stored(tensor.offset, tensor.nbytes, quantization, heads)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read rows of a tensor: see `TensorSource`."""
        return np.ascontiguousarray(self._rows(name, start, stop)).reshape(-1).view(np.uint8).data

    def _rows(self, name: str, start: int, stop: int) -> Any:
        info, stored = self.tensors[name], self._stored[name]
        if start >= stop:
            return np.empty(0, np.float32)
        if len(info.shape) == 1:
            return self._dequantized(name, 0, 1).reshape(-1)[start:stop]
        if not stored.permuted_heads:
            return self._dequantized(name, start, stop)
        wanted = _rows_in_file(np.arange(start, stop), info.rows // stored.permuted_heads)
        first = int(wanted.min())
        rows = self._dequantized(name, first, int(wanted.max()) + 1)
        return rows[wanted - first]

    def _dequantized(self, name: str, start: int, stop: int) -> Any:
        """Rows in the file's order. A tensor with one dimension is one row."""
        info, stored = self.tensors[name], self._stored[name]
        row_bytes = stored.nbytes // (info.rows if len(info.shape) > 1 else 1)
        raw = np.empty((stop - start, row_bytes), np.uint8)
        offset = stored.offset + start * row_bytes
        read_exactly(self._file.fileno(), raw.reshape(-1).data, offset, self.path, name)
        return self._gguf.dequantize(raw, stored.quantization)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def gguf_config(path: Path) -> dict[str, Any]:
    """The Hugging Face configuration of a Llama's GGUF file, as a dict.

    transformers reads the configuration from the file, but leaves out how Llama 3.1 and later scale rotary frequencies.
    This function adds the scaling.

    Raises:
        CheckpointError: The package `gguf` is not installed; the file cannot be read or does not hold a Llama; or it
            scales rotary frequencies in another way than Llama 3.
    """
    from transformers import AutoConfig

    gguf = _import_gguf(path)
    with _open(path) as file:
        header = _read_header(gguf, file, path)
        with _errors_of_transformers(path, "configuration"):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).to_dict()
        if config["model_type"] != "llama":
            raise CheckpointError(
                f"{path}: transformers reads it as a {config['model_type']!r} model, but only a Llama can be converted."
            )
        # The last two are the file's path.
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(name, None)
        config["architectures"] = ["LlamaForCausalLM"]
        try:
            check_values(config)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        config["rope_parameters"] = _rope_parameters(header, config, file, path)
    return dict(config)


def save_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file, with its chat template, as Hugging Face files.

    Args:
        path: The file.
        folder: The target folder.

    Raises:
        CheckpointError: The package `gguf` is not installed, or transformers cannot make a tokenizer from the file.
    """
    gguf = _import_gguf(path)
    with _open(path) as file:
        _read_header(gguf, file, path)  # transformers trusts the numbers in it
    with _errors_of_transformers(path, "tokenizer"):
        tokenizer = load_tokenizer(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer.save_pretrained(folder)


@contextmanager
def _errors_of_transformers(path: Path, what: str) -> Iterator[None]:
    """Turn every error into a `CheckpointError`. transformers does not document its errors for unusable files."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust code is not an Exception
        problem = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: transformers cannot make a {what} from it: {problem}.") from error


def _import_gguf(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, and reading it needs the package gguf: pip install gguf"
        ) from error


def _open(path: Path) -> BinaryIO:
    try:
        return open_file(path, buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_header(gguf: Any, file: BinaryIO, path: Path) -> GGUFHeader:
    """Read the header of a Llama's open file."""
    try:
        header = read_gguf_header(file, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except OtherByteOrderError as error:
        raise CheckpointError(
            f"{path} has another byte order than this machine: convert it with llama.cpp first."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a GGUF file, or it is damaged or not complete: {error}.") from error
    architecture, files = header.fields.get("general.architecture"), header.fields.get("split.count")
    if files not in (None, 0, 1):
        raise CheckpointError(f"{path} is one of {files} files: merge them first, with llama-gguf-split --merge.")
    if architecture != "llama":
        raise CheckpointError(f"{path} has the architecture {architecture!r}: only 'llama' can be converted.")
    return header


def _heads(header: GGUFHeader, path: Path, *, key: bool) -> int:
    """Number of query or key heads."""
    name = "llama.attention.head_count"
    heads = header.fields.get(name)
    if key:
        heads = header.fields.get(name + "_kv", heads)
    if type(heads) is not int or heads < 1:
        raise CheckpointError(f"{path}: its {name + '_kv' * key} is {heads!r}, but must be one number for all layers.")
    return heads


def _hf_name(name: str) -> str | None:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match is None or match["rest"] not in _LAYER_NAMES:
        return None
    return f"model.layers.{int(match['layer'])}.{_LAYER_NAMES[match['rest']]}.weight"


def _rows_in_file(rows: Any, head_size: int) -> Any:
    """The positions of rows in the file. Row `place` of half `half` of a head is its row `2 * place + half` there."""
    head, row = np.divmod(rows, head_size)
    half, place = np.divmod(row, head_size // 2)
    return head * head_size + 2 * place + half


def _rope_parameters(header: GGUFHeader, config: dict[str, Any], file: BinaryIO, path: Path) -> dict[str, Any]:
    """The `rope_parameters` of the configuration, with the scaling that the file stores."""
    scaling = header.fields.get("llama.rope.scaling.type")
    if scaling not in (None, "none"):
        raise CheckpointError(
            f"{path} scales rotary frequencies by the method {scaling!r}, which is not supported: convert the model "
            "that the file was made from."
        )
    rope = dict(config["rope_parameters"])
    stored = next((tensor for tensor in header.tensors if tensor.name == _ROPE_FACTORS), None)
    if stored is None:
        return rope
    raw = bytearray(config["head_dim"] // 2 * 4)  # float32
    if stored.nbytes == len(raw):
        read_exactly(file.fileno(), memoryview(raw), stored.offset, path, _ROPE_FACTORS)
    factors = np.frombuffer(raw, np.float32).astype(np.float64)
    llama3 = {**rope, "rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE}
    expected = _llama3_factors(llama3, config["head_dim"])
    # The file stores float32. Factors of another scaling differ by some percent, and those of another size are 0 here.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{path}: its {_ROPE_FACTORS} scales rotary frequencies in another way than Llama 3, which is not "
            "supported: convert the model that the file was made from."
        )
    return llama3 if llama3["factor"] != 1.0 else rope


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Any:
    """The number that each frequency is divided by."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    unscaled = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (unscaled + (1 - unscaled) / rope["factor"])
