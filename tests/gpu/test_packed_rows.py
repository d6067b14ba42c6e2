"""Sequences that share rows, on Transformer Engine layers: kept apart, checked, and with no more waits than needed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu.small_llama import relative
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

NO_WORSE = 1.25  # than transformers in bfloat16
ROWS = ((96, 1, 31), (128,), (40, 60))
WIDTH = 128


def shared_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, slice]]]:
    """Return ids, samples' numbers and positions [B, S], and the place of each sequence."""
    ids_BS = torch.zeros(len(ROWS), WIDTH, dtype=torch.long)
    sample_BS, position_BS = torch.zeros_like(ids_BS), torch.zeros_like(ids_BS)
    generator = torch.Generator().manual_seed(5)
    places = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths, 1):
            place = (row, slice(start, start + length))
            ids_BS[place] = torch.randint(3, 8192, (length,), generator=generator)
            sample_BS[place], position_BS[place] = number, torch.arange(length)
            places.append(place)
            start += length
        position_BS[row, start:] = torch.arange(WIDTH - start)
    return ids_BS.cuda(), sample_BS.cuda(), position_BS.cuda(), places


def packed_row() -> tuple[torch.Tensor, dict[str, Any], list[tuple[int, slice]]]:
    """Return the same sequences as one row [1, T], its arguments, and their places."""
    ids_BS, _, _, places = shared_rows()
    lengths = torch.tensor([0, *(length for row in ROWS for length in row)])
    ends = lengths.cumsum(0)
    row_1T = torch.cat([ids_BS[place] for place in places])[None]
    offsets = ends.to(torch.int32).cuda()
    arguments = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 128, "max_length_k": 128}
    return row_1T, arguments, [(0, slice(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


@pytest.mark.parametrize("shown_by", ["positions", "positions beside ones", "samples", "mask beside cu_seq_lens"])
def test_each_sequence_is_computed_as_if_alone(shown_by, make_llama, measured, fused_attention):
    ids_BS, sample_BS, position_BS, places = shared_rows()
    arguments: dict[str, Any]
    if shown_by == "mask beside cu_seq_lens":
        sequences = [ids_BS[place] for place in places]
        ids_BS, arguments, places = packed_row()
        arguments["attention_mask"] = torch.ones_like(ids_BS)
    else:
        sequences = [ids_BS[place] for place in places]
        arguments = {
            "positions": {"position_ids": position_BS},
            "positions beside ones": {"position_ids": position_BS, "attention_mask": torch.ones_like(ids_BS)},
            "samples": {"attention_mask": sample_BS},
        }[shown_by]
    exact = make_llama()
    with torch.no_grad():
        expected = torch.cat([exact(ids_S[None]).logits[0] for ids_S in sequences])
        hf = exact.bfloat16()
        theirs = torch.cat([hf(ids_S[None]).logits[0] for ids_S in sequences])
        te = convert_llama_hf_to_te(hf)
        logits_BSV = te(ids_BS, **arguments).logits
    assert type(te.model.layers[0]).__module__.startswith("transformer_engine")
    ours = torch.cat([logits_BSV[place] for place in places])
    measured(
        "TE bf16 against float32, bound: transformers bf16",
        relative(ours, expected),
        NO_WORSE * relative(theirs, expected),
    )


def waits_in(forward: Callable[[], Any]) -> int:
    """Return how often the host waits for the device in a call. An earlier call has made tables and plans."""
    with torch.no_grad():
        forward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                forward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def test_arguments_cost_one_wait_a_forward_pass_or_none() -> None:
    with torch.device("cuda"):
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = NVLlamaForCausalLM(NVLlamaConfig(vocab_size=8192, num_hidden_layers=3, **sizes)).bfloat16().eval()
    ids_BS, sample_BS, position_BS, _ = shared_rows()
    row_1T, packed, _ = packed_row()
    positions_1T = torch.cat([torch.arange(length) for row in ROWS for length in row])[None].cuda()
    beside = {"attention_mask": torch.ones_like(row_1T), "position_ids": positions_1T}
    known = waits_in(lambda: model(row_1T, **packed))  # by TE, if at all
    assert waits_in(lambda: model(row_1T, **packed, **beside)) == known
    assert waits_in(lambda: model(ids_BS)) == known
    assert waits_in(lambda: model(ids_BS, position_ids=position_BS)) == known + 1
    assert waits_in(lambda: model(ids_BS, attention_mask=sample_BS)) == known + 1
    assert waits_in(lambda: model(ids_BS, attention_mask=(sample_BS > 0).long(), position_ids=position_BS)) == known + 1


def test_rows_of_one_sequence_with_a_cache_refuse_more() -> None:
    from llama_te_infer import inference_params_for

    with torch.device("cuda"):
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = NVLlamaForCausalLM(NVLlamaConfig(vocab_size=8192, num_hidden_layers=1, **sizes)).bfloat16().eval()
    ids_BS, sample_BS, position_BS, _ = shared_rows()
    for arguments in ({"attention_mask": sample_BS}, {"position_ids": position_BS}):
        cache = inference_params_for(model, batch_size=len(ROWS), max_length=2 * WIDTH)
        with torch.no_grad(), pytest.raises(ValueError, match="several samples in a row"):
            model(ids_BS, past_key_values=cache, **arguments)


WRONG = """
import torch
from llama_te_core.layers.sequence_layout import PackedSequences, lay_out

def lay(**arguments):
    shown = {"attn_input_format": "thd", "self_attn_mask_type": "padding_causal"}
    lay_out(torch.zeros(1, 5, dtype=torch.long, device="cuda"), **shown, **arguments)
    torch.cuda.synchronize()

offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device="cuda")
good = PackedSequences(offsets, max_length_q=3)
lay(packed=good, attention_mask=torch.ones(1, 5, device="cuda"))
print("taken", flush=True)
lay(%s)
print("taken as well", flush=True)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "packed=PackedSequences(offsets + 1, max_length_q=3)",
        "packed=PackedSequences(offsets, max_length_q=2)",
        "packed=PackedSequences(offsets, cu_seq_lens_k=offsets.flip(0), max_length_q=3)",
        "packed=good, attention_mask=torch.tensor([[1, 1, 0, 1, 1]], device='cuda')",
        "packed=good, position_ids=torch.tensor([[0, 1, 2, 3, 9]], device='cuda')",
    ],
    ids=["offsets", "longest", "keys", "mask", "positions"],
)
def test_the_device_stops_before_attention_gets_wrong_sequences(arguments: str) -> None:
    """In another process, since a failed assertion on the device ends the use of it."""
    command = [sys.executable, "-c", WRONG % arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "taken\n", done.stderr
    assert "device-side assert" in done.stderr


def test_without_the_longest_length_wrong_sequences_are_an_error_of_the_call() -> None:
    """The call waits for the device in any case, so that it can check on the host."""
    with torch.device("cuda"):
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = NVLlamaForCausalLM(NVLlamaConfig(vocab_size=8192, num_hidden_layers=1, **sizes)).bfloat16().eval()
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 6, but there are 5 tokens"):
        model(torch.ones(1, 5, dtype=torch.long, device="cuda"), cu_seq_lens_q=offsets)
    with pytest.raises(ValueError, match="position_ids do not go up by one"):
        model(
            torch.ones(2, 5, dtype=torch.long, device="cuda"),
            position_ids=torch.tensor([[0, 1, 2, 4, 5]], device="cuda"),
        )
