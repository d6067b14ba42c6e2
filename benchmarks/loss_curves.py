"""Train one model in several precisions on the same text, and compare the losses step by step.

    python benchmarks/loss_curves.py --json curves.json --page curves.md

All runs have the same random weights, the same batches in the same order and the same learning rates. Each run calls
`train`, the function of the training command. The text is the docstrings of Python's standard library, one token a
byte. The program smooths the losses with a moving average, and compares them with the losses of the first precision.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import json
import platform
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pages

WINDOW = 20  # steps
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"compute": "fp32"},
    "bf16": {"compute": "bf16"},
    "bf16-again": {"compute": "bf16"},  # the control: cuDNN sums in another order each time
    "fp8-delayed": {"compute": "fp8", "fp8_recipe": "delayed"},
    "fp8-current": {"compute": "fp8", "fp8_recipe": "current"},
    "fp8-block": {"compute": "fp8", "fp8_recipe": "block"},
    "mxfp8": {"compute": "mxfp8"},
    "nvfp4": {"compute": "nvfp4"},
}
DEFAULT = ["bf16", "bf16-again", "fp8-delayed", "fp8-current", "fp8-block"]


class Load(NamedTuple):
    """A model and the work of one step."""

    shape: dict[str, Any] | str  # sizes, or the name of a preset
    tokens: int  # in a step
    length: int  # maximum of a sequence
    learning_rate: float
    workers: int


LOADS = {
    "tiny": Load("tiny", 1024, 256, 2e-3, workers=0),
    "110M": Load(
        {
            "vocab_size": 320,  # of which the bytes are 258; products are fast in multiples of 64
            "hidden_size": 768,
            "intermediate_size": 3328,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        8192,
        1024,
        6e-4,
        workers=2,
    ),
    "1B": Load("llama-3.2-1b", 8192, 1024, 3e-4, workers=2),
}


@dataclass
class Curve:
    """One run.

    Attributes:
        precision: Name of the precision, a key of `PRECISIONS`.
        losses: Loss of each step.
        last: Mean loss of the last window.
        mean_difference: Mean over all windows of the relative difference between this run's smoothed loss and the
            first run's.
        greatest_difference: The greatest of these differences.
    """

    precision: str
    losses: list[float]
    last: float
    mean_difference: float
    greatest_difference: float


def main() -> None:
    """Train, compare, and write the files."""
    options = arguments(sys.argv[1:])
    if not options.no_runs:
        run(options.shape, options.precisions, options.steps, options.json)
    if options.page:
        write_page(options.json, options.page)


def arguments(words: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LOADS, default="110M", help="size of the model (default: %(default)s)")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=DEFAULT,
        help=f"train in each, and compare with the first (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=500, help="steps of each run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    parser.add_argument("--page", type=Path, help="write a page in Markdown with the losses of the --json file")
    parser.add_argument("--no-runs", action="store_true", help="train nothing, only write the page again")
    options = parser.parse_args(words)
    if options.steps < WINDOW:
        parser.error(f"--steps {options.steps}: losses are means of {WINDOW} steps, so give at least as many.")
    if options.page and not options.json:
        parser.error(f"--page {options.page}: the losses come from a file, so give --json FILE as well.")
    if options.no_runs and not options.page:
        parser.error("--no-runs only writes a page, so give --page FILE as well.")
    return options


def run(shape: str, precisions: list[str], steps: int, json_file: Path | None) -> None:
    """Train in each precision, and write its curve as soon as its run is done."""
    from llama_te_core.layers import transformer_engine_problem
    from llama_te_core.train.config.machine import check_machine

    layers = "plain PyTorch layers"
    if transformer_engine_problem() is None:
        import transformer_engine

        layers = f"Transformer Engine {transformer_engine.__version__}"
    texts = docstrings()
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "layers": layers,
        "python": platform.python_version(),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "text_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        "shape": shape,
    }
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "docstrings.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        configs = {precision: training_config(shape, precision, steps, source) for precision in precisions}
        for precision, config in configs.items():
            try:
                check_machine(config, 1)
            except RuntimeError as error:  # now, not after the runs before it
                raise SystemExit(f"--precisions {precision}: {error}") from error
        for precision, config in configs.items():
            losses[precision] = losses_of(config)
            if len(losses[precision]) < steps:
                raise SystemExit(f"{precision} was stopped at step {len(losses[precision])} of {steps}.")
            *_, curve = curves = compare(losses)
            print(
                f"{curve.precision:<12} loss {curve.last:7.4f}  difference: mean {curve.mean_difference:7.3%}, "
                f"greatest {curve.greatest_difference:7.3%}",
                flush=True,
            )
            if json_file is not None:
                json_file.write_text(json.dumps({**about, "curves": [asdict(curve) for curve in curves]}) + "\n")


def docstrings() -> list[str]:
    """Return the docstrings of Python's standard library, each text once."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(file.relative_to(root).parts):
            continue  # other packages, and tests, whose files need not parse
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts[ast.get_docstring(node) or ""] = None
    texts.pop("")
    return list(texts)


