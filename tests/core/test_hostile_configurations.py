"""Damaged and hostile configurations of training: refused in one line, soon, and without running what they name."""

from __future__ import annotations

import dataclasses
import os
import random
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzzing import damaged, fuzz
from llama_te_core.train.checkpoint.run_folder import check_same_run
from llama_te_core.train.command import presets, read_config
from llama_te_core.train.config import TrainConfig
from llama_te_core.train.config.yaml_file import MAX_BYTES, read_yaml

WHOLE = """
data: {source: texts, tokenizer: bytes, tokens_per_batch: 64}
model:
  shape: {vocab_size: 258, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, head_dim: 16}
activation_checkpointing: none
"""
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def refusal(file: Path, content: str | bytes, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit) as ended:
        read_config(["--config", str(file), *more])
    assert ended.value.code == 2
    _, _, error = capsys.readouterr().err.strip().partition("error: ")
    assert 0 < len(error) < 1000
    return error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb", BOMB + WHOLE, "line 1 has an anchor or an alias"),
        ("alias", WHOLE + "folder: *x\n", "line 7 has an anchor or an alias"),
        ("merge", "base: &base {steps: 1}\n<<: *base\n" + WHOLE, "line 1 has an anchor or an alias"),
        ("lists", "data: " + "[" * 10**5, "is refused: "),
        ("mappings", "data: " + "{a: " * 10**5, "has more than 16 levels"),
        (
            "function",
            "data: !!python/object/apply:os.system ['touch ran']\n",
            "line 1 has the tag 'tag:yaml.org,2002:",
        ),
        ("name", "data: !!python/name:os.system\n", "line 1 has the tag"),
        ("key", WHOLE + "steps: 3\nsteps: 4\n", "line 8 has the key 'steps' a second time"),
        ("nested key", WHOLE + "log: {interval: 3, interval: 4}\n", "line 7 has the key 'interval' a second time"),
        ("digits", WHOLE + "steps: 1" + "0" * 5000, "Exceeds the limit (4300 digits)"),
        ("large", WHOLE + "steps: 1" + "0" * 50, f"steps=1{'0' * 50}: it must be at most {2**63 - 1}"),
        ("hexadecimal", WHOLE + "steps: 0x" + "f" * 10**5, "steps=an integer of 400000 bits: it must be at most"),
        ("seed", WHOLE + f"seed: {2**32}\n", f"seed={2**32}: it must be at most {2**32 - 1}"),
        ("not a number", WHOLE.replace("head_dim: 16", "rms_norm_eps: .nan"), "model.shape.rms_norm_eps=nan"),
        (
            "infinite",
            WHOLE.replace("head_dim: 16", "rope_parameters: {rope_theta: .inf}"),
            "rope_parameters.rope_theta",
        ),
        ("UTF-16", WHOLE.encode("utf-16"), "is not UTF-8"),
        ("nothing", b"\0" * 100, "is refused: "),
        ("size", b"#" * (MAX_BYTES + 1), "cannot be read: it has 1,048,577 bytes, but at most 1,048,576 are read"),
        ("empty", "", "Unexpected config"),
        ("list", "[1]", "Unexpected config"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.replace(" ", "").isalnum() else "",
)
def test_configurations_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refusal(tmp_path / "a.yaml", content, capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    make: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "device": lambda: file.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(SystemExit):
        read_config(["--config", str(file)])
    assert f"error: --config {file} cannot be read: " in capsys.readouterr().err


def test_an_earlier_runs_configuration_is_read_within_the_same_limits(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text(BOMB)
    with pytest.raises(ValueError, match=r"config\.yaml is refused: line 1 has an anchor or an alias"):
        check_same_run(tmp_path, {"steps": 1})


def numbers(section: type, prefix: str = "") -> list[tuple[str, bool]]:
    """The options of a section that are numbers, and whether they are integers."""
    found: list[tuple[str, bool]] = []
    for name, kind in typing.get_type_hints(section).items():
        kinds = [kind, *typing.get_args(kind)]
        sections = [each for each in kinds if dataclasses.is_dataclass(each)]
        if sections:
            found += numbers(typing.cast(type, sections[0]), f"{prefix}{name}.")
        elif int in kinds or float in kinds:
            found.append((prefix + name, int in kinds))
    return found


@pytest.mark.parametrize(("option", "is_integer"), numbers(TrainConfig))
def test_every_number_is_in_its_range(
    tmp_path: Path, option: str, is_integer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [".nan", "-.inf", "true", "'a'", "[1]"]
    if option != "parallel.shard":  # -1 is the rest of the processes
        values.append("-1")
    if is_integer:
        values += ["1.5", "1e400"]
    if is_integer and not option.startswith("parallel."):  # the number of processes is their limit
        values.append(str(2**63))
    for value in values:
        error = refusal(tmp_path / "a.yaml", WHOLE, capsys, f"--{option}={value}")
        assert option.rpartition(".")[2] in error, value


@pytest.mark.fuzz
def test_damaged_configurations(tmp_path: Path, counts: Callable[[str], None]) -> None:
    file = tmp_path / "a.yaml"
    seeds = [WHOLE.encode(), *(Path(preset).read_bytes() for preset in presets().values())]
    pieces = [
        b"&a ",
        b"*a",
        b"!!python/name:os.system ",
        b"<<: ",
        b"? ",
        b"[",
        b"{",
        b"- ",
        b"| ",
        b"%TAG ! x\n",
        b": ",
    ]

    def damage(seed: bytes, source: random.Random) -> bytes:
        place = source.randrange(len(seed))
        piece = source.choice(pieces) * source.choice((1, 1, 5, 100))
        return damaged(seed, source) if source.random() < 0.5 else seed[:place] + piece + seed[place:]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_yaml(file)

    result = fuzz(read, seeds, tmp_path, refusals=(ValueError,), cases=3000, seconds=2, megabytes=64, damage=damage)
    counts(f"YAML: {result}")
