"""`torch.compile(fullgraph=True)` and `torch.export` of the reference layers, against transformers' Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te


def batch(rows: int, columns: int, left: bool = True) -> dict[str, torch.Tensor]:
    """A padded batch whose second row has three columns of padding."""
    input_ids = torch.randint(3, 257, (rows, columns), generator=torch.Generator().manual_seed(rows))
    mask_BS = torch.ones(rows, columns, dtype=torch.long)
    mask_BS[1, : 3 if left else columns] = 0
    if not left:
        mask_BS[1, :-3] = 1
    return {"input_ids": input_ids, "attention_mask": mask_BS}


def check(found: Any, hf: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    is_token_BS = inputs["attention_mask"].bool()
    expected_BSV = hf(**inputs).logits
    torch.testing.assert_close(found.logits[is_token_BS], expected_BSV[is_token_BS], rtol=0, atol=1e-4)


def test_one_graph_for_all_batches(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    hf = tiny_llama(num_hidden_layers=1)
    te = convert_llama_hf_to_te(hf, attn_input_format="thd")
    graphs = []

    def count(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(te, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for inputs in (batch(2, 9), batch(5, 40, left=False)):
            check(compiled(**inputs), hf, inputs)
    assert len(graphs) == 1


def test_an_export_takes_other_batches(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    hf = tiny_llama(num_hidden_layers=1)
    te = convert_llama_hf_to_te(hf, attn_input_format="thd")
    rows, columns = torch.export.Dim("rows", min=2, max=16), torch.export.Dim("columns", min=4, max=64)
    shapes = {name: {0: rows, 1: columns} for name in batch(2, 9)}
    program = torch.export.export(te, (), batch(2, 9), dynamic_shapes=shapes).module()
    for inputs in (batch(2, 9), batch(5, 40, left=False)):
        check(program(**inputs), hf, inputs)
    # Tracing leaves nothing behind in the model.
    check(te(**batch(3, 20)), hf, batch(3, 20))
