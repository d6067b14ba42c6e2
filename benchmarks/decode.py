"""Time a decoding step of the engine on one GPU, beside the memory's limit and other ways to run the same model.

    python benchmarks/decode.py --json benchmarks/results/DATE_GPU_decode.json --page docs/results/decode-GPU.md

Models have the shapes of Llama 3 and random weights. The time of a step is the time of the whole loop: scheduling,
launch, kernels and the copy of the tokens to the host. The limit of a step is the time to read the weights and the
cached keys and values once, at the bandwidth of a large copy in the same run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pages
from limits import copy_bandwidth
from shapes import LLAMA_3, VOCABULARY

CONTEXT = 128
STEPS, REPEATS = 16, 5
# What a request may ask for beside the likeliest token. Rows without a name are greedy.
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.95},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_k and top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "logit_bias": {"logit_bias": {3: 1.0}},
    "logprobs": {"logprobs": 5},
}
SIZES = (1, 32, 256)
SAMPLED_ROWS = [f"batch {rows}, {name}" for rows in SIZES for name in SAMPLED]
REQUESTS = ["256 requests of 512 + 256", "256 requests of 512 + 256, default settings"]
BATCHES = [f"batch {rows}" for rows in SIZES]
LONGER = ["4 beams", "batch 32 at 8192", "prefill of 8192", *REQUESTS]
FP8 = [f"8B FP8, {row}" for row in ("batch 1", "batch 32", *LONGER[1:])]
FP8_CACHE = [f"8B FP8 and FP8 cache, {row}" for row in ("batch 32 at 8192", *REQUESTS)]
BF16_ROWS = {
    "1B": [f"1B bf16, {row}" for row in (*BATCHES, *SAMPLED_ROWS)],
    "8B": [f"8B bf16, {row}" for row in (*BATCHES, *SAMPLED_ROWS, *LONGER)],
}
COLOURS = {"engine": "#2a6f97", "TE layers in a CUDA graph": "#a9a9a9", "transformers, compiled": "#d4a373"}
ORDER = [*BF16_ROWS["1B"], *BF16_ROWS["8B"][:2], "8B bf16, batch 4", *BF16_ROWS["8B"][2:], *FP8, *FP8_CACHE]


@dataclass
class Figure:
    """One row of the table.

    Attributes:
        what: Model, precision and load.
        who: The software that ran it.
        value: The measured value, in `unit`.
        unit: "ms a step", "TFLOP/s" or "tok/s".
        limit: The best value that the machine allows, in the same unit.
    """

    what: str
    who: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def share(self) -> float | None:
        """The part of the limit that is reached."""
        if self.limit is None:
            return None
        return self.limit / self.value if self.unit == "ms a step" else self.value / self.limit


def make_model(size: str, fp8: bool = False, positions: int = 16384) -> Any:
    """Build a model with random weights on the GPU, with TE's layers."""
    from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM

    recipe: dict[str, Any] = {}
    fields = LLAMA_3[size] | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": positions,
        "eos_token_id": None,
    }
    if fp8:
        from transformer_engine.common.recipe import Float8CurrentScaling

        fields |= {"layer_precision": ["fp8"] * fields["num_hidden_layers"], "use_quantized_model_init": True}
        recipe = {"fp8_recipe": Float8CurrentScaling()}
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return NVLlamaForCausalLM(NVLlamaConfig(**fields), **recipe).eval()
    finally:
        torch.set_default_dtype(default)


def read_bytes(model: Any, fp8: bool) -> int:
    """Count the bytes of the weights that a step reads: the layers and the head."""
    layer_bytes = sum(p.numel() for n, p in model.model.layers.named_parameters() if not n.endswith("norm_weight"))
    return layer_bytes * (1 if fp8 else 2) + model.lm_head.weight.numel() * 2


def cache_bytes(model: Any, rows: int, length: int, fp8: bool = False) -> int:
    """Count the bytes of the keys and values that a step reads. A head in FP8 has a scale of one byte."""
    config = model.config
    head_bytes = config.head_dim + 1 if fp8 else 2 * config.head_dim
    return rows * length * config.num_hidden_layers * 2 * config.num_key_value_heads * head_bytes


