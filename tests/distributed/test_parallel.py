"""Training on a mesh of processes equals training in one: losses, gradients, clipping, weights after a step.

The tests start processes once for each number of processes (`parallel_cases`), and check the findings.
"""

import re
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.fake_transformer_engine import FakeTransformerEngine
from distributed import parallel_cases
from distributed.parallel_cases import CASES, Case
from distributed.processes import Processes
from llama_te_core import (
    ContextParallelDataLoaderWrapper,
    DataCollatorForContextParallel,
    NVLlamaConfig,
    NVLlamaForCausalLM,
)
from llama_te_core.layers.sequence_layout import PackedSequences, lay_out, token_places, whole_places
from llama_te_core.layers.te import TransformerEngineBackend
from llama_te_core.parallel.context import shard_context
from llama_te_core.parallel.context_batches import context_part
from llama_te_core.parallel.mesh import make_mesh
from llama_te_core.parallel.parallelize import parallelize
from llama_te_core.parallel.sizes import ParallelSizes

# Relative to the largest value of each tensor. Measured: 8e-15 and 2e-6, since sums are in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# AdamW divides by a gradient's size, which enlarges the rounding errors of small gradients: 7e-13 and 2e-4.
TOLERANCE_AFTER_STEP = {torch.float64: 1e-10, torch.float32: 1e-3}


@pytest.fixture(scope="module")
def processes(tmp_path_factory, device):
    return Processes(parallel_cases.run, device, tmp_path_factory.mktemp("processes"))


def with_world_size(case: Case) -> int:
    return case.replicate * case.shard * case.context * case.tensor


ALL = [case for cases in CASES.values() for case in cases]


def marked(cases):
    return [pytest.param(case, id=str(case), marks=pytest.mark.processes(with_world_size(case))) for case in cases]


@pytest.mark.parametrize("case", marked(ALL))
def test_a_mesh_trains_as_one_process_does(processes, case):
    for rank, findings in enumerate(processes.of(with_world_size(case))):
        assert str(case) in findings, findings.get("stopped by")
        found = findings[str(case)]
        assert found["missing gradients"] == []
        assert found["misplaced"] == []
        errors = {"loss": found["loss"], "norm": found["norm"]} | found["gradients"]
        too_large = {name: error for name, error in errors.items() if not error <= TOLERANCE[case.dtype]}
        assert too_large == {}, f"rank {rank}"


@pytest.mark.parametrize("case", marked(ALL))
def test_the_state_dict_of_a_mesh_is_that_of_one_process(processes, case):
    found = processes.of(with_world_size(case))[0][str(case)]  # only rank 0 has them
    assert found["missing weights"] == []
    tolerance = TOLERANCE_AFTER_STEP[case.dtype]
    assert {name: error for name, error in found["weights"].items() if not error <= tolerance} == {}


@pytest.mark.parametrize("case", marked([case for case in ALL if case.through_checkpoint]))
def test_a_checkpoint_fits_any_mesh_and_gives_everything_back(processes, case):
    every = [findings[str(case)] for findings in processes.of(with_world_size(case))]
    for found in every:
        assert found["checkpoint"] == []
        assert found["learning rate"] == 0
        assert found["checkpoint weights"].keys() == every[0]["weights"].keys()
        assert max(found["checkpoint weights"].values()) <= TOLERANCE_AFTER_STEP[case.dtype]


@pytest.mark.processes(2)
def test_computing_in_bfloat16_is_the_model_in_bfloat16(processes):
    # The same products in the same order; angles stay float32.
    assert [findings["bfloat16"] for findings in processes.of(2)] == [0.0, 0.0]


@pytest.mark.processes(2)
def test_fsdp_wraps_the_head_and_nothing_where_it_would_only_copy(processes):
    for findings in processes.of(2):
        assert findings["wrapped in FSDP"] == {
            "tensor": [],
            "tensor, float32 summed in bfloat16": [],  # tensor ranks share out no gradient
            "tensor, computed in bfloat16": [""],  # FSDP casts the weights
            "shard": ["", "lm_head"],
            "shard, tied": [""],  # the embedding's weight is the model's
        }


