"""`gpu_memory_utilization`: the share of a device's memory that weights and cache take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine
from llama_te_infer.engine import limits


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> Any:
    model = convert_llama_hf_to_te(tiny_llama())
    monkeypatch.setattr(limits, "total_memory", lambda device: 10 * model.get_memory_footprint())
    return model


def test_weights_and_cache_take_the_share(model: Any) -> None:
    engine = Engine(model, page_size=4, max_batch_size=10_000, gpu_memory_utilization=0.5)
    pages = engine.scheduler.blocks.pool.total_num_pages
    page_bytes = engine.cache_bytes // (pages + 1)  # one page serves rows without a text
    assert pages * page_bytes <= 4 * model.get_memory_footprint() < (pages + 1) * page_bytes


def test_no_more_pages_than_all_rows_need(model: Any) -> None:
    engine = Engine(model, page_size=4, max_batch_size=1, max_sequence_length=16, gpu_memory_utilization=1)
    assert engine.scheduler.blocks.pool.total_num_pages == 4


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_what_is_no_share(model: Any, share: float) -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization=.* is not possible: give a number above 0"):
        Engine(model, gpu_memory_utilization=share)


def test_a_share_that_the_weights_exceed(model: Any) -> None:
    with pytest.raises(ValueError, match=r"the weights take 0.0 GiB.*: give more than 0\.1\d\d\."):
        Engine(model, gpu_memory_utilization=0.1)


def test_pages_and_a_share_exclude_each_other(model: Any) -> None:
    with pytest.raises(ValueError, match="total_num_pages=8 and gpu_memory_utilization=0.5: give one of them"):
        Engine(model, total_num_pages=8, gpu_memory_utilization=0.5)