def training_config(shape: str, precision: str, steps: int, source: Path) -> Any:
    """Return the `TrainConfig` of one run."""
    import yaml

    from llama_te_core.train.command import presets
    from llama_te_core.train.config import (
        CheckpointConfig,
        DataConfig,
        ExportConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        ScheduleConfig,
        ShapeConfig,
        TrainConfig,
    )

    load = LOADS[shape]
    sizes = load.shape
    if isinstance(sizes, str):
        sizes = yaml.safe_load(Path(presets()[sizes]).read_text())["model"]["shape"]
    return TrainConfig(
        data=DataConfig(
            str(source),
            tokenizer="bytes",
            tokens_per_batch=load.tokens,
            sequence_length=load.length,
            workers=load.workers,
        ),
        model=ModelConfig(shape=ShapeConfig(**sizes)),
        steps=steps,
        folder=str(source.parent / precision),
        precision=PrecisionConfig(**PRECISIONS[precision]),
        optimizer=OptimizerConfig(learning_rate=load.learning_rate),
        schedule=ScheduleConfig(warmup_steps=steps // 10),
        checkpoint=CheckpointConfig(interval=None),
        export=ExportConfig(te=False),
    )


def losses_of(config: Any) -> list[float]:
    """Train in this process, and return the loss of each step."""
    from llama_te_core.train.loop import train

    train(config)
    gc.collect()
    torch.cuda.empty_cache()
    return [json.loads(line)["loss"] for line in (Path(config.folder) / "metrics.jsonl").read_text().splitlines()]


def compare(losses: dict[str, list[float]]) -> list[Curve]:
    """Compare the losses of several precisions with the first."""
    first = smoothed(next(iter(losses.values())))
    curves = []
    for precision, values in losses.items():
        smooth = smoothed(values)
        differences = [abs(a - b) / b for a, b in zip(smooth, first, strict=True)]
        curves.append(Curve(precision, values, smooth[-1], sum(differences) / len(differences), max(differences)))
    return curves


def smoothed(losses: list[float]) -> list[float]:
    """Return the means of all windows; the first window ends at step `WINDOW`."""
    return [sum(losses[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(losses) + 1)]


def write_page(json_file: Path, page: Path) -> None:
    """Write the documentation page of the curves, and its plot beside it."""
    record = json.loads(json_file.read_text())
    curves = [Curve(**curve) for curve in record["curves"]]
    plot = page.with_suffix(".svg")
    draw(curves, plot)
    load, steps, first = LOADS[record["shape"]], len(curves[0].losses), curves[0]
    head = ["precision", f"loss of the last {WINDOW} steps", "mean difference", "greatest difference"]
    rows = [[first.precision, f"{first.last:.4f}", "", ""]]
    for curve in curves[1:]:
        differences = [f"{curve.mean_difference:.3%}", f"{curve.greatest_difference:.3%}"]
        rows.append([curve.precision, f"{curve.last:.4f}", *differences])
    lines = [
        "# Loss curves by precision",
        "",
        f"Written by `python benchmarks/loss_curves.py --shape {record['shape']} --precisions "
        f"{' '.join(curve.precision for curve in curves)} --steps {steps} --json {json_file.as_posix()} --page "
        f"{page.as_posix()}`.",
        "",
        f"Measured on {record['device']} with torch {record['torch']} and {record['layers']}. The "
        f"[training command](../guides/train.md) trained a model of the shape {record['shape']} for {steps} steps of "
        f"{load.tokens:,} tokens, in sequences of at most {load.length:,}. All runs have the same random weights and "
        f"the same batches in the same order. The text is the docstrings of Python {record['python']}'s standard "
        f"library, one token a byte: {record['text_bytes']:,} tokens, repeated as often as needed. Losses are means of "
        f"{WINDOW} steps. Differences are relative to the loss of {first.precision}, over all such means.",
        "",
        "[Numerics](../guides/numerics.md#training) says what these curves show.",
        "",
        f"![Losses and their differences from those of {first.precision}]({plot.name})",
        "",
        *pages.table(head, rows),
    ]
    pages.write(page, lines)


def draw(curves: list[Curve], path: Path) -> None:
    """Draw the smoothed losses, and below them their differences from the first run."""
    first = smoothed(curves[0].losses)
    drawn = slice(None, None, 2)  # every second mean: twenty steps wide, neighbours differ little
    steps = range(WINDOW, WINDOW + len(first))[drawn]
    with pages.plot(path, (8, 6)) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for curve in curves:
            smooth = smoothed(curve.losses)
            above.plot(steps, smooth[drawn], label=curve.precision, linewidth=1)
            below.plot(steps, [100 * (a - b) / b for a, b in zip(smooth, first, strict=True)][drawn], linewidth=1)
        above.set_ylabel(f"loss, mean of {WINDOW} steps")
        above.legend()
        below.set_ylabel(f"% from {curves[0].precision}")
        below.set_xlabel("step")


if __name__ == "__main__":
    main()