@pytest.mark.processes(2)
@pytest.mark.parametrize("format", ["thd", "bshd"])
def test_layers_that_get_a_context_group_from_outside_see_whole_sequences(processes, format):
    fields = ["input_ids", "labels", "shift_labels"]
    if format == "thd":
        ends = ["cu_seq_lens_k", "cu_seq_lens_k_padded", "cu_seq_lens_q", "cu_seq_lens_q_padded"]
        fields = [*ends, "input_ids", "labels", "max_length_k", "max_length_q", "pad_between_seqs", "shift_labels"]
    for rank, findings in enumerate(processes.of(2)):
        found = findings[f"context from outside, {format}"]
        assert found["fields"] == fields
        assert len(found["logits"]) == 2 and max(found["logits"]) <= TOLERANCE[torch.float64]
        assert len(found["loss"]) == 2 and max(found["loss"]) <= TOLERANCE[torch.float64]
        failed = "KeyError: 'no such field'"
        assert found["error"] == (
            failed if rank == 0 else f"RuntimeError: the loader in the first process of the group failed: {failed}"
        )


@pytest.mark.processes(2)
def test_tensor_ranks_share_the_tokens_between_the_layers(processes):
    for findings in processes.of(2):
        found = findings["between the layers"]
        whole, *seen = found["tokens"]
        assert seen == [whole // 2] * 2
        assert found["hidden states"] <= TOLERANCE[torch.float64]
        assert found["gradient"] <= TOLERANCE[torch.float64]


REFUSED = [
    (4, "width", "shard x context=2, which does not divide hidden_size=65"),
    (2, "processes", "replicate=1, shard=-1, context=1, tensor=4 need a multiple of 4 processes, but there are 2"),
    (2, "heads", "tensor=2, which does not divide num_key_value_heads=1"),
    (2, "features", "tensor=2, which does not divide intermediate_size=97"),
    (2, "tokens", "5 tokens in this forward pass, but layers on 2 tensor ranks take multiples of 2: pad to 6"),
]


@pytest.mark.parametrize(
    ("world_size", "name", "message"),
    [pytest.param(*each, marks=pytest.mark.processes(each[0])) for each in REFUSED],
)
def test_what_a_mesh_cannot_do_is_refused(processes, world_size, name, message):
    for findings in processes.of(world_size):
        assert re.match(message, findings["refusals"][name])


@pytest.mark.parametrize("sizes", [{"tensor": 0}, {"context": -1}, {"shard": 0}, {"replicate": 2.0}, {"tensor": True}])
def test_sizes_are_checked(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: it must be an integer of at least 1"):
        ParallelSizes(**sizes)


def test_sizes_fill_up_with_shards():
    assert ParallelSizes(replicate=2, tensor=4).resolve(24) == ParallelSizes(2, 3, 1, 4)
    with pytest.raises(ValueError, match="shard=2, context=3, tensor=1 need 6 processes, but there are 8"):
        ParallelSizes(shard=2, context=3).resolve(8)
    with pytest.raises(ValueError, match="need a multiple of 3 processes, but there are 2"):
        ParallelSizes(context=3).resolve(2)


def test_a_mesh_needs_a_process_group():
    with pytest.raises(RuntimeError, match="no process group: start the processes with torchrun"):
        make_mesh(ParallelSizes(), "cpu")


@given(chunk=st.integers(1, 7), ranks=st.integers(1, 6))
def test_the_parts_of_a_sequence_are_all_of_it_with_equal_work(chunk, ranks):
    places = [whole_places(torch.arange(2 * chunk), 2 * chunk, rank, ranks) for rank in range(ranks)]
    assert torch.cat(places).sort().values.tolist() == list(range(2 * chunk * ranks))
    assert len({int(place.sum()) for place in places}) == 1  # a token attends to as many keys as its place says
    assert all(bool((place.diff() > 0).all()) for place in places)


class Mesh:
    """A stand-in with the parts of a mesh that splitting a batch without labels needs."""

    device_type = "cpu"

    def __init__(self, context: int, rank: int = 0) -> None:
        self.context, self.rank = context, rank
        self.shape = (1, 1, context, 1)

    def __getitem__(self, dimension):
        return types.SimpleNamespace(size=lambda: self.context if dimension == "context" else 1)

    def get_local_rank(self, dimension):
        return self.rank


def test_packed_sequences_are_cut_each_by_itself():
    offsets = torch.tensor([0, 4, 12], dtype=torch.int32)
    batch = {"input_ids": torch.arange(12)[None], "cu_seq_lens_q": offsets, "max_length_q": 8}
    first, second = (shard_context(batch, Mesh(2, rank)) for rank in range(2))
    assert first["input_ids"].tolist() == [[0, 3, 4, 5, 10, 11]]
    assert second["input_ids"].tolist() == [[1, 2, 6, 7, 8, 9]]
    assert first["cu_seq_lens_q"] is second["cu_seq_lens_q"] is offsets  # layers expect the whole sequences
    assert first["max_length_q"] == 8


def test_padding_goes_behind_the_tokens_and_fields_stay_together():
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 0]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "weights": ids[..., None] * 10.0}
    parts = [shard_context(batch, Mesh(2, rank)) for rank in range(2)]
    assert [part["input_ids"].tolist() for part in parts] == [
        [[5, 6, 0, 0], [1, 2, 0, 0]],
        [[7, 0, 0, 0], [3, 4, 0, 0]],
    ]
    assert all(torch.equal(part["weights"][..., 0], part["input_ids"] * 10.0) for part in parts)
    assert all("attention_mask" not in part for part in parts)


