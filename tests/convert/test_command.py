"""The command `llama-te-convert`, as users type it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from llama_te_convert.cli import main, parser
from llama_te_convert.sources.safetensors import SafetensorsFolder


@pytest.fixture
def source(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_main_job(source: Path, tmp_path: Path, capsys) -> None:
    te, back = tmp_path / "te", tmp_path / "back"
    options = ["--set", "attn_input_format=bshd", "--layer-precision", "1:-1=fp8", "--max-shard-size", "100KB"]
    status, out, err = run(capsys, "to-te", source, te, *options)
    assert (status, err) == (0, "")
    assert out.startswith(f"{te}: 21 tensors, 0.00 GB, in ")
    assert out.rstrip().endswith("MB/s.")
    config = AutoConfig.from_pretrained(te)
    assert (config.attn_input_format, config.layer_precision) == ("bshd", [None, "fp8", None])
    assert len(list(te.glob("*.safetensors"))) > 1
    assert run(capsys, "to-te", source, te, *options)[:2] == (
        0,
        f"{te} is there already: 21 tensors, 0.00 GB. Nothing to do.\n",
    )

    status, out, err = run(capsys, "to-hf", te, back, "--json")
    report = json.loads(out)
    assert (status, report["folder"], report["tensors"], report["kept_bytes"]) == (0, str(back), 30, 0)
    assert report["bytes"] == sum(x.nbytes for x in load_file(back / "model.safetensors").values())
    assert report["megabytes_per_second"] > 0

    for a, b in ((source, te), (te, back), (source, back)):
        status, out, err = run(capsys, "verify", a, b)
        assert status == 0, out
    status, out, err = run(capsys, "inspect", te)
    assert status == 0
    assert "Transformer Engine" in out
    status, out, err = run(capsys, "inspect", source, "--json")
    assert status == 0
    assert json.loads(out)


def test_verify_ends_with_1_where_something_differs(source: Path, tmp_path: Path, capsys) -> None:
    run(capsys, "to-te", source, tmp_path / "te")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    status, out, _ = run(capsys, "verify", source, tmp_path / "te")
    assert status == 1
    assert "model.layers.1.self_attn.k_proj.weight" in out
    status, out, _ = run(capsys, "verify", source, tmp_path / "te", "--json")
    assert status == 1
    assert "model.layers.1.self_attn.k_proj.weight" in out
    assert json.loads(out)


def test_verify_closes_the_first_checkpoint_if_the_second_cannot_be_opened(
    source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    closed = []
    monkeypatch.setattr(SafetensorsFolder, "close", lambda folder: closed.append(sorted(folder.files)))
    status, _, err = run(capsys, "verify", source, tmp_path / "empty")
    assert status == 1
    assert "has no tensors" in err
    assert closed == [["model.safetensors"]]


def test_casting_is_within_tolerance_only(source: Path, tmp_path: Path, capsys) -> None:
    run(capsys, "to-te", source, tmp_path / "te", "--dtype", "float16")
    assert next(iter(load_file(tmp_path / "te" / "model.safetensors").values())).dtype == torch.float16
    assert run(capsys, "verify", source, tmp_path / "te")[0] == 1
    assert run(capsys, "verify", source, tmp_path / "te", "--tolerance")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-te", "{tmp}/nothing", "{tmp}/te"], r"nothing does not exist, and is not the id"),
        (["to-te", "./nothing", "{tmp}/te"], r"./nothing does not exist, and is not the id"),
        (["adapter-to-hf", "{adapter}", "{tmp}/te", "--base", "../nothing"], r"../nothing does not exist, and is not"),
        (
            ["to-hf", "{tmp}/model.gguf", "{tmp}/te"],
            r"model.gguf is a GGUF file, which has no Transformer Engine layout",
        ),
        (["to-hf", "{hf}", "{tmp}/te"], r"has the Hugging Face layout already"),
        (["inspect", "{tmp}"], r"has no tensors: looked for"),
        (["verify", "{hf}", "{tmp}/nothing"], r"nothing does not exist"),
        (["to-te", "{hf}", "{tmp}/te", "--layer-precision", "0=fp9"], r"'0=fp9' does not end in =fp8, =fp4 or =none"),
        (
            ["to-te", "{hf}", "{tmp}/te", "--layer-precision", "3=fp8"],
            r"'3=fp8' names a layer that the model does not have: it has 3",
        ),
        (["to-te", "{hf}", "{tmp}/te", "--layer-precision", "a:b=fp8"], r"does not name layers by whole numbers"),
        (["to-te", "{hf}", "{tmp}/te", "--layer-precision", "1:2:3:4=fp8"], r"does not name layers"),
        (["to-te", "{hf}", "{tmp}/te", "--layer-precision", "=fp8"], r"does not name layers"),
        (["to-te", "{hf}", "{tmp}/te", "--set", "attn_input_format=sbhd"], r"attn_input_format='sbhd' is not known"),
    ],
)
def test_errors_are_one_line(source: Path, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 8}')
    places = {"tmp": tmp_path, "hf": source, "adapter": tmp_path / "adapter"}
    status, out, err = run(capsys, *(each.format(**places) for each in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("llama-te-convert: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "te").exists()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1:-1=fp8", [None, "fp8", "fp8", None]),
        (":=fp4", ["fp4"] * 4),
        ("-1=fp8", [None, None, None, "fp8"]),
        ("::2=fp8", ["fp8", None, "fp8", None]),
        (":=fp8, 0=none,3=FP4", [None, "fp8", "fp8", "fp4"]),
        ("2:99=fp8", [None, None, "fp8", "fp8"]),
    ],
)
def test_layer_precision(tiny_llama, tmp_path: Path, capsys, spec: str, expected: list[Any]) -> None:
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "hf")
    status, _, err = run(capsys, "to-te", tmp_path / "hf", tmp_path / "te", f"--layer-precision={spec}")
    assert status == 0, err
    assert json.loads((tmp_path / "te" / "config.json").read_text())["layer_precision"] == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("2GiB", 2**31), ("100", 100), ("7KB", 7000)],
)
def test_sizes(text: str, size: int) -> None:
    options = parser().parse_args(["to-te", "a", "b", "--max-shard-size", text])
    assert options.max_shard_size == size


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["to-te", "a"],
        ["to-te", "a", "b", "--max-shard-size", "5 apples"],
        ["to-te", "a", "b", "--max-shard-size", "0GB"],
        ["to-te", "a", "b", "--max-shard-size", "-1GB"],
        ["to-te", "a", "b", "--max-shard-size", "B"],
        ["to-te", "a", "b", "--set", "x"],
        ["to-te", "a", "b", "--set", "=3"],
        ["to-te", "a", "b", "--dtype", "int8"],
        ["to-te", "a", "b", "--fp8"],
        ["to-hf", "a", "b", "--layer-precision", "0=fp8"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: llama-te-convert" in capsys.readouterr().err


def test_values_are_json_or_text() -> None:
    changes = ["--set", "a=3", "--set", "b=null", "--set", 'c={"x": [1]}', "--set", "d=x=y"]
    options = parser().parse_args(["to-te", "a", "b", *changes])
    assert dict(options.changes) == {"a": 3, "b": None, "c": {"x": [1]}, "d": "x=y"}


def test_interrupted(source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_te_convert.on_disk.convert_checkpoint", interrupt)
    status, out, err = run(capsys, "to-te", source, tmp_path / "te")
    assert (status, out) == (130, "")
    assert err == "llama-te-convert: interrupted; run the same command again to continue.\n"


def test_pickles_are_read_on_demand_only(tiny_llama, tmp_path: Path, capsys) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    status, _, err = run(capsys, "to-te", tmp_path / "hf", tmp_path / "te")
    assert status == 1
    assert "say --allow-pickle" in err
    assert run(capsys, "to-te", tmp_path / "hf", tmp_path / "te", "--allow-pickle")[0] == 0
    assert run(capsys, "verify", tmp_path / "hf", tmp_path / "te", "--allow-pickle")[0] == 0


def test_as_a_module_and_its_help() -> None:
    for arguments in (
        ["--help"],
        ["to-te", "--help"],
        ["to-hf", "--help"],
        ["verify", "--help"],
        ["inspect", "--help"],
    ):
        command = [sys.executable, "-m", "llama_te_convert", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: llama-te-convert")
        assert done.stderr == ""
