"""Time the compiled operators on a GPU, against its copy bandwidth, Transformer Engine's kernels and index_select.

Every figure is the median over replays of a CUDA graph of many launches. So it is the cost of a launch inside a graph,
gaps included. The launches use several sets of tensors in turn. In the large cases the sets exceed the L2 cache. In a
decoding step they are the layers of a model, whose projections are in the L2 cache in real runs, too.

Sizes are those of Llama 3 8B: 8 key/value heads of 128 with 4 query heads each, bfloat16, 32 layers.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from limits import copy_bandwidth
from llama_te_infer.ops.append_rope import append_rope
from llama_te_infer.ops.reorder import reorder_pages, reorder_rows
from llama_te_infer.ops.widen_pages import widen_pages
from timing import milliseconds

KV_HEADS, GROUP, HEAD_DIM, LAYERS = 8, 4, 128, 32
DTYPE = torch.bfloat16
TOKEN_BYTES = KV_HEADS * HEAD_DIM * DTYPE.itemsize  # in one cache
BEAMS = 4
# The reorder of most steps of beam search: two rows change places, one is dropped, one is there twice.
SOURCE_ROWS = (1, 0, 0, 2)

Run = Callable[[], object]


@dataclass
class Figure:
    """One row of the table."""

    what: str
    microseconds: float
    megabytes: float  # data that must move, read plus written
    against: str = ""
    baseline_microseconds: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bandwidth in TB/s."""
        return self.megabytes / self.microseconds