def prompts(count: int, length: int) -> list[list[int]]:
    """Make prompts of random tokens, so that no two begin alike."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for _ in range(count)]


def clear() -> None:
    """Free the memory that is no longer in use."""
    gc.collect()
    torch.cuda.empty_cache()


# --- the engine ------------------------------------------------------------------------------------------------------


def step_time(
    model: Any, count: int, context: int, *, beams: int = 1, kv_cache_dtype: str = "auto", **sampling: Any
) -> float:
    """Return the milliseconds from one token to the next, host included, while all requests are running."""
    from llama_te_infer import Engine, SamplingParams

    ahead = 8 + STEPS * REPEATS // 2
    new, start = 2 * ahead + 16, context - ahead  # so that texts have `context` tokens in the middle repeat
    length = start + new
    engine = Engine(
        model,
        max_batch_size=count * beams,
        max_sequence_length=-(-length // 64) * 64,
        prefill_budget=8192,
        prefix_caching=False,
        kv_cache_dtype=kv_cache_dtype,
    )
    params = SamplingParams(
        **{"max_tokens": new, "temperature": 0.0, "ignore_eos": True, "num_beams": beams, **sampling}
    )
    for prompt in prompts(count, start):
        engine.submit(prompt, params)
    while len(engine.scheduler.rows) < count * beams:
        engine.step()
    for _ in range(8):
        engine.step()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        times.append((time.perf_counter() - begin) / STEPS)
    while engine.has_unfinished:
        engine.step()
    del engine
    clear()
    return statistics.median(times) * 1e3


def prefill_rate(model: Any, tokens: int = 8192) -> float:
    """Return the TFLOP/s of prefilling one prompt, without the head, which sees one token only."""
    from llama_te_infer import Engine, SamplingParams

    config = model.config
    engine = Engine(
        model,
        max_batch_size=1,
        max_sequence_length=tokens + 64,
        prefill_budget=tokens,
        prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0)
    times = []
    for prompt in prompts(5, tokens):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.generate([prompt], params)
        times.append(time.perf_counter() - begin)
    weights = sum(p.numel() for n, p in model.model.layers.named_parameters() if not n.endswith("norm_weight"))
    # A token multiplies and adds each weight once, and attends to half of the other tokens on average.
    attention = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2 / 2
    del engine
    clear()
    return (2 * weights * tokens + attention) / min(times) / 1e12


def throughput(model: Any, count: int = 256, length: int = 512, new: int = 256, **settings: Any) -> float:
    """Return the output tokens per second of requests that are all submitted at the beginning."""
    from llama_te_infer import Engine, SamplingParams

    engine = Engine(model, max_batch_size=count, max_sequence_length=length + new, **settings)
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    requests = prompts(count, length)
    for _ in range(2):  # the first round captures a graph for each number of rows that occurs
        engine.reset_prefix_cache()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.generate(requests, params)
        seconds = time.perf_counter() - begin
    del engine
    clear()
    return count * new / seconds


# --- the others ------------------------------------------------------------------------------------------------------


def replayed(step: Callable[[], object]) -> float:
    """Return the milliseconds of a step inside a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


@torch.no_grad()
def te_in_a_graph(model: Any, rows: int, context: int) -> float:
    """Time one step of TE's layers with TE's own cache in a CUDA graph, without a loop around it."""
    from transformer_engine.pytorch import InferenceParams, TransformerLayer

    config = model.config
    capacity = context + 64
    # New layers: the model's own layers accept only the caches of llama-te.
    layers = [
        TransformerLayer(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            num_gqa_groups=config.num_key_value_heads,
            kv_channels=config.head_dim,
            layernorm_epsilon=config.rms_norm_eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            layer_number=number + 1,
            attn_input_format="bshd",
            self_attn_mask_type="padding_causal",
            normalization="RMSNorm",
            activation="swiglu",
            bias=False,
            fuse_qkv_params=True,
            qkv_weight_interleaved=True,
            params_dtype=torch.bfloat16,
            device="cuda",
        ).eval()
        for number in range(config.num_hidden_layers)
    ]
    cache = InferenceParams(
        max_batch_size=rows,
        max_sequence_length=capacity,
        num_heads_kv=config.num_key_value_heads,
        head_dim_k=config.head_dim,
        dtype=torch.bfloat16,
    )
    angles = model.model.rotary_angles(capacity, model.device)
    for layer in range(config.num_hidden_layers):
        cache.allocate_memory(layer + 1)
    token_B1 = torch.randint(3, VOCABULARY, (rows, 1), device="cuda")
    from collections import OrderedDict

    cache.pre_step(OrderedDict((row, context) for row in range(rows)))
    cache.pre_step(OrderedDict((row, 1) for row in range(rows)))

    def step() -> torch.Tensor:
        hidden = model.model.embed_tokens(token_B1)
        for layer in layers:
            hidden = layer(
                hidden,
                self_attn_mask_type="padding_causal",
                rotary_pos_emb=angles,
                inference_params=cache,
                cu_seqlens_q=cache.cu_seqlens_q[: rows + 1],
                cu_seqlens_kv=cache.cu_seqlens_kv[: rows + 1],
                max_seqlen_q=1,
                max_seqlen_kv=capacity,
            )
        return model.lm_head(model.model.norm(hidden)).argmax(-1)

    return replayed(step)


