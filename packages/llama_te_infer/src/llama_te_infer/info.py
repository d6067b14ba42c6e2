"""Reports the installed versions and the features that work here: `python -m llama_te_infer.info [--json]`.

The output answers the first questions of any bug report: the versions, the GPUs, whether Transformer Engine works, the
layers that a model uses, and the build of the compiled extension.
"""

import argparse
import json
import platform
from importlib import metadata
from typing import Any

DISTRIBUTIONS = ("llama-te-core", "llama-te-convert", "llama-te-infer", "torch", "transformers", "transformer-engine")


def installed_versions() -> dict[str, str | None]:
    """Return the version of Python and of each distribution; None for a missing distribution."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def gpus() -> list[dict[str, str]]:
    """Return the name and compute capability of each CUDA GPU that torch sees."""
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}"} for gpu in properties]


def layers() -> dict[str, str | None]:
    """Return the layer implementation that "auto" chooses, and the reason if Transformer Engine cannot run."""
    from llama_te_core.layers import transformer_engine_problem

    problem = transformer_engine_problem()
    return {"auto": "reference" if problem else "transformer_engine", "transformer_engine_problem": problem}


def extension() -> dict[str, Any]:
    """Return the build of the compiled extension, and the reason if its CUDA code cannot run here."""
    try:
        from . import _extension
    except ImportError as error:
        return {"problem": f"the extension does not import: {error}"}
    return {**_extension.build_info(), "problem": _extension.cuda_problem()}


def collect() -> dict[str, Any]:
    """Return everything this module reports, as JSON types."""
    return {"versions": installed_versions(), "gpus": gpus(), "layers": layers(), "extension": extension()}


def as_text(report: dict[str, Any]) -> str:
    """Format the report of `collect` as text."""
    rows = [(name, version or "not installed") for name, version in report["versions"].items()]
    found = [f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in report["gpus"]]
    rows += [("GPU", gpu) for gpu in found or ["none that torch sees"]]
    reason = report["layers"]["transformer_engine_problem"]
    rows.append(('layers "auto"', report["layers"]["auto"] + (f": {reason}" if reason else "")))
    built = report["extension"]
    if "compiler" in built:
        cuda = f"CUDA {built['cuda']} for {', '.join(built['cuda_architectures'])}" if built["cuda"] else "no CUDA"
        rows.append(("extension", f"{built['compiler']}, C++{built['cxx_standard']}, {built['build_type']}, {cuda}"))
    rows.append(("extension's kernels", f"do not run: {built['problem']}" if built["problem"] else "run on this GPU"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def main() -> None:
    """Print the report."""
    description = "Report the installed versions and the features that work here."
    parser = argparse.ArgumentParser(prog="python -m llama_te_infer.info", description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))


if __name__ == "__main__":
    main()
