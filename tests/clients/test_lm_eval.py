"""lm-eval's `hf` model computes the same numbers with both models.

Bound: see `conftest.BOUND`; a log-likelihood is a sum over tens of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from clients.conftest import BOUND, Pair

CONTEXTS = ["The sky is", "Two and two make", "", "Once upon a time there was a king who"]
ANSWERS = [" blue", " four", "Yes", " had no bread"]

CHOICE = """
task: choice
custom_dataset: !function local_data.documents
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
CONTINUATION = """
task: continuation
custom_dataset: !function local_data.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - metric: exact_match
"""
DATA = """
from datasets import Dataset

def documents(**kwargs):
    rows = [
        {"question": "The sky is", "choices": [" blue", " green", " made of stone"], "answer": 0},
        {"question": "Two and two make", "choices": [" five", " four", " a pair of shoes"], "answer": 1},
        {"question": "Fire is", "choices": [" cold", " hot", " wet and blue"], "answer": 1},
    ]
    return {"test": Dataset.from_list(rows)}
"""


def model_of(model: Any, tokenizer: Any, **arguments: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **{"batch_size": 3, **arguments})


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number, metadata=("task", number, 1))
        for number, one in enumerate(arguments)
    ]


@pytest.mark.parametrize("attn_input_format", ["thd", "bshd"])
def test_likelihoods(attn_input_format: str, make_pair: Any, tokenizer: Any) -> None:
    pair = make_pair(attn_input_format=attn_input_format)
    expected, ours = (model_of(model, tokenizer) for model in pair)
    pairs = requests("loglikelihood", list(zip(CONTEXTS, ANSWERS, strict=True)))
    for (score, is_greedy), (wanted, wanted_greedy) in zip(
        ours.loglikelihood(pairs, disable_tqdm=True), expected.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert score == pytest.approx(wanted, abs=BOUND) and wanted < -5
        assert is_greedy == wanted_greedy
    # Longer than the 256 tokens of the model: lm-eval cuts it into windows.
    rolling = requests("loglikelihood_rolling", [("a long text " * 30,), ("short",)])
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        expected.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"do_sample": False, "num_beams": 2}], ids=["greedy", "beams"])
def test_generated_text(options: dict[str, Any], pair: Pair, tokenizer: Any) -> None:
    options = {"until": ["\n", "</s>"], "max_gen_toks": 16, **options}
    texts = requests("generate_until", [(context, options) for context in CONTEXTS if context])
    expected, ours = (model_of(model, tokenizer).generate_until(texts, disable_tqdm=True) for model in pair)
    assert ours == expected
    assert any(expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluates_local_tasks_from_folders(dtype: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_data.py").write_text(DATA)
    (tasks / "choice.yaml").write_text(CHOICE)
    (tasks / "continuation.yaml").write_text(CONTINUATION)
    results = [
        simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype},
            tasks=["choice", "continuation"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            num_fewshot=0,
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
        )
        for folder in folders
    ]
    expected, ours = (result["samples"] for result in results)
    bound = BOUND if dtype == "float32" else 0.5  # bf16: scores of 20 tokens, each rounded to 8 bits; measured 0.1
    for sample, wanted in zip(ours["choice"], expected["choice"], strict=True):
        scores, wanted_scores = ([float(score) for ((score, _),) in each["resps"]] for each in (sample, wanted))
        assert len(scores) == 3
        assert scores == pytest.approx(wanted_scores, abs=bound)
    if dtype == "float32":
        assert [sample["resps"] for sample in ours["continuation"]] == [
            sample["resps"] for sample in expected["continuation"]
        ]
        assert results[1]["results"]["choice"]["acc,none"] == results[0]["results"]["choice"]["acc,none"]
