"""The key/value cache against a naive one: a list of tokens for each sequence."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.layers.kv_cache import KVCache
from llama_te_infer import InferenceParams, PagedKVCacheManager
from llama_te_infer.kv_cache.engine_cache import EngineCache
from llama_te_infer.ops import library

LAYERS = (1, 2)
ROWS, LENGTH, PAGE = 4, 12, 4
HEADS, DIM_K, DIM_V = 2, 4, 4
SETTINGS = settings(
    max_examples=100,
    stateful_step_count=14,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
COUNT = st.integers(0, 4)


def make_cache(*, is_paged: bool = False, **changes: Any) -> InferenceParams:
    arguments: dict[str, Any] = {
        "max_batch_size": ROWS,
        "max_sequence_length": LENGTH,
        "num_heads_kv": HEADS,
        "head_dim_k": DIM_K,
        "head_dim_v": DIM_V,
        "dtype": torch.float32,
        "device": "cpu",
    }
    if is_paged:
        arguments |= {"page_size": PAGE, "total_num_pages": ROWS * LENGTH // PAGE}
    return InferenceParams(**{**arguments, "is_paged": is_paged, **changes})


def vectors(tokens: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [T, K, D] and values of tokens: every element encodes its token, layer, head and position."""
    base_T11 = torch.tensor(tokens, dtype=torch.float32).reshape(-1, 1, 1) * 64 + layer * 32
    place_KD = torch.arange(HEADS)[:, None] * 8
    return base_T11 + place_KD + torch.arange(DIM_K), -(base_T11 + place_KD + torch.arange(DIM_V))


def write(cache: InferenceParams, layer: int, rows: list[list[int]], qkv_format: str, width: int, *, te: bool) -> Any:
    """Store the new tokens of each row as a layer does: packed, or tokens first in rows of `width` columns."""
    if qkv_format == "thd":
        new_k, new_v = vectors([token for row in rows for token in row], layer)
    else:
        filled = [row + [-1] * (width - len(row)) for row in rows]
        new_k, new_v = (x.unflatten(0, (len(rows), width)) for x in vectors([t for row in filled for t in row], layer))
    if te:
        return cache.step(layer, new_k, new_v, qkv_format)
    query = -7 * new_k
    qkv = torch.stack((query, 2 * query, new_k, new_v), dim=-2)
    # Angles of 0 rotate nothing, so the stored values are exact; test_generate.py has real angles.
    rotated = cache.append_rope(layer, qkv, torch.zeros(LENGTH + 8, 1, 1, DIM_K), qkv_format)
    assert torch.equal(rotated, torch.stack((query, 2 * query), dim=-2).flatten(-3, -2))
    return cache.keys_and_values(layer)


def check_rows(keys: torch.Tensor, values: torch.Tensor, layer: int, rows: list[list[int]]) -> None:
    for row, tokens in enumerate(rows):
        key_LKD, value_LKD = vectors(tokens, layer)
        assert torch.equal(keys[row, : len(tokens)], key_LKD), (layer, row, tokens)
        assert torch.equal(values[row, : len(tokens)], value_LKD), (layer, row, tokens)


def check_pages(manager: PagedKVCacheManager) -> None:
    holders = Counter(page for row in manager.pages for page in row)
    assert manager.pool.holders == [holders[page] for page in range(manager.total_num_pages)]
    assert sorted(manager.pool.free) == sorted(set(range(manager.total_num_pages)) - set(holders))
    assert manager.used_pages == len(holders)
    for row, pages in enumerate(manager.pages):
        assert manager.page_table[row, : len(pages)].tolist() == pages


def sums(lengths: list[int]) -> list[int]:
    return [sum(lengths[:end]) for end in range(len(lengths) + 1)]


