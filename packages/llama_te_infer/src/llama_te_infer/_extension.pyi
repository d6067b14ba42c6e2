"""Compiled part of llama_te_infer; the sources are in csrc/.

The functions of the operators take the arguments of `torch.ops.llama_te`. They check every argument, whatever it is:
TypeError for a value that is no dense tensor or no number, ValueError for one that does not fit. So no call leaves the
memory of its tensors, as long as no other thread shrinks, frees or replaces that memory during the call.

- `*_cpu` runs on the CPU. `*_cpu_check` checks what PyTorch then computes. `decode_attention_append_cpu` rotates and
  appends.
- `*_check` checks what `*_cuda` checks, on any device, and the values of row numbers, lengths and pages, which must be
  in host memory.
- `*_cuda` launches a kernel on the current stream. A build without CUDA has no such functions, nor `linear_partials`
  and `linear_semaphores`; `ops.library.cuda_function` raises then.
"""

from typing import Any, TypedDict

from torch import Tensor

_Product = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, Tensor | None, bool]

class BuildInfo(TypedDict):
    compiler: str
    cxx_standard: int
    build_type: str
    cuda: str | None
    cuda_architectures: list[str]

def build_info() -> BuildInfo: ...
def cuda_problem() -> str | None: ...
def limits() -> dict[str, Any]: ...
def decode_attention_workspace(rows: int, kv_heads: int, group: int, head_dim: int, capacity: int) -> int: ...
def linear_partials(device: int) -> int: ...
def linear_semaphores(device: int) -> int: ...
def append_rope_cpu(
    qkv: Tensor,
    cos_sin: Tensor,
    cu_new: Tensor,
    start: Tensor,
    page_table: Tensor | None,
    width: int,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None: ...
def append_rope_check(
    qkv: Tensor,
    cos_sin: Tensor,
    cu_new: Tensor,
    start: Tensor,
    page_table: Tensor | None,
    width: int,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None: ...
def append_rope_cuda(
    qkv: Tensor,
    cos_sin: Tensor,
    cu_new: Tensor,
    start: Tensor,
    page_table: Tensor | None,
    width: int,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None: ...
def widen_pages_cpu(source: Tensor, scale: Tensor, page_table_BP: Tensor, length_B: Tensor, target: Tensor) -> None: ...
def widen_pages_check(
    source: Tensor, scale: Tensor, page_table_BP: Tensor, length_B: Tensor, target: Tensor
) -> None: ...
def widen_pages_cuda(
    source: Tensor, scale: Tensor, page_table_BP: Tensor, length_B: Tensor, target: Tensor
) -> None: ...
def reorder_rows_cpu(caches: list[Tensor], source_rows: Tensor, lengths: Tensor) -> None: ...
def reorder_rows_check(caches: list[Tensor], source_rows: Tensor, lengths: Tensor) -> None: ...
def reorder_rows_cuda(caches: list[Tensor], source_rows: Tensor, lengths: Tensor) -> None: ...
def reorder_pages_cpu(
    caches: list[Tensor], page_table: Tensor, source_rows: Tensor, lengths: Tensor, page_size: int, ticket: Tensor
) -> None: ...
def reorder_pages_check(
    caches: list[Tensor], page_table: Tensor, source_rows: Tensor, lengths: Tensor, page_size: int, ticket: Tensor
) -> None: ...
def reorder_pages_cuda(
    caches: list[Tensor], page_table: Tensor, source_rows: Tensor, lengths: Tensor, page_size: int, ticket: Tensor
) -> None: ...
def decode_attention_append_cpu(
    qkv: Tensor,
    cos_sin: Tensor,
    start: Tensor,
    page_table: Tensor | None,
    scale: float,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    workspace: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None: ...
def decode_attention_check(
    qkv: Tensor,
    cos_sin: Tensor,
    start: Tensor,
    page_table: Tensor | None,
    scale: float,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    workspace: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None: ...
def decode_attention_cuda(
    qkv: Tensor,
    cos_sin: Tensor,
    start: Tensor,
    page_table: Tensor | None,
    scale: float,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    workspace: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None: ...
def linear_cpu_check(products: list[_Product], partials: Tensor, semaphores: Tensor) -> None: ...
def linear_check(products: list[_Product], partials: Tensor, semaphores: Tensor) -> None: ...
def linear_cuda(products: list[_Product], partials: Tensor, semaphores: Tensor) -> None: ...
def embed_cpu_check(tokens: Tensor, table: Tensor, output: Tensor) -> None: ...
def embed_check(tokens: Tensor, table: Tensor, output: Tensor) -> None: ...
def embed_cuda(tokens: Tensor, table: Tensor, output: Tensor) -> None: ...
def quantize_rows_cpu_check(input: Tensor, factor: Tensor | None, output: Tensor, scale: Tensor) -> None: ...
def quantize_rows_check(input: Tensor, factor: Tensor | None, output: Tensor, scale: Tensor) -> None: ...
def quantize_rows_cuda(input: Tensor, factor: Tensor | None, output: Tensor, scale: Tensor) -> None: ...
def rms_norm_cpu_check(
    hidden: Tensor,
    weight: Tensor,
    epsilon: float,
    addend: Tensor | None,
    addend_scale: Tensor | None,
    factor: Tensor | None,
    output: Tensor,
    scale: Tensor | None,
) -> None: ...
def rms_norm_check(
    hidden: Tensor,
    weight: Tensor,
    epsilon: float,
    addend: Tensor | None,
    addend_scale: Tensor | None,
    factor: Tensor | None,
    output: Tensor,
    scale: Tensor | None,
) -> None: ...
def rms_norm_cuda(
    hidden: Tensor,
    weight: Tensor,
    epsilon: float,
    addend: Tensor | None,
    addend_scale: Tensor | None,
    factor: Tensor | None,
    output: Tensor,
    scale: Tensor | None,
) -> None: ...
def swiglu_cpu_check(
    input: Tensor, input_scale: Tensor | None, factor: Tensor | None, output: Tensor, scale: Tensor | None
) -> None: ...
def swiglu_check(
    input: Tensor, input_scale: Tensor | None, factor: Tensor | None, output: Tensor, scale: Tensor | None
) -> None: ...
def swiglu_cuda(
    input: Tensor, input_scale: Tensor | None, factor: Tensor | None, output: Tensor, scale: Tensor | None
) -> None: ...
def greedy_cpu_check(logits: Tensor, tokens: Tensor, lengths: Tensor | None, best: Tensor, tickets: Tensor) -> None: ...
def greedy_check(logits: Tensor, tokens: Tensor, lengths: Tensor | None, best: Tensor, tickets: Tensor) -> None: ...
def greedy_cuda(logits: Tensor, tokens: Tensor, lengths: Tensor | None, best: Tensor, tickets: Tensor) -> None: ...
def draw_cpu(
    logits: Tensor,
    numbers: Tensor,
    integers: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    ending: Tensor | None,
    counts: Tensor | None,
    mask_index: Tensor | None,
    masks: Tensor | None,
    tokens: Tensor,
) -> None: ...
def draw_check(
    logits: Tensor,
    numbers: Tensor,
    integers: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    ending: Tensor | None,
    counts: Tensor | None,
    mask_index: Tensor | None,
    masks: Tensor | None,
    tokens: Tensor,
) -> None: ...
def draw_cuda(
    logits: Tensor,
    numbers: Tensor,
    integers: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    ending: Tensor | None,
    counts: Tensor | None,
    mask_index: Tensor | None,
    masks: Tensor | None,
    tokens: Tensor,
) -> None: ...
def logprobs_cpu(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, top_logprobs: Tensor, top_tokens: Tensor
) -> None: ...
def logprobs_check(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, top_logprobs: Tensor, top_tokens: Tensor
) -> None: ...
def logprobs_cuda(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, top_logprobs: Tensor, top_tokens: Tensor
) -> None: ...
