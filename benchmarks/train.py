"""Time training steps: packed sequences, forward, backward and AdamW, beside transformers in the same run.

    python benchmarks/train.py --json one.json
    torchrun --nproc-per-node 4 benchmarks/train.py --rows 8B --parallel shard=4 shard=2,context=2 --json four.json
    python benchmarks/train.py --no-runs --json one.json --add four.json --page page.md

With several GPUs, each GPU first measures a row alone, unless the row is too large for one GPU. Then the GPUs measure
it together, as meshes. Every data-parallel process has a batch as large as the batch of one GPU; context ranks share
one batch. Tokens and operations per second are per GPU.

Models have the shapes of Llama 3 and random weights; weights, gradients and optimizer states are bfloat16. The time of
a step includes the host's work. `training_flops` counts the model's operations, as in the training command. The limit
is the time of a step if all of these operations ran as fast as a product of large matrices in the same run: an FP8
product for the weights of FP8 layers, a bfloat16 product for attention and the head, which stay in bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

import pages
from limits import PRODUCT_SIZE, product_rate
from shapes import LLAMA_3, VOCABULARY

SHAPES = LLAMA_3 | {
    "8B's width": LLAMA_3["8B"] | {"num_hidden_layers": 16},
    "8B, 131,072 tokens": LLAMA_3["8B"],
}


class Load(NamedTuple):
    """The work of one step."""

    sequences: int
    length: int  # tokens of one sequence
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    steps: int = 8  # measured steps; half as many run before them
    for_one_gpu: bool = True

    def in_words(self) -> str:
        """Describe the load for the page."""
        words = f"{self.sequences} sequence{'s' * (self.sequences > 1)} of {self.length:,} tokens"
        if self.activation_checkpointing != "none":
            words += f", activation checkpointing {self.activation_checkpointing}"
        return f"{words}, {self.steps} steps"


LOADS = {
    "1B": Load(4, 4096),
    "8B's width": Load(1, 8192),
    "8B": Load(1, 8192),
    "8B, 131,072 tokens": Load(1, 131_072, "full", steps=2, for_one_gpu=False),
}
RECIPES = {"FP8 delayed": "delayed", "FP8 current": "current", "FP8 block": "block"}
ROWS = [
    *(f"{shape} {precision}" for shape in ("1B", "8B's width") for precision in ("bf16", *RECIPES)),
    "8B FP8 delayed",
    "8B FP8 current",
]
# Rows for several GPUs.
MORE_ROWS = ["8B bf16", "8B, 131,072 tokens bf16", "8B, 131,072 tokens FP8 current"]
PEERS = ["1B bf16", "8B's width bf16"]
COLOURS = {"llama-te": "#2a6f97", "transformers": "#d4a373"}
MESH_COLOUR = "#61a5c2"
# Settings that the name of a mesh can have beside its sizes, and the meaning of each word.
MESH_CHOICES: dict[str, dict[str, Any]] = {
    "context_kind": {kind: kind for kind in ("p2p", "all_gather", "a2a")},
    "reshard_after_forward": {"true": True, "false": False},
    "reduce": {dtype: dtype for dtype in ("bf16", "fp32")},
}
DEVICE = "cuda"


@dataclass
class Figure:
    """One row of the table.

    Attributes:
        what: Model and precision.
        who: A package on one GPU, or the name of a mesh of llama-te.
        gpus: Number of GPUs.
        rate: Tokens per second and GPU, of the median step.
        memory: Peak of allocated memory on one GPU, in GB (1e9 bytes).
        flops: Model operations per second and GPU, in 1e12.
        loss: Loss of the last step.
        limit: Tokens per second and GPU if all model operations ran as fast as large products.
    """

    what: str
    who: str
    gpus: int
    rate: float
    memory: float
    flops: float
    loss: float
    limit: float

    @property
    def share(self) -> float:
        """The part of the limit that is reached."""
        return self.rate / self.limit


def main() -> None:
    """Measure, print, and write the files."""
    options = arguments(sys.argv[1:])
    if "WORLD_SIZE" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    if not options.no_runs:
        run(options)
    if options.page and rank() == 0:
        write_page(options.json, options.add, options.page)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(options: argparse.Namespace) -> None:
    """Measure all rows, and write them with a description of the machine."""
    import transformer_engine
    import transformers

    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "gpus": world_size(),
        "torch": torch.__version__,
        "transformer_engine": transformer_engine.__version__,
        "transformers": transformers.__version__,
        "product_rates": product_rates(options.rows),
    }
    say(machine(record))
    record["figures"] = [asdict(figure) for figure in take(options, record["product_rates"])]
    if options.json and rank() == 0:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def machine(record: dict[str, Any]) -> str:
    """Describe the machine of a record."""
    rates = " and ".join(f"{rate / 1e12:,.0f} TFLOP/s in {name}" for name, rate in record["product_rates"].items())
    return (
        f"{record['gpus']} {record['gpu']}, torch {record['torch']}, Transformer Engine "
        f"{record['transformer_engine']}, transformers {record['transformers']}; large products reach {rates}"
    )


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows",
        nargs="*",
        help="measure the rows whose names contain one of these words; "
        f"the default rows: {'; '.join(ROWS)}; more rows: {'; '.join(MORE_ROWS)}",
    )
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="measure transformers as well"
    )
    parser.add_argument(
        "--parallel", nargs="*", type=mesh_name, metavar="SIZE=N,...", default=[],
        help="meshes to measure. A name has sizes (replicate, shard, context, tensor) and may have context_kind and "
        "reshard_after_forward, all as in `parallel` of the training command, and reduce, as in its `precision`. "
        "The default is shard over all processes that torchrun started",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, help="write a trace of one step of each row to this folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--page", type=Path, help="write a page in Markdown with the figures of the --json file")
    parser.add_argument(
        "--add", type=Path, nargs="*", metavar="JSON", default=[],
        help="also show the figures of these files, such as runs on more GPUs",
    )  # fmt: skip
    parser.add_argument("--no-runs", action="store_true", help="measure nothing, only write the page again")
    options = parser.parse_args(words)
    every = ROWS + MORE_ROWS
    options.rows = ROWS if options.rows is None else [row for row in every if any(part in row for part in options.rows)]
    if "WORLD_SIZE" in os.environ:
        options.parallel = options.parallel or ["shard=-1"]
    elif options.parallel:
        parser.error(f"--parallel {options.parallel[0]}: start the processes with torchrun.")
    for name in options.parallel:
        try:
            mesh_settings(name)[0].sizes.resolve(int(os.environ["WORLD_SIZE"]))
        except ValueError as error:
            parser.error(f"--parallel {name}: {error}")
    if options.page and not options.json:
        parser.error(f"--page {options.page}: the figures come from a file, so give --json FILE as well.")
    if not options.page and (options.add or options.no_runs):
        parser.error("--add and --no-runs only write a page, so give --page FILE as well.")
    if not options.no_runs and not torch.cuda.is_available():
        parser.error("measuring needs a GPU; --no-runs writes a page without one.")
    return options


def mesh_name(text: str) -> str:
    """Return the text if it names a mesh."""
    try:
        mesh_settings(text)
    except (KeyError, TypeError, ValueError) as error:
        choices = "; ".join(f"{name}: {', '.join(meant)}" for name, meant in MESH_CHOICES.items())
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a mesh: give sizes of at least 1 for some of replicate, shard, context and tensor, and "
            f"any other settings ({choices}), as in shard=2,context=2,context_kind=a2a."
        ) from error
    return text


def mesh_settings(name: str) -> tuple[Any, Any]:
    """Return the `ParallelConfig` and the `precision.reduce` that the name of a mesh stands for."""
    from llama_te_core.train.config import ParallelConfig

    words = dict(part.split("=") for part in name.split(","))
    settings = {key: MESH_CHOICES[key][word] if key in MESH_CHOICES else int(word) for key, word in words.items()}
    reduce = settings.pop("reduce", "fp32")
    return ParallelConfig(**settings), reduce


def take(options: argparse.Namespace, product_rates: dict[str, float]) -> list[Figure]:
    """Measure all rows, print each when it is done, and return them."""
    say(f"{'':<30} {'':<20} {'GPUs':>4} {'tok/s':>9} {'limit':>9} {'TFLOP/s':>8} {'GB':>6} {'loss':>7}")
    runs = []
    for row in options.rows:
        alone = ["llama-te"] if LOADS[shape_and_precision(row)[0]].for_one_gpu else []
        runs += [(row, who) for who in (*alone, *options.parallel)]
    if options.peers:
        runs += [(row, "transformers") for row in PEERS if row in options.rows]
    figures = []
    for row, who in runs:
        try:
            figure = measure(row, who, product_rates, options.profile)
        except torch.cuda.OutOfMemoryError:
            if who in options.parallel:
                raise  # the other processes of the mesh wait for this one
            say(f"{row:<30} {who:<20} {1:4} out of memory")
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        figures.append(figure)
        speed = f"{figure.rate:9,.0f} {figure.limit:9,.0f} {figure.flops:8.1f} {figure.memory:6.1f} {figure.loss:7.3f}"
        say(f"{row:<30} {who:<20} {figure.gpus:4} {speed}")
    return figures


def product_rates(rows: list[str]) -> dict[str, float]:
    """Measure the operations per second of a product of two large matrices, in each format of the rows."""
    rates = {"bf16": product_rate(torch.bfloat16, DEVICE)}
    if any("FP8" in row for row in rows):
        rates["FP8"] = product_rate(torch.float8_e4m3fn, DEVICE)
    return rates


def measure(row: str, who: str, product_rates: dict[str, float], profile: Path | None) -> Figure:
    """Train a model on one batch for some steps, and return the figure."""
    from llama_te_core.parallel.mesh import data_rank, make_mesh
    from llama_te_core.train.metrics import training_flops

    shape, precision = shape_and_precision(row)
    load = LOADS[shape]
    mesh, gpus, batches = None, 1, 1
    if who == "transformers":
        step, config = transformers_step(SHAPES[shape], load)
    elif who == "llama-te":
        step, config = llama_te_step(SHAPES[shape], precision, load, "shard=1", None)
    else:
        mesh = make_mesh(mesh_settings(who)[0].sizes, DEVICE)
        gpus, batches = mesh.size(), data_rank(mesh)[1]
        step, config = llama_te_step(SHAPES[shape], precision, load, who, mesh)
    for _ in range(load.steps // 2):
        loss = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in tqdm(range(load.steps), desc=f"{row}, {who}", delay=2, leave=False, disable=None if rank() == 0 else True):
        begin = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    memory = torch.tensor(torch.cuda.max_memory_allocated(), dtype=torch.float64)
    if mesh is not None:
        dist.all_reduce(loss)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
    if profile is not None:
        write_profile(step, profile / f"{row} {who}.txt")
    tokens = batches * load.sequences * load.length
    flops = training_flops(config, tokens, tokens * load.length)
    each = statistics.median(seconds) * gpus
    return Figure(
        what=row,
        who=who,
        gpus=gpus,
        rate=tokens / each,
        memory=float(memory) / 1e9,
        flops=flops / each / 1e12,
        loss=float(loss) / gpus,
        limit=tokens / least_seconds(config, tokens, tokens * load.length, precision, product_rates),
    )


def shape_and_precision(row: str) -> tuple[str, str]:
    """Split the name of a row into its shape and its precision."""
    return next((shape, row.removeprefix(f"{shape} ")) for shape in reversed(SHAPES) if row.startswith(f"{shape} "))


def least_seconds(
    config: Any, tokens: int, squared_lengths: int, precision: str, product_rates: dict[str, float]
) -> float:
    """Return the seconds that one GPU needs for all model operations at the speed of large products."""
    from llama_te_core.train.metrics import training_flops

    head = 6 * config.vocab_size * config.hidden_size * tokens
    layers = training_flops(config, tokens, 0) - head
    attention = training_flops(config, 0, squared_lengths)
    fastest = product_rates["FP8" if precision in RECIPES else "bf16"]
    return layers / fastest + (head + attention) / product_rates["bf16"]


def llama_te_step(
    shape: dict[str, Any], precision: str, load: Load, parallel: str, mesh: DeviceMesh | None
) -> tuple[Callable[[], torch.Tensor], Any]:
    """Make a step of llama-te, with the model and the batch of the training command."""
    from llama_te_core.parallel.context import shard_context
    from llama_te_core.parallel.mesh import data_rank
    from llama_te_core.train.config import DataConfig, ModelConfig, PrecisionConfig, ShapeConfig, TrainConfig
    from llama_te_core.train.setup import build_model, random_weights

    parallel_config, reduce = mesh_settings(parallel)
    quantized: dict[str, Any] = {} if precision == "bf16" else {"compute": "fp8", "fp8_recipe": RECIPES[precision]}
    config = TrainConfig(
        data=DataConfig(source="random tokens", tokens_per_batch=load.sequences * load.length,
                        sequence_length=load.length),
        model=ModelConfig(shape=ShapeConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=load.length)),
        activation_checkpointing=load.activation_checkpointing,
        parallel=parallel_config,
        precision=PrecisionConfig(weights="bf16", reduce=reduce, **quantized),
    )  # fmt: skip
    model_config = config.model_config()
    device = torch.device(DEVICE, torch.cuda.current_device()) if DEVICE == "cuda" else torch.device(DEVICE)
    _, model = build_model(config, model_config, random_weights(0, model_config), mesh, device)
    ids_1T, labels_1T = tokens_and_labels(load, data_rank(mesh)[0])
    starts = torch.arange(0, ids_1T.numel() + 1, load.length, dtype=torch.int32, device=DEVICE)
    batch: dict[str, Any] = {
        "input_ids": ids_1T,
        "shift_labels": labels_1T,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": load.length,
        "max_length_k": load.length,
    }
    batch = shard_context(batch, mesh)
    return make_step(model, lambda: model(**batch)), model_config


def transformers_step(shape: dict[str, Any], load: Load) -> tuple[Callable[[], torch.Tensor], Any]:
    """Make a step of transformers' own Llama, uncompiled, on a batch without padding, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=load.length, use_cache=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model: Any = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)
    ids_1T, _ = tokens_and_labels(load, 0)
    ids_BS = ids_1T.view(load.sequences, load.length)
    return make_step(model, lambda: model(input_ids=ids_BS, labels=ids_BS).loss), config


