"""What the installed distributions promise: versions, licence, dependencies and types."""

import json
import re
import subprocess
import sys
from importlib import import_module, metadata
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llama_te_infer import info

REPOSITORY = Path(__file__).parents[1]
DISTRIBUTIONS = ["llama-te-core", "llama-te-convert", "llama-te-infer"]


def dependencies(distribution: str, extra: str = "") -> list[Requirement]:
    """Return the plain dependencies, or those that only an extra brings."""
    every = [Requirement(line) for line in metadata.requires(distribution) or []]
    plain = [each for each in every if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [each for each in every if each not in plain and each.marker.evaluate({"extra": extra})] if extra else plain


def names(requirements: list[Requirement]) -> set[str]:
    return {requirement.name for requirement in requirements}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_changelog_has_the_version(distribution: str) -> None:
    package = distribution.replace("-", "_")
    version = metadata.version(distribution)
    changelog = (REPOSITORY / "packages" / package / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == version
    assert import_module(package).__version__ == version


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_wheel_carries_licence_and_types(distribution: str) -> None:
    assert metadata.metadata(distribution)["License-Expression"] == "Apache-2.0"
    licence = metadata.distribution(distribution).read_text("licenses/LICENSE")
    assert licence == (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert files(distribution.replace("-", "_")).joinpath("py.typed").is_file()


def test_dependencies_point_one_way() -> None:
    assert names(dependencies("llama-te-core")) == {"torch", "transformers", "accelerate", "xxhash"}
    assert names(dependencies("llama-te-convert")) == {"llama-te-core", "huggingface-hub", "numpy", "tqdm"}
    assert names(dependencies("llama-te-infer")) == {"llama-te-core", "tqdm"}


@pytest.mark.parametrize("distribution", ["llama-te-convert", "llama-te-infer"])
def test_the_released_core_is_one_that_its_dependents_take(distribution: str) -> None:
    (core,) = (each for each in dependencies(distribution) if each.name == "llama-te-core")
    assert core.specifier.contains(metadata.version("llama-te-core"))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_metadata_describes_the_package(distribution: str) -> None:
    fields = metadata.metadata(distribution)
    assert all(fields[name] for name in ("Summary", "Keywords", "Requires-Python"))
    assert fields["Author"] or fields["Author-email"]
    assert fields["Description-Content-Type"] == "text/markdown"
    readme = REPOSITORY / "packages" / distribution.replace("-", "_") / "README.md"
    assert fields.get_payload().strip() == readme.read_text(encoding="utf-8").strip()
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(fields.get_all("Classifier"))


@pytest.mark.parametrize(
    "statement",
    [
        "import llama_te_core",
        "import llama_te_convert",
        "import llama_te_infer",
        "from llama_te_core.train.command import main; main(['--help'])",
        "from llama_te_convert.cli import main; main(['--help'])",
    ],
)
def test_imports_and_help_do_not_wait_for_torch(statement: str) -> None:
    slow = {"torch", "transformers", "transformer_engine", "triton"}
    report = f"import atexit, sys; atexit.register(lambda: print('imported', sorted({slow} & sys.modules.keys())))"
    run = subprocess.run([sys.executable, "-c", f"{report}; {statement}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "imported []"


def test_the_command_is_installed() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="llama-te-convert")
    assert command.load() is import_module("llama_te_convert.cli").main
    assert names(dependencies("llama-te-convert", extra="gguf")) == {"gguf"}


@pytest.mark.parametrize("cuda", ["cu12", "cu13"])
def test_transformer_engine_comes_by_an_extra_that_names_its_cuda(cuda: str) -> None:
    (engine,) = dependencies("llama-te-core", extra=cuda)
    assert engine.name == "transformer-engine"
    assert {extra.replace("-", "_") for extra in engine.extras} == {"pytorch", f"core_{cuda}"}
    for distribution in ["llama-te-convert", "llama-te-infer"]:
        (core,) = dependencies(distribution, extra=cuda)
        assert (core.name, core.extras) == ("llama-te-core", {cuda})


def test_what_training_needs_comes_by_an_extra() -> None:
    needed = {"datasets", "jsonargparse", "tensorboard", "torchdata"}
    assert names(dependencies("llama-te-core", extra="train")) == needed


def test_peft_comes_by_an_extra() -> None:
    assert names(dependencies("llama-te-core", extra="lora")) == {"peft"}


def test_the_training_command_is_installed_with_its_presets() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="llama-te-train")
    assert command.load() is import_module("llama_te_core.train.command").main
    presets = files("llama_te_core.train") / "presets"
    assert {"tiny.yaml", "llama-3.1-8b.yaml"} <= {file.name for file in presets.iterdir()}


def test_the_report_is_json_or_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["info", "--json"])
    info.main()
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["llama-te-infer"] == metadata.version("llama-te-infer")
    assert report["extension"]["cxx_standard"] >= 17

    monkeypatch.setattr("sys.argv", ["info"])
    info.main()
    text = capsys.readouterr().out
    assert re.search(r'^layers "auto" +(reference: .+|transformer_engine)$', text, re.MULTILINE)
    assert report["extension"]["compiler"] in text


def test_the_report_says_why_the_extension_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_te_infer._extension", None)
    monkeypatch.delattr("llama_te_infer._extension", raising=False)
    report = info.collect()
    assert report["extension"]["problem"].startswith("the extension does not import: ")
    assert "do not run: the extension does not import: " in info.as_text(report)
