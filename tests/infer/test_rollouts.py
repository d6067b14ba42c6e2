"""TRL's `GRPOTrainer` writes its completions by an engine on the model that it trains, by both of its ways in."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from trl import GRPOConfig, GRPOTrainer

from byte_tokenizers import chat_tokenizer
from llama_te_convert import convert_llama_hf_to_te
from llama_te_core.lora import on_weights
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.engine import live_engine
from llama_te_infer.rl import rollout_func
from llama_te_infer.structured_outputs import StructuredOutputs

SETTINGS: dict[str, Any] = {
    "output_dir": "trained",
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
TEXTS = ["The sky is", "Two and two make", "Yes, because"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return convert_llama_hf_to_te(tiny_llama(vocab_size=300, initializer_range=0.15, num_hidden_layers=2))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = chat_tokenizer(TEMPLATE)
    made.eos_token = "<|end|>"
    return made


class Run:
    """A training run, with what its rollouts returned and what the trainer would compute for them.

    Attributes:
        texts: The completions that the reward function saw in each step.
        rewards: The mean reward of each step.
        distances: For each rollout the greatest distance of its log-probabilities from those of a training pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        rollout: Callable[..., Any] | None,
        prompts: list[Any] | None = None,
        peft_config: Any = None,
        **settings: Any,
    ) -> None:
        self.texts: list[list[str]] = []
        self.distances: list[float] = []
        self.outputs: list[dict[str, Any]] = []

        def reward(completions: list[Any], **columns: Any) -> list[float]:
            texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
            self.texts.append(texts)
            return [sum(letter.islower() for letter in text) / 8 for text in texts]

        def compared(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            assert rollout is not None
            output: dict[str, Any] = rollout(prompts, trainer)
            self.outputs.append(output)
            self.distances.append(distance(trainer, output))
            return output

        self.trainer = GRPOTrainer(
            model,
            reward_funcs=reward,
            args=GRPOConfig(**SETTINGS | settings),
            train_dataset=Dataset.from_dict({"prompt": (prompts or TEXTS) * 4}),
            processing_class=tokenizer,
            rollout_func=None if rollout is None else compared,
            peft_config=peft_config,
        )
        self.trainer.train()
        logs = [entry for entry in self.trainer.state.log_history if "reward" in entry]
        self.rewards = [entry["reward"] for entry in logs]
        assert len(self.rewards) == SETTINGS["max_steps"]


def distance(trainer: Any, output: dict[str, Any]) -> float:
    """The greatest distance of a rollout's log-probabilities from those of a training pass on the same tokens."""
    greatest = 0.0
    assert trainer.model.training
    for prompt, completion, logprobs in zip(
        output["prompt_ids"], output["completion_ids"], output["logprobs"], strict=True
    ):
        with torch.no_grad(), trainer.accelerator.autocast():
            logits_SV = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logprob_SV = (logits_SV.float() / trainer.temperature).log_softmax(-1)
        expected_S = logprob_SV.gather(1, torch.tensor(completion)[:, None])[:, 0]
        greatest = max(greatest, (expected_S - torch.tensor(logprobs)).abs().max().item())
    return greatest


# --- rollout_func -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"temperature": 0.7}], ids=str)
def test_log_probabilities_are_the_trainers(model: PreTrainedModel, tokenizer: Any, settings: dict[str, Any]) -> None:
    before = copy.deepcopy(model)
    run = Run(model, tokenizer, rollout_func(), **settings)
    assert len(run.distances) == 5 and max(run.distances) < 1e-5
    assert any(len(set(texts)) > 1 for texts in run.texts)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight), "nothing was learned"
    for output in run.outputs:
        for completion in output["completion_ids"]:
            assert len(completion) == 8 or completion[-1] in run.trainer.eos_token_ids


@pytest.mark.parametrize("way", ["rollout_func", "generate_batch"])
def test_rewards_are_those_of_the_trainers_own_generation(model: PreTrainedModel, tokenizer: Any, way: str) -> None:
    """With top_k=1 every way draws the same texts, so that all that follows is the same too."""
    settings: dict[str, Any] = {"top_k": 1, "learning_rate": 0.1}
    own = Run(copy.deepcopy(model), tokenizer, None, **settings)
    if way == "generate_batch":
        ours = Run(model, tokenizer, None, use_transformers_continuous_batching=True, **settings)
    else:
        ours = Run(model, tokenizer, rollout_func(), **settings)
    assert ours.texts == own.texts and ours.rewards == pytest.approx(own.rewards, abs=1e-6)
    assert len({text for texts in own.texts for text in texts}) > 1


