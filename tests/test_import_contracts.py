"""The import contracts in the root's pyproject.toml: the sources keep each of them, and each of them can be broken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["llama_te_core", "llama_te_convert", "llama_te_infer"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the three packages, in one folder."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        source = REPOSITORY / "packages" / name / "src" / name
        shutil.copytree(source, folder / name, ignore=lambda _, names: {each for each in names if each[-3:] == ".so"})
    return folder


def lint_imports(sources: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    command += ["--config", str(REPOSITORY / "pyproject.toml"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(sources), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)


def test_the_sources_keep_the_contracts(sources: Path) -> None:
    checked = lint_imports(sources)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Contracts: 4 kept, 0 broken." in checked.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("llama_te_core.data.labels", "import llama_te_convert.layout"),
        ("llama_te_convert.cli", "import llama_te_infer.ops"),
        ("llama_te_infer.ops", "import llama_te_convert.layout"),
        ("llama_te_core.layers", "import llama_te_core.models"),
        ("llama_te_infer.kv_cache", "import llama_te_infer.engine"),
        ("llama_te_infer.generate", "import llama_te_infer.engine"),
        ("llama_te_convert.layout", "import llama_te_convert.sources"),
        ("llama_te_core.layers", "if TYPE_CHECKING:\n    import llama_te_core.models"),
        ("llama_te_core.layers", "def later():\n    import llama_te_core.models"),
    ],
)
def test_a_forbidden_import_breaks_a_contract(sources: Path, module: str, statement: str) -> None:
    file = sources.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(f"{text}\n{statement}\n", encoding="utf-8")
        checked = lint_imports(sources)
    finally:
        file.write_text(text, encoding="utf-8")
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert f"{module} -> {statement.split()[-1]}" in " ".join(checked.stdout.split())


def test_a_new_folder_needs_a_layer(sources: Path) -> None:
    folder = sources / "llama_te_core" / "newcomer"
    folder.mkdir()
    try:
        (folder / "__init__.py").touch()
        checked = lint_imports(sources)
    finally:
        shutil.rmtree(folder)
    assert checked.returncode == 1
    assert "newcomer" in checked.stdout
