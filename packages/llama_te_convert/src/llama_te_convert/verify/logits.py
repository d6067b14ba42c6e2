"""Comparison of the logits that two checkpoints compute.

Shapes: S positions of the text, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llama_te_core.compat.tokenizers import panics_as_errors
from llama_te_core.data.tokenizer_files import load_tokenizer

from ..configs.architectures import ARCHITECTURES
from ..errors import CheckpointError, first_line
from ..sources.torch_tensors import dtype_name

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class LogitsComparison:
    """How the logits of two models differ, at every position of a text.

    Attributes:
        tokens: Number of positions.
        device: Device that the models ran on.
        a_dtype: Dtype that the first model ran in, as in "bfloat16".
        b_dtype: Dtype that the second model ran in.
        largest: Largest absolute difference; infinite if only one of two logits is a number.
        position: Position of the largest difference.
        same_tokens: Number of positions at which both models have the same most likely token.
        first_other: The first position at which the most likely tokens differ; `None` if there is none.
    """

    tokens: int
    device: str
    a_dtype: str
    b_dtype: str
    largest: float
    position: int
    same_tokens: int
    first_other: int | None

    @property
    def same(self) -> bool:
        """Whether the most likely token is the same at every position."""
        return self.first_other is None

    def lines(self) -> list[str]:
        """The comparison as text."""
        dtypes = self.a_dtype if self.a_dtype == self.b_dtype else f"{self.a_dtype} and {self.b_dtype}"
        likely = (
            f"the same at all {self.tokens} positions"
            if self.same
            else f"the same at {self.same_tokens} of {self.tokens} positions, first another one at {self.first_other}"
        )
        return [
            f"logits of {self.tokens} tokens, in {dtypes} on {self.device}: largest difference {self.largest:.4g} at "
            f"position {self.position}; most likely token {likely}"
        ]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types. An infinite difference becomes a string."""
        largest = self.largest if math.isfinite(self.largest) else str(self.largest)
        return {**asdict(self), "largest": largest, "same": self.same}


def compare_logits(a_folder: Path, b_folder: Path, text: str) -> LogitsComparison:
    """Run two checkpoints on a text, each in its own dtype, and compare their logits.

    The models run one after the other, on a GPU if there is one, and only one is in memory at a time. `layer_precision`
    is ignored: all layers run in the checkpoint's dtype.

    Args:
        a_folder: A folder that transformers or `llama_te_core` can load, or a GGUF file.
        b_folder: Another one.
        text: The text. The first checkpoint that has a tokenizer tokenizes it.

    Raises:
        CheckpointError: A model or a tokenizer cannot be loaded; the vocabularies differ; or the text has no tokens.
    """
    ids = _tokens(a_folder, b_folder, text)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a_SV, a_dtype = _logits(a_folder, ids, device)
    b_SV, b_dtype = _logits(b_folder, ids, device)
    if a_SV.shape != b_SV.shape:
        raise CheckpointError(
            f"{a_folder} has logits for {a_SV.shape[1]} tokens, but {b_folder} for {b_SV.shape[1]}: their vocabularies "
            "cannot be compared."
        )
    gaps_SV = torch.where((a_SV == b_SV) | (a_SV.isnan() & b_SV.isnan()), 0.0, (a_SV - b_SV).abs())
    gaps_S = gaps_SV.nan_to_num(math.inf, posinf=math.inf).amax(-1)
    other = (a_SV.argmax(-1) != b_SV.argmax(-1)).nonzero().view(-1)
    return LogitsComparison(
        tokens=len(ids),
        device=device,
        a_dtype=a_dtype,
        b_dtype=b_dtype,
        largest=float(gaps_S.max()),
        position=int(gaps_S.argmax()),
        same_tokens=len(ids) - len(other),
        first_other=int(other[0]) if len(other) else None,
    )


def _location(path: Path) -> tuple[Path, dict[str, str]]:
    """The arguments of `from_pretrained`: a folder, and the name of a GGUF file in it."""
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})


def _tokens(a_folder: Path, b_folder: Path, text: str) -> list[int]:
    import llama_te_core  # noqa: F401  # registers the configuration that lies beside a tokenizer

    having = [path for path in (a_folder, b_folder) if _has_tokenizer(path)]
    if not having:
        raise CheckpointError(
            f"neither {a_folder} nor {b_folder} has a tokenizer: copy the files of the model's tokenizer "
            f"({', '.join(_TOKENIZER_FILES)}) into one of them."
        )
    folder, file = _location(having[0])
    try:
        with panics_as_errors():
            ids = list(load_tokenizer(folder, local_files_only=True, **file)(text)["input_ids"])
    except Exception as error:  # each kind of tokenizer has its own errors
        raise CheckpointError(f"the tokenizer of {having[0]} cannot be used: {first_line(error)}") from error
    if not ids:
        raise CheckpointError(f"the text {text!r} has no tokens: give a longer one.")
    return ids


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in _TOKENIZER_FILES)


def _logits(path: Path, ids: list[int], device: str) -> tuple[torch.Tensor, str]:
    """Logits [S, V] in float32 on the CPU, and the dtype in which the model computed them."""
    model = _model(path)
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise CheckpointError(
            f"the text has the token {max(ids)}, but {path} has {vocabulary} tokens: the tokenizer does not fit."
        )
    try:
        with torch.no_grad():
            logits_1SV = model.to(device)(torch.tensor([ids], device=device), use_cache=False).logits
    except RuntimeError as error:  # such as too little memory
        raise CheckpointError(f"{path} cannot be run on {device}: {first_line(error)}") from error
    dtype = dtype_name(model.dtype)
    logits_SV = logits_1SV[0].float().cpu()
    del model, logits_1SV
    gc.collect()  # modules reference each other, so only a collection frees them
    if device == "cuda":
        torch.cuda.empty_cache()
    return logits_SV, dtype


def _model(path: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from llama_te_core import NVLlamaConfig
    from llama_te_core.compat.transformers import progress_bars_on_terminals_only

    folder, file = _location(path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **file)
        if isinstance(config, NVLlamaConfig):
            config.layer_precision, config.use_quantized_model_init = None, False
        elif config.model_type not in ARCHITECTURES:
            raise CheckpointError(
                f"{path} has the model_type {config.model_type!r}: give one of {', '.join(ARCHITECTURES)}, "
                f"{NVLlamaConfig.model_type}."
            )
        with progress_bars_on_terminals_only():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype="auto", local_files_only=True, output_loading_info=True, **file
            )
    except CheckpointError:
        raise
    except Exception as error:  # each format and version has its own errors
        raise CheckpointError(f"{path} cannot be loaded as a model: {first_line(error)}") from error
    # transformers only warns of missing tensors, and fills them with random numbers.
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]} (and {len(missing) - 1} more): logits need a complete causal language model."
        )
    return model.eval()