def test_the_same_seed_gives_the_same_run(model: PreTrainedModel, tokenizer: Any) -> None:
    first, second = (Run(copy.deepcopy(model), tokenizer, rollout_func(), seed=5) for _ in range(2))
    other = Run(copy.deepcopy(model), tokenizer, rollout_func(), seed=6)
    assert first.texts == second.texts != other.texts


def test_conversations_by_the_chat_template(model: PreTrainedModel, tokenizer: Any) -> None:
    prompts = [[{"role": "user", "content": text}] for text in TEXTS]
    settings: dict[str, Any] = {"top_k": 1, "chat_template_kwargs": {"shout": True}}
    own = Run(copy.deepcopy(model), tokenizer, None, prompts, **settings)
    ours = Run(model, tokenizer, rollout_func(max_batch_size=2), prompts, **settings)
    assert ours.texts == own.texts and ours.rewards == own.rewards
    assert tokenizer.decode(ours.outputs[0]["prompt_ids"][0]).endswith("<|end|>!assistant:")


def test_an_adapter_is_part_of_the_model(model: PreTrainedModel, tokenizer: Any) -> None:
    weights = ["self_attention.proj.weight", "layernorm_mlp.fc2_weight"]
    adapter = on_weights(LoraConfig(r=4, target_parameters=weights, task_type="CAUSAL_LM"))
    run = Run(model, tokenizer, rollout_func(), peft_config=adapter, learning_rate=0.05)
    assert max(run.distances) < 1e-5
    changed = [p for name, p in run.trainer.model.named_parameters() if "lora_B" in name]
    assert changed and all(bool(p.any()) for p in changed)


def test_autocast_is_the_trainers(model: PreTrainedModel, tokenizer: Any) -> None:
    """Under bfloat16 autocast engine and trainer round alike, but for the products that differ in shape."""
    run = Run(model, tokenizer, rollout_func(), bf16=True)
    assert max(run.distances) < 0.25


