"""Compiled part of llama_te_infer; the sources are in csrc/."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    cxx_standard: int
    build_type: str
    cuda: str | None
    cuda_architectures: list[str]

def build_info() -> BuildInfo: ...
def cuda_problem() -> str | None: ...
