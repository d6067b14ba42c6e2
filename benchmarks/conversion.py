"""Time and memory of converting a checkpoint on disk, beside `cp -r` and `sync` of the same folder.

The program writes a checkpoint with the shape of Llama 3.2 1B and random bits, and one four times as large. It converts
each to the Transformer Engine layout and back with the command, as users do. Then it compares every tensor with the
original, bit for bit. The peak is the memory of the whole process (ru_maxrss), libraries included.

    python benchmarks/conversion.py --folder /path/with/60/GB --json benchmarks/results/DATE_cpu_conversion.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_te_convert import __version__
from shapes import LLAMA_3, VOCABULARY

# Only child processes import torch: a child starts with the peak memory of its parent.
SHARD_BYTES = 1_200_000_000
CONFIG: dict[str, Any] = LLAMA_3["1B"] | {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
LAYERS = {"1B": 16, "four times 1B": 77}


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes, in the order of a checkpoint."""
    hidden, mlp, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_key_value_heads"] * 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (mlp, hidden),
            f"{prefix}mlp.up_proj.weight": (mlp, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, mlp),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a checkpoint of random bits, and return the bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = tensors(layers)
    groups: list[list[str]] = [[]]
    size = largest = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        largest = max(largest, nbytes)
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    index: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        part = {
            name: torch.randint(-(2**15), 2**15, shapes[name], dtype=torch.int16, generator=generator).view(
                torch.bfloat16
            )
            for name in group
        }
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return largest


def run(*command: str) -> tuple[float, float]:
    """Run a command; return its seconds and its peak memory in MB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def equal_tensors(one: Path, other: Path) -> int:
    """Check that both folders have the same tensors, bit for bit, and return their number."""
    import torch
    from safetensors import safe_open

    maps = [json.loads((each / "model.safetensors.index.json").read_text())["weight_map"] for each in (one, other)]
    if maps[0].keys() != maps[1].keys():
        raise SystemExit("not the same tensors after the way back")
    for name in maps[0]:
        bits = []
        for folder, files in zip((one, other), maps, strict=True):
            with safe_open(folder / files[name], "pt") as file:
                bits.append(file.get_tensor(name).view(torch.int16))
        if not torch.equal(*bits):
            raise SystemExit(f"not equal after the way back: {name}")
    return len(maps[0])


def measure(name: str, layers: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Convert there and back; each conversion alternates with a copy of the same folder, which writes as much."""
    source, te, hf, copy = (folder / each for each in ("source", "te", "hf", "copy"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        largest = pool.submit(make_checkpoint, source, layers).result()
    results: dict[str, Any] = {}
    for way, begin, end in (("to-te", source, te), ("to-hf", te, hf)):
        convert = [sys.executable, "-m", "llama_te_convert", way, str(begin), str(end)]
        copies, conversions = [], []
        for _ in range(rounds):
            for each, command, runs in (
                (copy, ["sh", "-c", f"cp -r '{begin}' '{copy}' && sync"], copies),
                (end, [*convert, "--max-shard-size", str(SHARD_BYTES)], conversions),
            ):
                for old in (copy, end):
                    shutil.rmtree(old, ignore_errors=True)
                os.sync()
                runs.append(run(*command))
                assert each.exists()
        shutil.rmtree(copy, ignore_errors=True)
        results[way] = {
            "copy_seconds": [seconds for seconds, _ in copies],
            "seconds": [seconds for seconds, _ in conversions],
            "times_copy": statistics.median(s for s, _ in conversions) / statistics.median(s for s, _ in copies),
            "peak_megabytes": max(peak for _, peak in conversions),
        }
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        equal = pool.submit(equal_tensors, source, hf).result()
    return {
        "checkpoint": name,
        "megabytes": sum(path.stat().st_size for path in source.iterdir()) / 1e6,
        "largest_tensor_megabytes": largest / 1e6,
        "tensors_equal_after_the_way_back": equal,
        **results,
    }


def main() -> None:
    """Measure, print, and write the file."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to measure"
    )
    options.add_argument("--only", choices=LAYERS, help="measure only this checkpoint")
    options.add_argument("--rounds", type=int, default=3, help="rounds of copying and converting")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    arguments = options.parse_args()
    results = []
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {version('torch')}, llama-te-convert {__version__}"
    print(machine, flush=True)
    for name, layers in LAYERS.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                result = measure(name, layers, Path(folder), arguments.rounds)
            results.append(result)
            print(f"{name}: {result['megabytes']:.0f} MB, largest tensor {result['largest_tensor_megabytes']:.0f} MB")
            for way in ("to-te", "to-hf"):
                figures = result[way]
                converted, copied = (
                    " ".join(f"{seconds:.1f}" for seconds in figures[what]) for what in ("seconds", "copy_seconds")
                )
                print(f"  {way}: {converted} s; cp -r and sync: {copied} s; medians {figures['times_copy']:.2f} x")
                print(f"         peak {figures['peak_megabytes']:.0f} MB")
            equal = result["tensors_equal_after_the_way_back"]
            print(f"  {equal} tensors equal after the way back, bit for bit", flush=True)
    if arguments.json is not None:
        report = {"machine": machine, "results": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
