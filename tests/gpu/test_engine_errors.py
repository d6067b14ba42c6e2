"""Errors of a GPU in a step: the engine recovers from a lack of memory, and ends when the GPU is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

# In a process of its own, since a failed assertion on the device leaves the process without its GPU.
PROGRAM = """
import asyncio, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import AsyncEngine, Engine, SamplingParams
from llama_te_infer.engine.client import EngineFailedError
from llama_te_infer.runner.model_runner import ModelRunner

config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
model = convert_llama_hf_to_te(LlamaForCausalLM(config).bfloat16().cuda().eval())
launch, steps = ModelRunner.launch, 0

def no_memory():
    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

def lose_gpu():
    torch.zeros(8, device="cuda")[torch.tensor([1 << 40], device="cuda")]
    torch.cuda.synchronize()

def launch_or_fail(*arguments):
    global steps
    steps += 1
    if steps > 5:
        fail()
    return launch(*arguments)

async def main():
    global fail, steps
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    async with AsyncEngine(Engine(model, max_batch_size=8, total_num_pages=64)) as engine:
        expected = (await engine.generate([1, 2, 3], SamplingParams(max_tokens=20, temperature=0))).outputs
        for fail in (no_memory, lose_gpu):
            ModelRunner.launch, steps = launch_or_fail, 0
            stream = await engine.stream([1, 2, 3], long)
            try:
                await stream.finish()
            except EngineFailedError as error:
                print(fail.__name__, type(error.__cause__).__name__)
            ModelRunner.launch = launch
            if fail is no_memory:
                again = await engine.generate([1, 2, 3], SamplingParams(max_tokens=20, temperature=0))
                assert again.outputs == expected and engine.failure is None and engine.is_alive
        while engine.is_alive:
            await asyncio.sleep(0.01)
        try:
            await engine.stream([1, 2, 3], long)
        except EngineFailedError as error:
            print("refused")

asyncio.run(main())
sys.stdout.flush()
"""


def test_a_lack_of_memory_passes_and_a_lost_gpu_ends_the_engine() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    lines = done.stdout.split("\n")
    assert lines[0] == "no_memory OutOfMemoryError", done.stderr
    assert lines[1].startswith("lose_gpu ") and lines[2] == "refused", done.stderr