def microseconds(runs: Sequence[Run], launches: int = 64, replays: int = 50) -> float:
    """Return the time of one of `runs` inside a CUDA graph that repeats all of them, for about `launches` launches."""
    rounds = max(1, launches // len(runs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for run in runs:
                run()
    times = [milliseconds(graph.replay) for _ in range(replays + 5)]
    del graph
    return statistics.median(times[5:]) * 1000 / (rounds * len(runs))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


# --- append -----------------------------------------------------------------------------------------------------------


def append_run(rows: int, new: int, before: int, page_size: int, padded: bool) -> Run:
    """Make a run that appends `new` tokens to each of `rows` rows of `before` tokens, for one layer."""
    tokens, length = rows * new, -(-(before + new) // 256) * 256
    angle = torch.rand(length, HEAD_DIM // 2, device="cuda") * 6.3
    page_table = None
    blocks = (rows, length)
    if page_size:
        pages = rows * length // page_size
        page_table = torch.randperm(pages, device="cuda").int().view(rows, -1)
        blocks = (pages, page_size)
    arguments: dict[str, Any] = {
        "qkv": random(tokens, KV_HEADS, GROUP + 2, HEAD_DIM),
        "cos_sin": torch.cat((angle.cos(), angle.sin()), dim=1),
        "cu_new": int32(range(0, tokens + 1, new)),
        "start": int32([before] * rows),
        "page_table": page_table,
        "width": new if padded else 0,
        "query": random(tokens, KV_HEADS * GROUP, HEAD_DIM),
        "key_cache": random(*blocks, KV_HEADS, HEAD_DIM),
        "value_cache": random(*blocks, KV_HEADS, HEAD_DIM),
    }
    return lambda: append_rope(**arguments)


def append_megabytes(tokens: int, positions: int) -> float:
    qkv = tokens * KV_HEADS * (GROUP + 2) * HEAD_DIM * DTYPE.itemsize
    return (2 * qkv + positions * HEAD_DIM * 4) / 1e6


class TransformerEngine:
    """The kernels that TE runs between the projection and the attention itself."""

    def __init__(self) -> None:
        from transformer_engine.pytorch.attention.inference import InferenceParams
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

        self.InferenceParams, self.rotate = InferenceParams, apply_rotary_pos_emb

    def run(self, rows: int, new: int, before: int, page_size: int) -> Run:
        """Make a run of TE's five kernels for a padded batch: two copies, two rotations, and the copy to the cache."""
        from collections import OrderedDict

        length = -(-(before + new) // 256) * 256
        pages: dict[str, Any] = {}
        if page_size:
            pages = {"is_paged": True, "page_size": page_size, "total_num_pages": rows * length // page_size}
        cache = self.InferenceParams(
            max_batch_size=rows,
            max_sequence_length=length,
            num_heads_kv=KV_HEADS,
            head_dim_k=HEAD_DIM,
            dtype=DTYPE,
            qkv_format="bshd",
            **pages,
        )
        cache.allocate_memory(1)
        if before:
            cache.pre_step(OrderedDict((row, before) for row in range(rows)))
        cache.pre_step(OrderedDict((row, new) for row in range(rows)))
        qkv = random(rows, new, KV_HEADS, GROUP + 2, HEAD_DIM)
        angle = torch.rand(length, 1, 1, HEAD_DIM // 2, device="cuda") * 6.3
        angle = torch.cat((angle, angle), dim=-1)
        start = cache.get_seqlens_pre_step()[:rows] if before else None

        def run() -> None:
            query = qkv[..., :GROUP, :].reshape(rows, new, KV_HEADS * GROUP, HEAD_DIM)
            key, value = qkv[..., GROUP, :], qkv[..., GROUP + 1, :].contiguous()
            self.rotate(query, angle, "bshd", start_positions=start, fused=True)
            key = self.rotate(key, angle, "bshd", start_positions=start, fused=True)
            cache.step(1, key, value, "bshd")

        return run


def append_figures() -> list[Figure]:
    try:
        engine = TransformerEngine()
    except Exception as error:
        print(f"Transformer Engine does not import ({error}): its column is left out.", file=sys.stderr)
        engine = None
    figures = []
    for rows, new, before, sets in ((1, 16384, 0, 3), (8, 2048, 0, 3), (1, 1, 1024, LAYERS), (32, 1, 1024, LAYERS)):
        for page_size in (0, 64):
            baseline = None
            if engine is not None:
                baseline = microseconds([engine.run(rows, new, before, page_size) for _ in range(sets)])
                torch.cuda.empty_cache()
            for padded in (False, True):
                time = microseconds([append_run(rows, new, before, page_size, padded) for _ in range(sets)])
                what = f"append, {rows} x {new} tokens after {before}, "
                what += f"{'pages' if page_size else 'rows'}, {'padded' if padded else 'packed'}"
                positions = new if before == 0 else 1
                against = "TE" if engine is not None else ""
                figures.append(Figure(what, time, append_megabytes(rows * new, positions), against, baseline))
                torch.cuda.empty_cache()
    return figures


# --- beam reordering --------------------------------------------------------------------------------------------------


def moved_megabytes(tokens: int) -> float:
    moved = [(row, source) for row, source in enumerate(SOURCE_ROWS) if row != source]
    copies = len(moved) + len({source for _, source in moved})
    return copies * tokens * TOKEN_BYTES * 2 * LAYERS / 1e6


def row_figures() -> list[Figure]:
    figures = []
    for tokens, sets in ((128, 3), (8192, 1)):
        shape = (BEAMS, tokens + 128, KV_HEADS, HEAD_DIM)
        source_rows, lengths = torch.tensor(SOURCE_ROWS, device="cuda"), int32([tokens] * BEAMS)
        runs: list[Run] = []
        selects: list[Run] = []
        for _ in range(sets):
            caches = [random(*shape) for _ in range(2 * LAYERS)]

            def select(caches: Any = caches, tokens: int = tokens, source_rows: Any = source_rows) -> None:
                for cache in caches:
                    part = cache[:, :tokens]
                    part.copy_(part.index_select(0, source_rows))

            def reorder(caches: Any = caches, source_rows: Any = source_rows, lengths: Any = lengths) -> None:
                reorder_rows(caches, source_rows, lengths)

            runs.append(reorder)
            selects.append(select)
        what = f"reorder of {BEAMS} rows x {LAYERS} layers, {tokens} tokens"
        launches = 12 if tokens < 1000 else 3
        time, baseline = microseconds(runs, launches), microseconds(selects, launches)
        figures.append(Figure(what, time, moved_megabytes(tokens), "index_select", baseline))
        del caches, runs, selects, select, reorder
        torch.cuda.empty_cache()
    return figures


def page_figures() -> list[Figure]:
    figures = []
    for page_size, rest in ((16, 0), (16, 8), (16, 15), (64, 32), (64, 63)):
        for whole in (128, 32768):
            tokens = whole if rest == 0 else whole - page_size + rest
            full, most = tokens // page_size, whole // page_size + 1
            # The beams share their full pages. Behind them each beam has one page of its own.
            table = torch.arange(most, device="cuda").int().repeat(BEAMS, 1)
            table[:, full:] = most + torch.arange(BEAMS, device="cuda").int()[:, None]
            caches = [random(most + BEAMS, page_size, KV_HEADS, HEAD_DIM) for _ in range(2 * LAYERS)]
            source_rows, lengths = torch.tensor(SOURCE_ROWS, device="cuda"), int32([tokens] * BEAMS)
            ticket = torch.zeros(1, dtype=torch.int32, device="cuda")

            def reorder(
                caches: Any = caches,
                table: Any = table,
                source_rows: Any = source_rows,
                lengths: Any = lengths,
                page_size: int = page_size,
                ticket: Any = ticket,
            ) -> None:
                reorder_pages(caches, table, source_rows, lengths, page_size, ticket)

            def select(
                caches: Any = caches,
                table: Any = table,
                source_rows: Any = source_rows,
                full: int = full,
                rest: int = rest,
            ) -> None:
                own = table[:, full].long()
                table[:, :full] = table[:, :full].index_select(0, source_rows)
                for cache in caches if rest else ():
                    cache[own, :rest] = cache[own.index_select(0, source_rows), :rest]

            what = f"reorder of pages of {page_size}, {BEAMS} rows x {LAYERS} layers, {tokens} tokens"
            moved = moved_megabytes(rest) + 2 * BEAMS * full * 4 / 1e6
            time, baseline = microseconds([reorder], 32), microseconds([select], 4)
            figures.append(Figure(what, time, moved, "index_select", baseline))
            del caches, reorder, select
            torch.cuda.empty_cache()
    return figures


# --- FP8 caches -------------------------------------------------------------------------------------------------------


def widen_figures() -> list[Figure]:
    """Time the keys or values of one layer."""
    figures = []
    for rows, tokens, page_size in ((1, 8192, 64), (1, 32768, 64), (32, 1024, 64), (32, 1024, 16)):
        pages = rows * tokens // page_size
        source = random(pages, page_size, KV_HEADS, HEAD_DIM).to(torch.float8_e4m3fn)
        scale = torch.full((pages, KV_HEADS, page_size), 127, dtype=torch.uint8, device="cuda")
        table = torch.randperm(pages, device="cuda").int().view(rows, -1)
        target = torch.empty(source.shape, dtype=DTYPE, device="cuda")
        length = int32([tokens] * rows)

        time = microseconds([functools.partial(widen_pages, source, scale, table, length, target)])
        megabytes = (source.nbytes + scale.nbytes + target.nbytes) / 1e6
        figures.append(Figure(f"widen, {rows} x {tokens} tokens, pages of {page_size}", time, megabytes))
    return figures


# --- output -----------------------------------------------------------------------------------------------------------


def as_text(figures: list[Figure], copy: float) -> str:
    width = max(len(figure.what) for figure in figures)
    lines = [f"{'':{width}} {'us':>9} {'MB':>9} {'TB/s':>7} {'of copy':>8}  baseline"]
    for figure in figures:
        line = f"{figure.what:{width}} {figure.microseconds:9.2f} {figure.megabytes:9.3f} {figure.bandwidth:7.3f} "
        line += f"{figure.bandwidth / copy:8.1%}"
        if figure.baseline_microseconds is not None:
            times = figure.baseline_microseconds / figure.microseconds
            line += f"  {figure.against}: {figure.baseline_microseconds:.2f} us, {times:.1f} x"
        lines.append(line)
    return "\n".join(lines)


def report(measure: Callable[[], list[Figure]], json_file: Path | None) -> None:
    """Measure the bandwidth of a copy, then the figures; print them, and write them to a file."""
    torch.manual_seed(0)
    with torch.no_grad():
        copy = copy_bandwidth() / 1e12
        torch.cuda.empty_cache()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copies at {copy:.3f} TB/s", flush=True)
        figures = measure()
    print(as_text(figures, copy))
    if json_file is not None:
        record = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_terabytes_per_second": copy,
            "figures": [asdict(figure) | {"bandwidth": figure.bandwidth} for figure in figures],
        }
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    report(lambda: append_figures() + row_figures() + page_figures() + widen_figures(), arguments.json)


if __name__ == "__main__":
    main()