def transformers_compiled(size: str, rows: int, context: int) -> float:
    """Time the Llama of transformers: static cache, `torch.compile(mode="reduce-overhead")`, greedy."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    fields = LLAMA_3[size] | {"vocab_size": VOCABULARY, "max_position_embeddings": 16384}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa")).eval()
    torch.set_default_dtype(default)
    cache = StaticCache(config=model.config, max_cache_len=context + 256)
    ids = torch.tensor(prompts(rows, context), device="cuda")

    def one(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = model(token, past_key_values=cache, cache_position=position, position_ids=position[None]).logits
        return logits[:, -1:].argmax(-1)

    compiled = torch.compile(one, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        token = one(ids, torch.arange(context, device="cuda"))
        position = torch.tensor([context], device="cuda")
        times = []
        for i in range(160):
            if i % 32 == 0:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            token = compiled(token, position).clone()
            position = position + 1
            if i % 32 == 31:
                torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) / 32)
    return statistics.median(times[1:]) * 1e3


# --- the table -------------------------------------------------------------------------------------------------------


class Table:
    """Prints each figure when it is measured, and keeps it."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.figures: list[Figure] = []

    def add(
        self, what: str, who: str, unit: str, measure: Callable[[], float], limit: float | None = None
    ) -> Figure | None:
        """Measure and print a figure; print the error where the measurement fails."""
        try:
            figure = Figure(what, who, measure(), unit, limit)
        except Exception as error:  # a failed measurement must not lose the others
            print(f"{what:<52} {who:<26} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            clear()
            return None
        self.figures.append(figure)
        print(self.line(figure), flush=True)
        return figure

    @staticmethod
    def line(figure: Figure) -> str:
        """Format a figure as one line of text."""
        share = "" if figure.limit is None else f"limit {figure.limit:9.2f}  {figure.share:5.0%}"
        return f"{figure.what:<52} {figure.who:<26} {figure.value:10.3f} {figure.unit:<10} {share}"

    def step(
        self,
        model: Any,
        what: str,
        rows: int,
        *,
        context: int = CONTEXT,
        beams: int = 1,
        fp8: bool = False,
        kv_cache_dtype: str = "auto",
        **sampling: Any,
    ) -> None:
        """Measure a step of the engine."""
        total = read_bytes(model, fp8) + cache_bytes(model, rows * beams, context, kv_cache_dtype == "fp8")
        limit = total / self.bandwidth * 1e3
        measure = functools.partial(
            step_time, model, rows, context, beams=beams, kv_cache_dtype=kv_cache_dtype, **sampling
        )
        self.add(what, "engine", "ms a step", measure, limit)


def run_longer(
    table: Table,
    model: Any,
    kind: str,
    wanted: Callable[[str], bool],
    fp8: bool = False,
    kv_cache_dtype: str = "auto",
) -> None:
    """Measure the rows with thousands of tokens, as far as they are wanted."""
    if wanted(what := f"{kind}, batch 32 at 8192"):
        table.step(model, what, 32, context=8192, fp8=fp8, kv_cache_dtype=kv_cache_dtype)
    if wanted(what := f"{kind}, prefill of 8192"):
        table.add(what, "engine", "TFLOP/s", functools.partial(prefill_rate, model))
    for what, settings in zip(REQUESTS, ({"prefill_budget": 8192, "prefix_caching": False}, {}), strict=True):
        if wanted(f"{kind}, {what}"):
            measure = functools.partial(throughput, model, kv_cache_dtype=kv_cache_dtype, **settings)
            table.add(f"{kind}, {what}", "engine", "tok/s", measure)


def run(table: Table, rows: set[str], peers: set[str]) -> None:
    """Measure the rows whose names begin with one of `rows`, or all rows if `rows` is empty."""

    def wanted(what: str) -> bool:
        return not rows or any(what.startswith(name) for name in rows)

    for size in ("1B", "8B"):
        if any(map(wanted, BF16_ROWS[size])):
            model = make_model(size)
            for batch in SIZES:
                for name, fields in SAMPLED.items():
                    if wanted(what := f"{size} bf16, batch {batch}, {name}"):
                        table.step(model, what, batch, **fields)
                if wanted(what := f"{size} bf16, batch {batch}"):
                    table.step(model, what, batch)
                    if "te" in peers and batch < 256:
                        table.add(
                            what,
                            "TE layers in a CUDA graph",
                            "ms a step",
                            functools.partial(te_in_a_graph, model, batch, CONTEXT),
                        )
                        clear()
            if size == "8B":
                if wanted(what := "8B bf16, 4 beams"):
                    table.step(model, "8B bf16, batch 4", 4)
                    table.step(model, what, 1, beams=4)
                run_longer(table, model, "8B bf16", wanted)
            del model
            clear()
        if size == "8B" and any(map(wanted, [*FP8, *FP8_CACHE])):
            model = make_model(size, fp8=True)
            for batch in (1, 32):
                if wanted(what := f"8B FP8, batch {batch}"):
                    table.step(model, what, batch, fp8=True)
            run_longer(table, model, "8B FP8", wanted, fp8=True)
            run_longer(
                table,
                model,
                "8B FP8 and FP8 cache",
                lambda what: what in FP8_CACHE and wanted(what),
                fp8=True,
                kv_cache_dtype="fp8",
            )
            del model
            clear()
        if "transformers" in peers:
            for batch in (1, 32):
                if wanted(what := f"{size} bf16, batch {batch}"):
                    table.add(
                        what,
                        "transformers, compiled",
                        "ms a step",
                        functools.partial(transformers_compiled, size, batch, CONTEXT),
                    )
                    torch._dynamo.reset()
                    clear()


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Join the figures of two runs on the same kind of machine; new figures replace old ones of the same row."""
    same = all(old.get(name) == new[name] for name in ("gpu", "torch", "transformers", "transformer_engine"))
    if not same:
        raise SystemExit("--json: the file has figures of another machine or of other versions; name another file.")
    known = {(figure["what"], figure["who"]) for figure in new["figures"]}
    kept = [figure for figure in old["figures"] if (figure["what"], figure["who"]) not in known]
    return {**new, "figures": sorted(kept + new["figures"], key=lambda f: ORDER.index(f["what"]))}


def write_page(record: dict[str, Any], page: Path) -> None:
    """Write the documentation page of the figures, and its plot beside it."""
    figures = [Figure(**figure) for figure in record["figures"]]
    plot = page.with_suffix(".svg")
    steps = [
        pages.Bar(f"{figure.what}, {figure.who}", figure.share, COLOURS[figure.who])
        for figure in figures
        if figure.share is not None
    ]
    pages.plot_shares(plot, steps)
    rows = [
        [
            figure.what,
            figure.who,
            f"{figure.value:,.2f} {figure.unit}",
            "" if figure.limit is None else f"{figure.limit:.2f}",
            "" if figure.share is None else f"{figure.share:.0%}",
        ]
        for figure in figures
    ]
    lines = [
        f"# Decoding on one {record['gpu']}",
        "",
        f"Written by `python benchmarks/decode.py --json {record['file']} --page {page.as_posix()}`.",
        "",
        f"Measured with torch {record['torch']}, Transformer Engine {record['transformer_engine']} and transformers "
        f"{record['transformers']}. The models have the shapes of Llama 3 and random weights. Decoding is greedy "
        f"unless the row names parameters, with a context of {CONTEXT} tokens unless it names another. A step is the "
        "time from one token to the next, the host's loop included. The limit of a step is the time to read the "
        "weights and the cached keys and values once, at the bandwidth of a large copy in the same run: "
        f"{record['copy_bandwidth'] / 1e12:.2f} TB/s.",
        "",
        "[Decode performance](../internals/decode-performance.md) explains where the time goes and what was tried.",
        "",
        f"![Share of the memory's limit that a step reaches]({plot.name})",
        "",
        *pages.table(["what", "who", "measured", "limit", "reached"], rows),
    ]
    pages.write(page, lines)


def main() -> None:
    """Parse the arguments, measure, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows",
        nargs="*",
        default=[],
        metavar="ROW",
        help='measure the rows that begin with these words, such as "1B" "8B FP8" "1B bf16, batch 256"',
    )
    parser.add_argument(
        "--peers", nargs="*", default=["te", "transformers"], choices=["te", "transformers"],
        help="measure these beside the engine (default: both)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--page", type=Path, help="write a page in Markdown with all figures of the --json file")
    parser.add_argument("--no-runs", action="store_true", help="measure nothing, only write the page again")
    arguments = parser.parse_args()
    if arguments.page and not arguments.json:
        parser.error(f"--page {arguments.page}: the figures come from a file, so give --json FILE as well.")
    if not arguments.no_runs:
        measure(arguments)
    if arguments.page:
        write_page(json.loads(arguments.json.read_text()) | {"file": arguments.json.as_posix()}, arguments.page)


def measure(arguments: argparse.Namespace) -> None:
    """Measure, print, and write the --json file."""
    bandwidth = copy_bandwidth()
    clear()
    import transformers

    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bandwidth": bandwidth,
    }
    try:
        from importlib.metadata import version

        about["transformer_engine"] = version("transformer-engine")
    except Exception:
        about["transformer_engine"] = "not installed"
    print(f"{about['gpu']}, torch {about['torch']}; copies at {bandwidth / 1e12:.3f} TB/s", flush=True)
    table = Table(bandwidth)
    run(table, set(arguments.rows), set(arguments.peers))
    if arguments.json:
        record = {**about, "figures": [asdict(figure) for figure in table.figures]}
        if arguments.json.exists():
            record = merge(json.loads(arguments.json.read_text()), record)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