def test_sequences_that_cannot_be_shared_out_equally_are_refused():
    batch = {"input_ids": torch.zeros(1, 10), "cu_seq_lens_q": torch.tensor([0, 4, 10], dtype=torch.int32)}
    with pytest.raises(
        ValueError, match=r"sequences of \[4, 6\] tokens.*context=2.*pad_sequences_to_be_divisible_by=4"
    ):
        shard_context(batch, Mesh(2))


@pytest.mark.parametrize(
    "arguments",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])},
    ],
    ids=["positions", "samples"],
)
def test_rows_of_several_sequences_are_refused(arguments):
    with pytest.raises(
        ValueError, match="several samples in a row.*Context ranks cut packed sequences by cu_seq_lens_q"
    ):
        shard_context({"input_ids": torch.zeros(1, 8), **arguments}, Mesh(2))
    counting = {"input_ids": torch.zeros(1, 8), "position_ids": torch.arange(8)[None]}
    assert shard_context(counting, Mesh(2)).keys() == {"input_ids"}


def test_a_split_model_takes_no_cache():
    config = NVLlamaConfig(**parallel_cases.TINY, layer_implementation="reference")
    attention = NVLlamaForCausalLM(config).model.layers[0].self_attention
    attention.context_mesh = Mesh(2)
    with pytest.raises(ValueError, match="past_key_values is given, but the model is split.*use_cache=False"):
        attention(
            torch.zeros(1, 2, config.hidden_size),
            rotary_pos_emb=None,
            inference_params=object(),
            cu_seqlens_q=None,
            cu_seqlens_q_padded=None,
            max_seqlen_q=None,
        )


def test_heads_that_cannot_be_exchanged_for_tokens_are_refused(monkeypatch):
    FakeTransformerEngine().install(monkeypatch)
    sizes = {**parallel_cases.TINY, "layer_implementation": "transformer_engine"}
    model = NVLlamaForCausalLM(NVLlamaConfig(**sizes))
    with pytest.raises(
        ValueError, match="context_kind='a2a' with context=4, which does not divide .*heads.*=2: choose"
    ):
        parallelize(model, Mesh(4), context_kind="a2a")


def test_a_transformer_engine_layer_is_told_its_group(monkeypatch):
    class Layer(torch.nn.Module):
        def set_context_parallel_group(self, *arguments):
            self.group = arguments

    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: [4, 6])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "stream")
    layer, another = Layer(), Layer()
    mesh = types.SimpleNamespace(size=lambda: 2, get_group=lambda: "group")
    TransformerEngineBackend().split_context([layer, another], mesh, "all_gather", 2)
    assert layer.group == another.group == ("group", [4, 6], "stream", "all_gather")