def make_step(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Make a step of AdamW that returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def tokens_and_labels(load: Load, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens [1, T] and their labels: the next token, and -100 at the end of each sequence."""
    generator = torch.Generator(DEVICE).manual_seed(1 + index)
    ids_BS = torch.randint(0, VOCABULARY, (load.sequences, load.length), device=DEVICE, generator=generator)
    labels_BS = ids_BS.roll(-1, 1)
    labels_BS[:, -1] = -100
    return ids_BS.view(1, -1), labels_BS.view(1, -1)


def write_profile(step: Callable[[], torch.Tensor], path: Path) -> None:
    """Write how the GPU spends the time of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    if rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    )


def write_page(json_file: Path, others: list[Path], page: Path) -> None:
    """Write the documentation page of the figures of several runs, and its plot beside it."""
    records = [json.loads(file.read_text()) for file in (json_file, *others)]
    runs = [[Figure(**figure) for figure in record["figures"]] for record in records]
    plot = page.with_suffix(".svg")
    bars = [
        pages.Bar(f"{f.what}, {f.who}, {f.gpus} GPU{'s' * (f.gpus > 1)}", f.share, COLOURS.get(f.who, MESH_COLOUR))
        for figures in runs
        for f in figures
    ]
    pages.plot_shares(plot, bars)
    words = ["--json", json_file.as_posix()]
    if others:
        words += ["--add", *(file.as_posix() for file in others)]
    measured = {shape_and_precision(figure.what)[0] for figures in runs for figure in figures}
    loads = "; ".join(f"{shape}: {LOADS[shape].in_words()}" for shape in LOADS if shape in measured)
    lines = [
        "# Training performance",
        "",
        f"Written by `python benchmarks/train.py {' '.join(words)} --page {page.as_posix()}`.",
        "",
        "The models have the shapes of Llama 3 and random weights. They train on random tokens in packed sequences. "
        "Weights, gradients and AdamW's states are bfloat16. A step is forward, backward and AdamW, the host's work "
        f"included; the figure is the median of several steps. Each process has a batch of its own ({loads}). The "
        "context ranks of a mesh share one batch.",
        "",
        "`llama-te` is a run on one GPU. A name such as `shard=4` is a mesh of several GPUs, with the sizes of "
        "[training on many processes](../guides/train.md#many-processes). The other settings in a name are those of "
        "the training command's `parallel`; `reduce` is that of its `precision` (gradients are summed in fp32 by "
        "default). Tokens, operations and limits are per second and GPU.",
        "",
        "Model operations are counted as the training command counts them; an operation that is computed twice counts "
        f"once. Their rate is also given as a share of the rate of a bf16 product of {PRODUCT_SIZE:,} x "
        f"{PRODUCT_SIZE:,} matrices in the same run. The limit is the number of tokens if all model operations ran as "
        "fast as such products: an FP8 product (`torch._scaled_mm`) for the weights of FP8 layers, and a bf16 product "
        "for attention and the head, which stay in bf16. AdamW, norms, conversions and traffic between GPUs take no "
        "time in the limit.",
        "",
        "[Training performance](../internals/training-performance.md) explains where the time goes and what was tried.",
        "",
        f"![Share of the limit that training reaches]({plot.name})",
    ]
    head = ["what", "who", "GPUs", "tokens/s", "limit", "reached", "TFLOP/s", "of bf16 products", "peak GB"]
    for record, figures in zip(records, runs, strict=True):
        rows = [
            [
                f.what,
                f.who,
                f"{f.gpus}",
                f"{f.rate:,.0f}",
                f"{f.limit:,.0f}",
                f"{f.share:.0%}",
                f"{f.flops:,.0f}",
                f"{f.flops * 1e12 / record['product_rates']['bf16']:.0%}",
                f"{f.memory:.1f}",
            ]
            for f in figures
        ]
        lines += ["", f"{machine(record)}:", "", *pages.table(head, rows)]
    pages.write(page, lines)


def say(text: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
