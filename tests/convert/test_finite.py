"""NaN and infinite weights, found in every dtype and counted as torch counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_te_convert.cli import main
from llama_te_convert.sources.safetensors import SafetensorsFolder
from llama_te_convert.verify.finite import values_that_are_not_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


def test_every_bit_pattern_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        # All patterns of the two bytes with the exponent, with random bytes below them.
        top = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
        below = torch.randint(0, 2, (2**16, max(0, dtype.itemsize - 2)), dtype=torch.uint8, generator=generator)
        tensors[str(dtype)] = torch.cat([below, top], 1).contiguous().view(-1).view(dtype).clone()
    tensors["numbers"] = torch.arange(9)
    tensors["fine"] = torch.ones(3, 3)
    tensors["empty"] = torch.empty(0, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    found = {sentence.split(" [")[0]: sentence for sentence in values_that_are_not_finite(source)}
    source.close()
    assert found.keys() == {str(dtype) for dtype in DTYPES}
    for dtype in DTYPES:
        wide = tensors[str(dtype)].to(torch.float64)
        nans, infinities = int(wide.isnan().sum()), int(wide.isinf().sum())
        infinite = f" and {infinities} infinite" if infinities else ""
        assert found[str(dtype)] == f"{dtype} [{len(wide)}] has {nans} NaN{infinite} values."


@pytest.fixture
def folder(tiny_llama, tmp_path: Path) -> Path:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][3, 5] = float("nan")
    tensors["model.norm.weight"][:2] = float("-inf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "hf"


def test_inspect_and_verify_report_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [
        "model.layers.{0..1}.mlp.up_proj.weight [96, 64] has 1 NaN values.",
        "model.norm.weight [64] has 2 infinite values.",
    ]
    assert main(["inspect", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == ["2 wrong:", *(f"  {each}" for each in sentences)]
    assert main(["to-te", str(folder), str(tmp_path / "te")]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder), str(tmp_path / "te")]) == 0  # both have them
    out = capsys.readouterr().out
    for sentence in sentences:
        assert f"note: {folder}: {sentence}" in out
    assert f"note: {tmp_path / 'te'}: model.norm.weight [64] has 2 infinite values." in out


def test_an_architecture_that_does_not_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "qwen2"'))
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "only checkpoints of 'llama', 'mistral' convert. Load other models with transformers." in out
    assert "Correct its config.json" not in out
