"""Reports a run's loss, gradient norm, speed and memory on the console, in a file, to TensorBoard and to W&B.

Shapes: N steps since the last report, S rows and columns of a square matrix.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import secrets
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..files.disk import replace_text, writing_to
from ..models.configuration_nvllama import NVLlamaConfig
from ..parallel.mesh import process_rank
from .config import LogConfig

# Dense tensor-core operations of one GPU, in 1e12 per second, by words of the GPU's name in torch. The first matching
# entry counts. `peak_flops` names the sources.
PEAKS = {
    "A100": {"bf16": 312.0},
    "H100 PCIe": {"bf16": 756.0, "fp8": 1513.0},
    "H100 NVL": {"bf16": 835.5, "fp8": 1670.5},
    "H200 NVL": {"bf16": 835.5, "fp8": 1670.5},
    "H100": {"bf16": 989.4, "fp8": 1978.9},
    "H200": {"bf16": 989.4, "fp8": 1978.9},
    "GH200": {"bf16": 989.4, "fp8": 1978.9},
    "B200": {"bf16": 2250.0, "fp8": 4500.0, "mxfp8": 4500.0, "nvfp4": 9000.0},
    "GB200": {"bf16": 2500.0, "fp8": 5000.0, "mxfp8": 5000.0, "nvfp4": 10_000.0},
    "B300": {"bf16": 2250.0, "fp8": 4500.0, "mxfp8": 4500.0, "nvfp4": 13_500.0},
    "GB300": {"bf16": 2500.0, "fp8": 5000.0, "mxfp8": 5000.0, "nvfp4": 15_000.0},
}


PRODUCT_SIZE = 8192
PRODUCTS = 20  # one after the other, so that launches count little: 30 ms on an H100


class NonFiniteLossError(RuntimeError):
    """The loss or the norm of the gradients is infinite or NaN."""


def peak_flops(gpu: str, compute: str) -> float | None:
    """Return a GPU's peak number of operations per second; `None` where the table does not have the GPU.

    Numbers are NVIDIA's for dense matrices. Where NVIDIA publishes only numbers with sparsity, the table has half:

    - A100: its data sheet (2021).
    - H100 SXM and PCIe: "H100 Tensor Core GPU Architecture" (2022). H200 and GH200 have the same chip at the
      same clock; their data sheets (2024) round its 1,978.9 to 1,979.
    - H100 NVL, H200 NVL: their data sheets (2024), 1,671 in BF16 and 3,341 in FP8 with sparsity.
    - B200, GB200: "Blackwell Architecture Technical Brief" (2024), table 3, of a GPU: 4,500 or 5,000 in BF16 with
      sparsity, twice that in FP8, four times in FP4.
    - B300, GB300: data sheets of the DGX B300 and the GB300 NVL72 (2025), by their 8 and 72 GPUs: 36 and 360 PFLOP/s in
      BF16 and 72 and 720 in FP8 with sparsity, 108 and 1,080 in FP4 without.

    Args:
        gpu: The GPU's name from torch.cuda.get_device_name().
        compute: The number format of the layers, see `PrecisionConfig.compute`.
    """
    words = set(re.split("[ -]", gpu))  # compare whole words: GH200 must not match H200
    for name, peaks in PEAKS.items():
        if words.issuperset(name.split()):
            return peaks[compute] * 1e12 if compute in peaks else None
    return None


def training_flops(config: NVLlamaConfig, tokens: float, squared_lengths: float) -> float:
    """Return the number of operations of training on some tokens, forward and backward, each counted once.

    The count follows appendix B of the PaLM paper (Chowdhery et al., 2022, arXiv 2204.02311): 6 for each token and each
    weight of a matrix product; and for attention, 12 for each layer, feature of the heads, query and key. Causality
    halves the number of keys, and with packing a query has only the keys of its own sequence.

    Args:
        config: The model.
        tokens: The number of tokens.
        squared_lengths: The sum of the squares of the sequences' lengths.
    """
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return 6 * weights * tokens + 6 * config.num_hidden_layers * heads * squared_lengths


def bf16_product_rate(device: torch.device) -> float:
    """Measure how many operations per second a GPU reaches in products of two large BF16 matrices.

    The published peak assumes a clock that the GPU's power limit seldom allows. This rate can be reached. The function
    does not change training's random numbers.

    Args:
        device: The GPU. This function waits for it.
    """
    own = torch.Generator(device).manual_seed(0)
    a_SS, b_SS = (
        torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, generator=own, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    out_SS = torch.empty_like(a_SS)

    def seconds() -> float:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(a_SS, b_SS, out=out_SS)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    seconds()  # this first run loads kernels and settles the clock
    return PRODUCTS * 2 * PRODUCT_SIZE**3 / seconds()


class Metrics:
    """Collects the steps' metrics without waiting for the GPU; `report` writes them.

    Rank 0 writes a line on the console, `metrics.jsonl` and TensorBoard's files in the run's folder, and to W&B. The
    file `wandb-id` keeps W&B's id of the run, so that a resumed run stays one run there.

    Args:
        config: The section `log`.
        folder: The run's folder.
        model_config: The model, for the number of operations.
        compute: The layers' number format, for the GPU's peak.
        device: The device of the training.
        ranks: The number of data-parallel ranks.
        step: The last step before this start. Lines of later steps are dropped, since the run repeats them.
        steps: The last step of the run.
        settings: The run's configuration, for W&B.

    Raises:
        DiskError: A file cannot be written. `report` and `close` raise it too.
    """

    def __init__(
        self,
        config: LogConfig,
        folder: Path,
        model_config: NVLlamaConfig,
        *,
        compute: str,
        device: torch.device,
        ranks: int,
        step: int,
        steps: int,
        settings: dict[str, Any],
    ) -> None:
        self.model_config = model_config
        self.device = device
        self.steps = steps
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.ranks_of_a_batch = self.world_size // ranks
        self.peak = peak_flops(torch.cuda.get_device_name(device), compute) if device.type == "cuda" else None
        self.product_rate: float | None = None
        if process_rank() == 0 and device.type == "cuda" and compute != "fp32":
            self.product_rate = bf16_product_rate(device)
        self._rows: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []
        self._tokens = self._squared_lengths = 0
        self._since = time.perf_counter()
        self._file: Path | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if process_rank() != 0:
            return
        self._file = folder / "metrics.jsonl"
        with writing_to(folder):
            drop_lines_after(self._file, step)
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        if config.wandb_project is not None:
            self._wandb = importlib.import_module("wandb").init(
                project=config.wandb_project, dir=folder, config=settings, id=_wandb_id(folder, step), resume="allow"
            )

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, learning_rate: float) -> None:
        """Add a step.

        Args:
            step: The step's number.
            loss: This process's loss, [] on the device. Its mean over the processes is the mean over all tokens.
            norm: The norm of all gradients before clipping, [] on the device.
            learning_rate: The rate of the step.
        """
        self._rows.append((step, loss.detach(), norm.detach(), learning_rate))

    def count(self, tokens: int, squared_lengths: int) -> None:
        """Add a batch of this process's data-parallel rank."""
        self._tokens += tokens
        self._squared_lengths += squared_lengths

    def report(self) -> None:
        """Write the metrics of the steps since the last report; all processes call this together.

        Raises:
            NonFiniteLossError: A loss or a norm is infinite or NaN.
        """
        if not self._rows:
            return
        numbers = torch.tensor([self._tokens, self._squared_lengths], dtype=torch.float64)
        loss_N = torch.stack([loss.float() for _, loss, _, _ in self._rows]).double()
        norm_N = torch.stack([norm.float() for _, _, norm, _ in self._rows]).double()
        summed = torch.cat((loss_N, numbers.to(self.device)))
        if self.world_size > 1:
            dist.all_reduce(summed)
        # During training the host waits for the GPU only here.
        *losses, tokens, squared_lengths = summed.tolist()
        losses = [loss / self.world_size for loss in losses]
        norms = norm_N.tolist()
        tokens, squared_lengths = tokens / self.ranks_of_a_batch, squared_lengths / self.ranks_of_a_batch
        seconds = time.perf_counter() - self._since
        speed: dict[str, float] = {"tokens_per_second": tokens / seconds}
        flops = training_flops(self.model_config, tokens, squared_lengths) / seconds / self.world_size
        if self.device.type == "cuda":
            speed["teraflops_per_gpu"] = flops / 1e12
            speed["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.peak is not None:
            speed["mfu"] = flops / self.peak
        if self.product_rate is not None:
            speed["share_of_bf16_products"] = flops / self.product_rate
        finite = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in zip(losses, norms, strict=True)]
        failed = None if all(finite) else finite.index(False)
        if failed is not None:  # no step after it has updated anything
            self._rows, losses, norms = self._rows[: failed + 1], losses[: failed + 1], norms[: failed + 1]
        if self._file is not None:
            with writing_to(self._file):
                self._write(losses, norms, speed, seconds)
        last = self._rows[-1][0]
        self._rows = []
        self._tokens = self._squared_lengths = 0
        self._since = time.perf_counter()
        if failed is not None:
            raise NonFiniteLossError(
                f"step {last} has loss {losses[-1]} and a norm of gradients of {norms[-1]}. The step has not changed "
                f"the weights, which stay as after step {last - 1}. Training stops without saving. Go on from the last "
                "checkpoint with a lower optimizer.learning_rate, a longer schedule.warmup_steps or "
                "precision.compute='bf16', or look at the data."
            )

    def close(self) -> None:
        """Finish writing."""
        if self._tensorboard is not None:
            with writing_to(Path(self._tensorboard.log_dir)):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, losses: list[float], norms: list[float], speed: dict[str, float], seconds: float) -> None:
        assert self._file is not None
        last = len(self._rows) - 1
        with self._file.open("a", encoding="utf-8") as file:
            for number, ((step, _, _, rate), loss, norm) in enumerate(zip(self._rows, losses, norms, strict=True)):
                values = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
                if number == last:
                    values |= speed
                file.write(json.dumps({"step": step, **values}) + "\n")
                for name, value in values.items() if self._tensorboard is not None else ():
                    self._tensorboard.add_scalar(name, value, step)
                if self._wandb is not None:
                    self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            self._tensorboard.flush()
        step, rate = self._rows[-1][0], self._rows[-1][3]
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {losses[-1]:.4f}",
            f"norm {norms[-1]:.3f}",
            f"rate {rate:.2e}",
            f"{speed['tokens_per_second']:,.0f} tokens/s",
        ]
        if "teraflops_per_gpu" in speed:
            parts.append(f"{speed['teraflops_per_gpu']:.0f} TFLOP/s")
        if "mfu" in speed:
            parts.append(f"MFU {speed['mfu']:.1%}")
        if "share_of_bf16_products" in speed:
            parts.append(f"{speed['share_of_bf16_products']:.0%} of bf16 products")
        if "memory_gib" in speed:
            parts.append(f"{speed['memory_gib']:.1f} GiB")
        minutes = round(seconds / len(self._rows) * (self.steps - step) / 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02} h left")
        print("  ".join(parts), file=sys.stderr, flush=True)


def _wandb_id(folder: Path, step: int) -> str:
    """Return W&B's id of the run: a new id at the beginning, and the same id when the run is resumed."""
    file = folder / "wandb-id"
    if step == 0 or not file.exists():
        replace_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


def drop_lines_after(file: Path, step: int) -> None:
    """Keep the lines of a file up to a step, and drop an unfinished last line. A warning names other damaged lines."""
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    damaged = [number for number, found in enumerate(steps[:-1], start=1) if found is None]
    if damaged:
        warnings.warn(f"{file} has damaged lines, which are dropped: {', '.join(map(str, damaged))}.", stacklevel=2)
    kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
    if kept != lines:
        replace_text(file, b"".join(kept).decode())


def _step_of(line: bytes) -> int | None:
    """The step of a whole line of metrics; `None` for other bytes, as a lost write leaves them."""
    try:
        step = json.loads(line.decode("utf-8"))["step"]
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
    return step if line.endswith(b"\n") and type(step) is int else None