def snapshot(cache: InferenceParams) -> dict[str, Any]:
    """Everything a step could change, in a form that compares with ==."""
    manager = cache.cache_manager
    state: dict[str, Any] = {
        "sequences": list(cache.sequences.items()),
        "before": list(cache.sequences_pre_step.items()),
        "batch_size": cache.batch_size,
        "lengths": cache._lengths.tolist(),
        "columns": cache.get_seq_length(),
        "tokens": None if cache._token_BC is None else cache._token_BC.tolist(),
        "memory": {layer: [tensor.tolist() for tensor in pair] for layer, pair in manager.cache.items()},
    }
    if isinstance(manager, PagedKVCacheManager):
        state["pages"] = [list(row) for row in manager.pages]
        state["free"] = sorted(manager.pool.free)
        state["holders"] = list(manager.pool.holders)
        state["table"] = manager.page_table.tolist()
    return state


class Machine(RuleBasedStateMachine):
    """The common part of both machines below: a cache, and the tokens that each row should hold."""

    is_paged = False

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(is_paged=self.is_paged)
        self.rows: list[list[int]] = []
        self.next_token = 0

    def fresh(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def write_step(self, new: list[list[int]], qkv_format: str, width: int) -> None:
        """Store a step's tokens, which `self.rows` has already, in every layer; check the results."""
        cache, rows = self.cache, self.rows
        lengths = [len(row) for row in rows]
        before = [len(row) - len(added) for row, added in zip(rows, new, strict=True)]
        assert cache.longest() == max(lengths, default=0)
        assert cache.get_seqlens_pre_step().tolist() == before + [0] * (ROWS - len(rows))
        assert cache.get_seqlens_pre_step().dtype == torch.int32
        keys, values = write(cache, LAYERS[0], new, qkv_format, width, te=False)
        assert keys.shape[1] >= cache.longest()
        check_rows(keys, values, LAYERS[0], rows)

        if LAYERS[1] not in cache.cache_manager.cache:
            cache.allocate_memory(LAYERS[1])
        result = write(cache, LAYERS[1], new, qkv_format, width, te=True)
        keys, values, cu_seqlens_q, cu_seqlens_kv, max_seqlen_kv, qkv_formats = result
        assert qkv_formats == {"bshd": "bshd", "thd": "thd_2bshd"}[qkv_format]
        assert max_seqlen_kv == LENGTH
        assert (cu_seqlens_q.dtype, cu_seqlens_kv.dtype) == (torch.int32, torch.int32)
        assert cu_seqlens_q.tolist() == sums([len(added) for added in new])
        assert cu_seqlens_kv.tolist() == sums(lengths)
        # Behind the batch the sums stay constant: TE reads them for all `max_batch_size` rows.
        assert cache.cu_seqlens_kv.tolist() == sums(lengths) + [sum(lengths)] * (ROWS - len(rows))
        if self.is_paged:
            assert keys.shape == (ROWS * LENGTH // PAGE, PAGE, HEADS, DIM_K)
            assert values.shape == (ROWS * LENGTH // PAGE, PAGE, HEADS, DIM_V)
            table_BP = self.cache.cache_manager.page_table[: len(rows)].long()
            keys, values = keys[table_BP].flatten(1, 2), values[table_BP].flatten(1, 2)
            for paged, row_wise in zip((keys, values), cache.convert_paged_to_nonpaged(LAYERS[1]), strict=True):
                assert torch.equal(paged, row_wise)
        assert keys.shape == (len(rows), LENGTH, HEADS, DIM_K)
        assert values.shape == (len(rows), LENGTH, HEADS, DIM_V)
        check_rows(keys, values, LAYERS[1], rows)

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(order))
        self.rows = [list(self.rows[source]) for source in order]

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.rows = []

    @invariant()
    def every_row_holds_its_tokens(self) -> None:
        assert list(self.cache.sequences.values()) == [len(row) for row in self.rows]
        assert self.cache.longest() == max(map(len, self.rows), default=0)
        manager = self.cache.cache_manager
        for layer in manager.cache:
            check_rows(*manager.rows(layer, len(self.rows), LENGTH), layer, self.rows)
        if isinstance(manager, PagedKVCacheManager):
            check_pages(manager)


class SequenceMachine(Machine):
    """Transformer Engine's own way: `pre_step` names the sequences, which come and go and change rows."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []
        self.next_id = 0

    @rule(
        seed=st.integers(0, 2**16),
        joining=st.integers(0, 2),
        keep=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
        counts=st.lists(COUNT, min_size=ROWS + 2, max_size=ROWS + 2),
        qkv_format=st.sampled_from(["bshd", "thd"]),
        extra_columns=st.integers(0, 1),
    )
    def step(
        self, seed: int, joining: int, keep: list[bool], counts: list[int], qkv_format: str, extra_columns: int
    ) -> None:
        known = dict(zip(self.ids, self.rows, strict=True))
        ids = [key for key, kept in zip(self.ids, keep, strict=False) if kept]
        ids += range(self.next_id, self.next_id + joining)
        random.Random(seed).shuffle(ids)
        if not ids:
            return
        new = [self.fresh(counts[row]) for row in range(len(ids))]
        rows = [known.get(key, []) + added for key, added in zip(ids, new, strict=True)]
        step_dict = OrderedDict((key, len(added)) for key, added in zip(ids, new, strict=True))
        if len(ids) > ROWS or max(map(len, rows)) > LENGTH:
            state = snapshot(self.cache)
            message = "do not fit the cache with max_batch_size" if len(ids) > ROWS else "make the cache longer"
            with pytest.raises(ValueError, match=message):
                self.cache.pre_step(step_dict)
            assert snapshot(self.cache) == state
            return
        self.cache.pre_step(step_dict)
        self.next_id += joining
        self.ids, self.rows = ids, rows
        self.write_step(new, qkv_format, max(map(len, new)) + extra_columns)

    @precondition(lambda self: self.rows)
    @rule(seed=st.integers(0, 2**16), kind=st.sampled_from(["identity", "permuted", "duplicated"]))
    def reorder_rows(self, seed: int, kind: str) -> None:
        order = list(range(len(self.rows)))
        if kind == "permuted":
            random.Random(seed).shuffle(order)
        elif kind == "duplicated":
            order = random.Random(seed).choices(order, k=len(order))
        self.reorder(order)

    @precondition(lambda self: self.rows and max(map(len, self.rows)))
    @rule(seed=st.integers(0, 2**16))
    def share_prefix(self, seed: int) -> None:
        choose = random.Random(seed)
        source = choose.choice([key for key, row in zip(self.ids, self.rows, strict=True) if row])
        row = self.rows[self.ids.index(source)]
        tokens = choose.randint(1, len(row))
        if len(self.rows) == ROWS:
            state = snapshot(self.cache)
            with pytest.raises(ValueError, match="the cache is full with max_batch_size=4"):
                self.cache.share_prefix(source, self.next_id, tokens)
            assert snapshot(self.cache) == state
            return
        self.cache.share_prefix(source, self.next_id, tokens)
        self.ids.append(self.next_id)
        self.next_id += 1
        self.rows.append(row[:tokens])

    @rule()
    def reset(self) -> None:
        super().reset()
        self.ids = []


class ColumnMachine(Machine):
    """The model's way: `begin_step` with the columns of a padded batch, and `crop` to forget the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[list[int | None]] = []  # of each row, None for padding

    @initialize(batch_size=st.integers(1, ROWS))
    def begin(self, batch_size: int) -> None:
        self.batch_size = batch_size

    @rule(
        seed=st.integers(0, 2**16),
        width=st.integers(1, 4),
        mask_kind=st.sampled_from(["none", "new", "whole", "cut"]),
        qkv_format=st.sampled_from(["bshd", "thd"]),
    )
    def step(self, seed: int, width: int, mask_kind: str, qkv_format: str) -> None:
        choose = random.Random(seed)
        old = self.columns or [[] for _ in range(self.batch_size)]
        # A single column continues every row that has begun: the cache does not read the mask then.
        generates = width == 1 and all(any(column is not None for column in row) for row in old)
        kept = old
        if mask_kind == "cut" and not generates:
            kept = [cut_tokens(row, choose.choice([0, 0, 1, 3])) for row in old]
        padded = mask_kind != "none" and not generates
        is_token = [[not padded or choose.random() < 0.7 for _ in range(width)] for _ in range(self.batch_size)]
        new = [self.fresh(sum(row)) for row in is_token]
        columns = []
        for cached, flags, added in zip(kept, is_token, new, strict=True):
            tokens = iter(added)
            columns.append(cached + [next(tokens) if flag else None for flag in flags])
        mask_BC = torch.tensor([[column is not None for column in row] for row in columns]).long()
        mask = {"none": None, "new": mask_BC[:, -width:]}.get(mask_kind, mask_BC)

        rows = [[column for column in row if column is not None] for row in columns]
        if max(map(len, rows)) > LENGTH:
            state = snapshot(self.cache)
            with pytest.raises(ValueError, match="make the cache longer"):
                self.cache.begin_step(mask, self.batch_size, width)
            assert snapshot(self.cache) == state
            return
        assert self.cache.begin_step(mask, self.batch_size, width) == [len(added) for added in new]
        self.columns, self.rows = columns, rows
        assert self.cache.get_seq_length() == len(columns[0])
        if any(new):
            self.write_step(new, qkv_format, width)

    @precondition(lambda self: self.columns)
    @rule(count=st.integers(0, 6))
    def crop(self, count: int) -> None:
        seen = len(self.columns[0])
        if count > seen:
            state = snapshot(self.cache)
            with pytest.raises(ValueError, match=f"{seen} columns in the cache"):
                self.cache.crop(-count)
            assert snapshot(self.cache) == state
            return
        self.cache.crop(-count)
        self.columns = [row[: seen - count] for row in self.columns]
        self.rows = [[column for column in row if column is not None] for row in self.columns]
        assert self.cache.get_seq_length() == seen - count

    @precondition(lambda self: self.columns)
    @rule(seed=st.integers(0, 2**16))
    def reorder_rows(self, seed: int) -> None:
        order = random.Random(seed).choices(range(self.batch_size), k=self.batch_size)
        self.reorder(order)
        self.columns = [list(self.columns[source]) for source in order]

    @precondition(lambda self: self.columns)
    @rule(copies=st.integers(1, 3))
    def repeat_rows(self, copies: int) -> None:
        if self.batch_size * copies > ROWS:
            state = snapshot(self.cache)
            with pytest.raises(ValueError, match=f"{self.batch_size} rows times {copies} do not fit"):
                self.cache.repeat_rows(copies)
            assert snapshot(self.cache) == state
            return
        self.cache.repeat_rows(copies)
        self.batch_size *= copies
        self.columns = [list(row) for row in self.columns for _ in range(copies)]
        self.rows = [list(row) for row in self.rows for _ in range(copies)]

    @rule()
    def reset(self) -> None:
        super().reset()
        self.columns = []


def cut_tokens(row: list[int | None], count: int) -> list[int | None]:
    """The row with its last `count` tokens turned into padding."""
    tokens = [index for index, column in enumerate(row) if column is not None]
    last = tokens[len(tokens) - count :] if count < len(tokens) else tokens
    return [None if index in last else column for index, column in enumerate(row)]


class PagedSequenceMachine(SequenceMachine):
    is_paged = True


class PagedColumnMachine(ColumnMachine):
    is_paged = True


@pytest.mark.parametrize("machine", [SequenceMachine, PagedSequenceMachine, ColumnMachine, PagedColumnMachine])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_any_sequence_of_calls(machine: type[Machine], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(library, "available", lambda device_type: False)
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("order", [[1, 0, 2], [1, 1, 2], [2, 0, 1], [0, 0, 0], [2, 2, 2]])
def test_rows_are_exchanged_beside_a_shorter_one(is_paged: bool, order: list[int]) -> None:
    """Behind a short row's pages the page table names page 0, which is the first row's."""
    cache = make_cache(is_paged=is_paged)
    rows = [list(range(8)), list(range(10, 18)), [20, 21]]
    cache.pre_step(OrderedDict((row, len(tokens)) for row, tokens in enumerate(rows)))
    for layer in LAYERS:
        write(cache, layer, rows, "thd", 0, te=False)
    cache.reorder_cache(torch.tensor(order))
    assert list(cache.sequences.values()) == [len(rows[source]) for source in order]
    for layer in LAYERS:
        check_rows(*cache.cache_manager.rows(layer, 3, LENGTH), layer, [rows[source] for source in order])


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_kv": None}, r"num_heads_kv is missing.*inference_params_for"),
        ({"head_dim_k": None}, r"head_dim_k is missing"),
        ({"dtype": None}, r"dtype is missing"),
        ({"qkv_format": "sbhd"}, r"qkv_format='sbhd' is not known: use 'bshd' or 'thd'"),
        ({"qkv_format": "thd"}, r"max_ctx_len is missing"),
        ({"is_paged": True, "page_size": None}, r"page_size is missing"),
        ({"is_paged": True, "page_size": 5}, r"page_size=5 must divide max_sequence_length=12"),
        ({"is_paged": True, "page_size": 0}, r"page_size=0 is not possible: give an integer of at least 1"),
        ({"is_paged": True, "total_num_pages": 13}, r"total_num_pages=13 must be between 1 and .* = 12"),
        ({"is_paged": True, "total_num_pages": 0}, r"total_num_pages=0 is not possible: give an integer of at least 1"),
        ({"is_paged": True, "total_num_pages": None}, r"total_num_pages=None must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**changes)


@pytest.mark.parametrize("is_paged", [False, True])
def test_it_is_what_models_and_transformers_look_for(is_paged: bool) -> None:
    cache = make_cache(is_paged=is_paged, max_ctx_len=8, qkv_format="thd")
    assert isinstance(cache, KVCache)
    assert (cache.get_max_cache_shape(), cache.get_max_length(), cache.get_seq_length()) == (LENGTH, LENGTH, 0)
    assert (cache.is_compileable, cache.is_croppable, cache.is_linear) == (False, True, [False])
    assert cache.longest() == 0
    pages = "12 pages of 4, " if is_paged else ""
    assert repr(cache) == (f"InferenceParams(4 rows of 12 tokens, {pages}2 heads of 4, torch.float32, cpu, filled: [])")


@pytest.mark.parametrize("is_paged", [False, True])
def test_values_may_be_of_another_size(is_paged: bool) -> None:
    cache = make_cache(is_paged=is_paged, head_dim_v=3)
    cache.allocate_memory(1)
    leading = (12, 4) if is_paged else (4, 12)
    assert [tuple(tensor.shape) for tensor in cache.cache_manager.cache[1]] == [(*leading, 2, 4), (*leading, 2, 3)]
    assert make_cache(is_paged=is_paged, head_dim_v=None).head_dim_v == DIM_K


def test_memory_is_taken_a_layer_at_a_time() -> None:
    cache = make_cache()
    assert cache.cache_manager.cache == {}
    cache.begin_step(None, 1, 2)
    write(cache, 7, [[1, 2]], "bshd", 2, te=False)
    assert list(cache.cache_manager.cache) == [7]


# --- limits ---------------------------------------------------------------------------------------------------------


def test_too_few_pages_change_nothing() -> None:
    manager = PagedKVCacheManager(3, PAGE, HEADS, DIM_K, torch.float32, ROWS, LENGTH, device=torch.device("cpu"))
    manager.assign_rows([None, None], [0, 0], [4, 5])
    before = ([list(row) for row in manager.pages], list(manager.pool.free), manager.page_table.tolist())
    assert [len(row) for row in manager.pages] == [1, 2]
    message = r"3 pages of 4 tokens are not enough: 1 more are needed for rows of \[5, 5\] tokens, and 0 are free"
    with pytest.raises(ValueError, match=message):
        manager.assign_rows([0, 1], [4, 5], [5, 5])
    assert ([list(row) for row in manager.pages], manager.pool.free, manager.page_table.tolist()) == before
    # The pages of a row that ends are free for the others in the same step.
    manager.assign_rows([1, None], [5, 0], [8, 1])
    assert manager.pages[0] == before[0][1]
    assert manager.pages[1] == before[0][0]
    check_pages(manager)


def test_a_cut_row_makes_room_for_another_in_the_same_step() -> None:
    manager = PagedKVCacheManager(3, PAGE, HEADS, DIM_K, torch.float32, ROWS, LENGTH, device=torch.device("cpu"))
    manager.assign_rows([None, None], [0, 0], [8, 4])
    manager.assign_rows([0, 1], [4, 4], [4, 8])
    assert [len(row) for row in manager.pages] == [1, 2]
    check_pages(manager)


@pytest.mark.parametrize("is_paged", [False, True])
def test_too_many_rows_or_tokens_change_nothing(is_paged: bool) -> None:
    cache = make_cache(is_paged=is_paged)
    cache.pre_step(OrderedDict({5: 3, 9: LENGTH - 1}))
    write(cache, 1, [[1, 2, 3], list(range(LENGTH - 1))], "thd", 0, te=False)
    state = snapshot(cache)
    with pytest.raises(ValueError, match=r"5 sequences do not fit the cache with max_batch_size=4"):
        cache.pre_step(OrderedDict.fromkeys(range(5), 1))
    message = r"sequence 9 has 11 tokens in the cache and gets 2 more, but max_sequence_length=12: make the cache"
    with pytest.raises(ValueError, match=message):
        cache.pre_step(OrderedDict({5: 1, 9: 2}))
    assert snapshot(cache) == state


# --- steps of a padded batch ------------------------------------------------------------------------------------------

PROMPT_BC = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def prompted(is_paged: bool = False) -> InferenceParams:
    """Three rows of 2, 4 and 3 tokens, left-padded to 4 columns, and two more columns."""
    cache = make_cache(is_paged=is_paged)
    assert cache.begin_step(PROMPT_BC, 3, 4) == [2, 4, 3]
    assert cache.begin_step(None, 3, 2) == [2, 2, 2]
    return cache


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_mask_over_all_columns_cuts_padding_behind_finished_rows(is_paged: bool) -> None:
    cache = prompted(is_paged)
    behind_BC = torch.tensor([[1, 1], [0, 0], [1, 0]])
    new_BC = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    assert cache.begin_step(torch.cat((PROMPT_BC, behind_BC, new_BC), dim=1), 3, 3) == [3, 2, 1]
    assert cache.get_seqlens_pre_step().tolist() == [4, 4, 4, 0]
    assert list(cache.sequences.values()) == [7, 6, 5]
    assert cache.get_seq_length() == 9


def test_a_mask_over_the_new_columns_keeps_what_is_cached() -> None:
    cache = prompted()
    assert cache.begin_step(torch.tensor([[1, 1], [0, 1], [0, 0]]), 3, 2) == [2, 1, 0]
    assert cache.get_seqlens_pre_step().tolist() == [4, 6, 5, 0]


def test_a_row_may_begin_in_a_later_column() -> None:
    """A left-padded prompt, a column at a time: the mask of a single column counts until all rows have begun."""
    cache = make_cache()
    steps = [cache.begin_step(PROMPT_BC[:, : column + 1], 3, 1) for column in range(4)]
    assert steps == [[0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert list(cache.sequences.values()) == [2, 4, 3]


@pytest.mark.parametrize(
    ("row", "mask", "message"),
    [
        (1, [1, 0, 1, 1, 1, 1], r"leaves out a cached token before others in row 1: only the end"),
        (1, [0, 0, 0, 0, 1, 1], r"leaves out a cached token before others in row 1"),
        (0, [0, 1, 1, 1, 1, 1], r"has tokens where padding was cached in row 0"),
    ],
)
def test_a_mask_that_contradicts_the_cache_is_refused(row: int, mask: list[int], message: str) -> None:
    cache = prompted()
    mask_BC = torch.cat((PROMPT_BC, torch.ones(3, 4, dtype=torch.long)), dim=1)
    mask_BC[row, :6] = torch.tensor(mask)
    state = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        cache.begin_step(mask_BC, 3, 2)
    assert snapshot(cache) == state


@pytest.mark.parametrize("columns", [3, 7, 9])
def test_a_mask_of_another_width_is_refused(columns: int) -> None:
    cache = prompted()
    state = snapshot(cache)
    with pytest.raises(ValueError, match=rf"attention_mask has {columns} columns, but the cache has seen 6 and 2 are"):
        cache.begin_step(torch.ones(3, columns), 3, 2)
    assert snapshot(cache) == state


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_cut_is_undone_when_the_step_does_not_fit(is_paged: bool) -> None:
    cache = prompted(is_paged)
    mask_BC = torch.cat((PROMPT_BC, torch.tensor([[1, 1], [0, 0], [1, 0]]), torch.ones(3, 9)), dim=1)
    state = snapshot(cache)
    with pytest.raises(ValueError, match="make the cache longer"):
        cache.begin_step(mask_BC, 3, 9)
    assert snapshot(cache) == state


def test_another_batch_size_is_refused_until_a_reset() -> None:
    cache = prompted()
    state = snapshot(cache)
    with pytest.raises(ValueError, match=r"holds a batch of 3 rows, but 2 rows come: call reset\(\)"):
        cache.begin_step(None, 2, 1)
    assert snapshot(cache) == state
    cache.reset()
    assert cache.begin_step(None, 2, 1) == [1, 1]


@pytest.mark.parametrize("count", [1, -7])
def test_crop_takes_minus_the_columns_to_forget(count: int) -> None:
    cache = prompted()
    state = snapshot(cache)
    with pytest.raises(ValueError, match=rf"crop\({count}\) with 6 columns in the cache: give minus the number"):
        cache.crop(count)
    assert snapshot(cache) == state


def test_crop_forgets_padding_as_padding() -> None:
    cache = prompted()
    cache.crop(-4)
    assert list(cache.sequences.values()) == [0, 2, 1]
    assert cache.get_seq_length() == 2


def test_values_may_have_heads_of_another_size() -> None:
    cache = make_cache(head_dim_v=6)
    cache.allocate_memory(1)
    cache.pre_step(OrderedDict([(0, 2), (1, 1)]))
    new_k, new_v = torch.randn(3, HEADS, DIM_K), torch.randn(3, HEADS, 6)
    keys, values, *_ = cache.step(1, new_k, new_v, "thd")
    assert torch.equal(torch.cat((keys[0, :2], keys[1, :1])), new_k)
    assert torch.equal(torch.cat((values[0, :2], values[1, :1])), new_v)


def test_a_layer_stored_by_append_rope_is_not_stored_again() -> None:
    """Transformer Engine's attention calls `step` in any case; after `append_rope` it returns the stored values."""
    cache = make_cache()
    cache.pre_step(OrderedDict([(0, 2)]))
    write(cache, 1, [[5, 6]], "thd", 0, te=False)
    wrong = torch.full((2, HEADS, DIM_K), 99.0)
    keys, values, *_ = cache.step(1, wrong, wrong, "thd")
    check_rows(keys, values, 1, [[5, 6]])
    cache.pre_step(OrderedDict([(0, 1)]))
    keys, *_ = cache.step(1, wrong[:1], wrong[:1], "thd")
    assert torch.equal(keys[0, 2], wrong[0])


@pytest.mark.parametrize("is_paged", [False, True])
def test_attention_of_transformer_engine_finds_what_it_reads(is_paged: bool) -> None:
    """The names that TE 2.20's attention reads from a cache, beside the methods of `KVCache`."""
    paged: dict[str, Any] = {"is_paged": True, "page_size": 16, "total_num_pages": 8} if is_paged else {}
    cache = InferenceParams(2, 64, 2, 16, torch.float32, max_ctx_len=32, device="cpu", **paged)
    caches: list[Any] = [cache]
    if is_paged:
        config = NVLlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model = NVLlamaForCausalLM(config)
        caches.append(EngineCache(model, rows=2, max_sequence_length=64, total_num_pages=7, page_size=16))
    for each in caches:
        assert each.is_paged is is_paged
        assert each.max_ctx_len == (32 if each is cache else 64)
        assert callable(each.convert_paged_to_nonpaged)
        if is_paged:
            assert (each.page_size, each.total_num_pages) == (16, 8)
            assert each.cache_manager.max_pages_per_seq == 4
            assert each.cache_manager.page_table.shape == (2, 4)
