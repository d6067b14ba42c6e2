"""lm-eval's clients of OpenAI's API give the scores of its `hf` model on transformers' model.

Bound: see `conftest.BOUND`; a log-likelihood is a sum over tens of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from clients.conftest import BOUND, Pair
from clients.test_lm_eval import CHOICE, CONTINUATION, DATA
from llama_te_infer import Engine
from serving.conftest import serving


def evaluate(tasks: Path, names: list[str], model: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    results: dict[str, Any] = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=0,
        batch_size=2,
        bootstrap_iters=0,
        **options,
    )
    return results


def check_scores(url: str, model: str, folder: Path, tmp_path: Path, **tokenizer_options: Any) -> None:
    """Compare the scores of a server with those of lm-eval's `hf` model.

    Args:
        url: The server's, with /v1.
        model: The name of its model.
        folder: The checkpoint of transformers' model, with the tokenizer.
        tmp_path: A folder to write to.
        tokenizer_options: Arguments of both of lm-eval's models.
    """
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_data.py").write_text(DATA)
    (tasks / "choice.yaml").write_text(CHOICE)
    (tasks / "continuation.yaml").write_text(CONTINUATION)
    hf = {"pretrained": str(folder), "dtype": "float32", **tokenizer_options}
    api = {"model": model, "tokenizer": str(folder), "num_concurrent": 2, **tokenizer_options}
    expected = evaluate(tasks, ["choice", "continuation"], "hf", hf, device="cpu")
    completions = {**api, "base_url": f"{url}/completions"}
    ours = evaluate(tasks, ["choice", "continuation"], "local-completions", completions)
    assert ours["results"]["choice"]["acc,none"] == expected["results"]["choice"]["acc,none"]
    for sample, wanted in zip(ours["samples"]["choice"], expected["samples"]["choice"], strict=True):
        for ((score, greedy),), ((wanted_score, wanted_greedy),) in zip(sample["resps"], wanted["resps"], strict=True):
            assert float(score) == pytest.approx(float(wanted_score), abs=BOUND) and greedy == wanted_greedy
    texts = [sample["resps"] for sample in expected["samples"]["continuation"]]
    assert [sample["resps"] for sample in ours["samples"]["continuation"]] == texts

    expected = evaluate(tasks, ["continuation"], "hf", hf, device="cpu", apply_chat_template=True)
    chats = {**api, "base_url": f"{url}/chat/completions"}
    ours = evaluate(tasks, ["continuation"], "local-chat-completions", chats, apply_chat_template=True)
    answers = [sample["resps"] for sample in expected["samples"]["continuation"]]
    assert [sample["resps"] for sample in ours["samples"]["continuation"]] == answers != texts


def test_scores_of_a_server_are_those_of_transformers_model(
    pair: Pair, tokenizer: Any, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with serving(Engine(pair.te, tokenizer, page_size=16)) as server:
        check_scores(f"{server.url}/v1", "tiny", folders[0], tmp_path, add_bos_token=True)