def test_layers_say_how_many_processes_share_their_sequences(monkeypatch):
    """The model's rotary angles reach to the end of the whole sequence, whoever gave the layers their group."""
    FakeTransformerEngine().install(monkeypatch)
    sizes = {**parallel_cases.TINY, "layer_implementation": "transformer_engine", "max_position_embeddings": 4096}
    model = NVLlamaForCausalLM(NVLlamaConfig(**sizes))
    assert model.model.context_ranks == 1
    model.model.layers[0].self_attention.cp_size = 2
    with pytest.raises(ValueError, match=r"layers have context groups of \[1, 2\] processes"):
        model(torch.ones(1, 4, dtype=torch.long))
    for layer in model.model.layers:
        layer.self_attention.cp_size = 2
    with pytest.raises(ValueError, match="attention_mask has padding on 2 context ranks"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 0, 0]]))
    with pytest.raises(ValueError, match="position_ids are given on 2 context ranks"):
        model(torch.ones(1, 4, dtype=torch.long), position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match="past_key_values is given, but the model is split"):
        lay_out(
            torch.ones(1, 4), attn_input_format="thd", self_attn_mask_type="causal", cache=object(), context_ranks=2
        )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4), st.integers(2, 4))
def test_the_parts_of_packed_sequences_describe_the_whole(sizes, ranks):
    """Sequences of a multiple of 2 * ranks places, with padding: every rank's layout is of the whole sequences."""
    slots = torch.tensor([0, *(2 * ranks * pieces for pieces, _ in sizes)])
    lengths = slots - torch.tensor([0, *(min(gap, 2 * ranks * pieces - 1) for pieces, gap in sizes)])
    offsets = slots.cumsum(0).to(torch.int32)
    tokens = int(offsets[-1])
    batch = {
        "input_ids": torch.arange(tokens)[None],
        "attention_mask": torch.ones(1, int(lengths.sum()), dtype=torch.long),
        "position_ids": torch.arange(tokens)[None],
        "cu_seq_lens_q": lengths.cumsum(0).to(torch.int32),
        "cu_seq_lens_q_padded": offsets,
        "pad_between_seqs": True,
    }
    parts = [context_part(batch, rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat([part["input_ids"][0] for part in parts]).tolist()) == list(range(tokens))
    for rank, part in enumerate(parts):
        assert part.keys() == batch.keys() - {"attention_mask", "position_ids"}
        ids_L = part.pop("input_ids")[0]
        row_L, place_L = token_places(offsets // ranks, len(ids_L))
        whole_L = whole_places(place_L, (slots[1:] // ranks)[row_L], rank, ranks)
        assert torch.equal(ids_L, offsets[row_L] + whole_L)
        layout = lay_out(
            ids_L[None],
            attn_input_format="thd",
            self_attn_mask_type="padding_causal",
            packed=PackedSequences.from_arguments(part),
            context_ranks=ranks,
        )
        assert torch.equal(layout.cu_seqlens, offsets) and torch.equal(layout.cu_seqlens_padded, offsets)
        assert layout.longest == layout.max_seqlen == int(slots.max())
        assert layout.pad_between_seqs is False


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 4), st.integers(1, 3))
def test_rows_of_a_rank_describe_the_whole(rows, width, ranks, pairs):
    batch = {"input_ids": torch.arange(rows * width).view(rows, width)}
    part_BL = context_part(batch, 0, ranks)["input_ids"]
    layout = lay_out(
        part_BL,
        attn_input_format="thd",
        self_attn_mask_type="padding_causal",
        token_multiple=2 * pairs,
        context_ranks=ranks,
    )
    assert layout.tokens % (2 * pairs) == 0
    lengths = layout.cu_seqlens.diff().tolist()
    whole = part_BL.shape[1] * ranks
    fill = (layout.tokens - part_BL.numel()) * ranks
    assert lengths == [whole] * rows + [fill] * (fill > 0)
    assert layout.longest == layout.max_seqlen == max(lengths)
    assert torch.equal(layout.cu_seqlens, layout.cu_seqlens_padded)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cp",), [0, 1]),
        (("dp", "cp", "tp"), [0, 0, 0, 1, 1, 1]),
        (("tp", "cp"), [0, 1, 0, 1, 0, 1]),
        (("replicate", "shard", "context", "tensor"), [0, 0, 0, 1, 1, 1]),
        (("dp",), [None]),
    ],
)
def test_every_process_of_a_mesh_gets_its_part(names, expected):
    sizes = [{"cp": 2, "context": 2, "tp": 3, "tensor": 3}.get(name, 5) for name in names]
    mesh = types.SimpleNamespace(mesh_dim_names=names, size=sizes.__getitem__)
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    batch["attention_mask"] = torch.ones(1, 8)
    parts = DataCollatorForContextParallel(lambda features: batch, mesh, "bshd")([])
    whole = {None: list(range(8)), 0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}
    assert [part["input_ids"][0].tolist() for part in parts] == [whole[rank] for rank in expected]
    assert all(part["labels"].tolist() == part["input_ids"].tolist() for part in parts)
    assert all("attention_mask" not in part for part in parts)