def test_settings_of_the_engines_own(model: PreTrainedModel, tokenizer: Any) -> None:
    letters = list(range(ord("a"), ord("e")))
    run = Run(model, tokenizer, rollout_func(), generation_kwargs={"allowed_token_ids": letters})
    assert all(token in letters for output in run.outputs for ids in output["completion_ids"] for token in ids)
    with pytest.raises(TypeError, match="no_repeat_ngram_size"):
        Run(model, tokenizer, rollout_func(), generation_kwargs={"no_repeat_ngram_size": 2})


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_in_another_dtype_lives_during_rollouts_alone(
    model: PreTrainedModel, tokenizer: Any, bf16: bool
) -> None:
    live: list[live_engine.LiveEngine] = []

    class Noted(live_engine.LiveEngine):
        def generate(self, trained: Any, prompts: Any, params: Any, tokenizer: Any = None) -> Any:
            live.append(self)
            expected = Engine(copy.deepcopy(trained).bfloat16(), max_batch_size=4).generate(
                prompts, [SamplingParams(max_tokens=8, temperature=0)] * len(prompts)
            )
            greedy = [dataclasses.replace(each, temperature=0, n=1) for each in params]
            found = super().generate(trained, prompts, greedy, tokenizer)
            cut = [output.outputs[0].token_ids for output in found]
            whole = [output.outputs[0].token_ids for output in expected]
            assert [ids[: len(own)] for ids, own in zip(whole, cut, strict=True)] == cut
            return super().generate(trained, prompts, params, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_te_infer.rl.rollouts.LiveEngine", Noted)
        run = Run(model, tokenizer, rollout_func(dtype=torch.bfloat16), bf16=bf16)
    assert 1e-5 < max(run.distances) < 0.25
    assert model.dtype == torch.float32
    assert len(live) == 5 and len(set(map(id, live))) == 1
    assert live[0]._copy is not None and sum(each.numel() for each in live[0]._copy.parameters()) == 0


def test_parameters_that_name_texts_get_the_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    form = StructuredOutputs(choice=["yes", "no"])
    run = Run(model, tokenizer, rollout_func(), generation_kwargs={"structured_outputs": form, "stop": ["!"]})
    assert {text for texts in run.texts for text in texts} == {"yes", "no"}


def test_an_engine_is_made_again_where_a_batch_is_larger(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Engine] = []

    def make(*arguments: Any, **options: Any) -> Engine:
        made.append(Engine(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(live_engine, "Engine", make)
    live = live_engine.LiveEngine(page_size=4)
    params = SamplingParams(max_tokens=4, temperature=0)
    for count, length in ((2, 5), (1, 3), (2, 5), (3, 5), (1, 9), (3, 9)):
        outputs = live.generate(model, [[7] * length] * count, [params] * count)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [4] * count
    assert [engine.scheduler.max_rows for engine in made] == [2, 3, 3]
    assert [engine.stats().total_num_pages for engine in made] == [6, 9, 12]
    assert made[-1].is_asleep


# --- generate_batch ---------------------------------------------------------------------------------------------------


def test_generate_batch_is_generate(model: PreTrainedModel) -> None:
    prompts = [[5, 77, 31, 200, 8], [7, 7, 3], [41]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    results = model.generate_batch(prompts, config)
    assert [result.prompt_ids for result in results.values()] == prompts
    for prompt, result in zip(prompts, results.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert result.generated_tokens == expected and result.is_finished() and result.error is None
    beams = GenerationConfig(max_length=9, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=2)
    several = model.generate_batch(prompts[:2], beams)
    assert list(several) == ["req_0__child#0", "req_0", "req_1__child#0", "req_1"]
    expected = model.generate(torch.tensor(prompts[:1]), generation_config=beams, pad_token_id=0)[:, 5:].tolist()
    found = [result.generated_tokens for result in list(several.values())[:2]]
    assert found == [[token for token in row if token != 0] for row in expected]


def test_generate_batch_reports_log_probabilities(model: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, eos_token_id=None)
    torch.manual_seed(3)
    results = model.generate_batch([[7, 7, 3]], config, ContinuousBatchingConfig(return_logprobs=True), warmup=False)
    (result,) = results.values()
    ids = torch.tensor([[7, 7, 3, *result.generated_tokens]])
    with torch.no_grad():
        logprob_SV = (model(ids).logits[0, 2:-1] / 0.5).log_softmax(-1)
    expected_S = logprob_SV.gather(1, torch.tensor(result.generated_tokens)[:, None])[:, 0]
    assert result.logprobs == pytest.approx(expected_S.tolist(), abs=1e-5)
    torch.manual_seed(3)
    again = model.generate_batch([[7, 7, 3]], config, max_new_tokens=3)
    assert next(iter(again.values())).generated_tokens == result.generated_tokens[:3]
    assert model.generate_batch([]) == {}


@pytest.mark.parametrize(
    ("fields", "options", "error", "message"),
    [
        (
            {"no_repeat_ngram_size": 2},
            {},
            ValueError,
            "generation_config has no_repeat_ngram_size=2, which generate_ba",
        ),
        ({"stop_strings": ["a"]}, {}, ValueError, "generation_config has stop_strings="),
        ({"max_new_tokens": None}, {}, ValueError, "generation_config has no max_new_tokens and no max_length: give"),
        ({"suppress_tokens": [3]}, {}, ValueError, r"generation_config has suppress_tokens=\[3\], which generate_b"),
        ({}, {"record_timestamps": True}, ValueError, "record_timestamps=True is not possible: use Engine.stream"),
        ({}, {"wormup": True}, TypeError, "unexpected keyword argument 'wormup'"),
    ],
    ids=str,
)
def test_generate_batch_refuses_what_it_does_not_have(
    model: PreTrainedModel, fields: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = GenerationConfig(**{"max_new_tokens": 4, "typical_p": 1.0, "no_repeat_ngram_size": 0, **fields})
    with pytest.raises(error, match=message):
        model.generate_batch([[7, 7, 3]], config, **options)


def test_a_model_with_an_engine_is_copied_saved_and_freed(model: PreTrainedModel) -> None:
    config = GenerationConfig(max_new_tokens=4, eos_token_id=None)
    names = list(model.state_dict())
    first = next(iter(model.generate_batch([[7, 7, 3]], config).values())).generated_tokens
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert next(iter(other.generate_batch([[7, 7, 3]], config).values())).generated_tokens == first
    assert list(model.state_dict()) == names


def test_a_model_with_an_engine_is_freed(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model = convert_llama_hf_to_te(tiny_llama())
    model.generate_batch([[7, 7, 3]], max_new_tokens=2)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_generate_batch_without_llama_te_infer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_te_core.compat.entry_points.entry_points", lambda *, group: [])
    with pytest.raises(ImportError, match="generate_batch runs on the engine of llama-te-infer: pip install llama-te"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