def test_the_collator_fills_rows_up_with_ignored_labels():
    mesh = types.SimpleNamespace(mesh_dim_names=("cp",), size=lambda dimension=0: 2)
    batch = {"input_ids": torch.arange(1, 7)[None], "labels": torch.arange(1, 7)[None]}
    for shifted, name in ((False, "labels"), (True, "shift_labels")):
        first, second = DataCollatorForContextParallel(lambda features: batch, mesh, "bshd", shifted)([])
        assert first["input_ids"].tolist() == [[1, 2, 0, 0]] and second["input_ids"].tolist() == [[3, 4, 5, 6]]
        assert first[name].tolist() == [[1 + shifted, 2 + shifted, -100, -100]]
        assert second[name].tolist() == [[4, 5, 6, -100] if shifted else [3, 4, 5, 6]]
        assert first["labels"] is None or not shifted


def test_what_the_collator_and_the_loader_refuse():
    mesh = types.SimpleNamespace(mesh_dim_names=("cp",), size=lambda dimension=0: 2)
    with pytest.raises(ValueError, match="qkv_format='thd', but the collator's batch has no cu_seq_lens_q"):
        DataCollatorForContextParallel(lambda features: {"input_ids": torch.ones(1, 8)}, mesh)([])
    with pytest.raises(ValueError, match="qkv_format='sbhd' must be"):
        DataCollatorForContextParallel(list, mesh, "sbhd")
    with pytest.raises(ValueError, match="has no names"):
        DataCollatorForContextParallel(list, types.SimpleNamespace(mesh_dim_names=None))
    for rank, loader, message in ((0, None, "missing in process 0"), (1, [], "given in process 1")):
        own = types.SimpleNamespace(get_local_rank=lambda rank=rank: rank)
        with pytest.raises(ValueError, match=message):
            ContextParallelDataLoaderWrapper(loader, own)


@pytest.mark.parametrize(("stateful", "rank"), [(True, 0), (False, 0), (False, 1)])
def test_the_first_process_keeps_the_loaders_state(stateful, rank):
    class Loader(list):
        num_workers = 3

    class StatefulLoader(Loader):
        def state_dict(self):
            return {"step": len(self)}

        def load_state_dict(self, state):
            self.append(state)

    mesh = types.SimpleNamespace(get_local_rank=lambda: rank, get_group=lambda: None, size=lambda: 2)
    inner = None if rank else (StatefulLoader if stateful else Loader)()
    loader = ContextParallelDataLoaderWrapper(inner, mesh)
    assert loader.num_workers == (0 if rank else 3)
    if rank:
        assert loader.state_dict() == {}
        loader.load_state_dict({})
    elif stateful:
        loader.load_state_dict({"dataloader": "state"})
        assert loader.state_dict() == {"dataloader": {"step": 1}} and inner == ["state"]
    else:
        with pytest.raises(TypeError, match="Loader, which has no state to save: use torchdata's StatefulDataLoader"):
            loader.state_dict()
