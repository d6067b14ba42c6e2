"""`/v1/completions` through the official client: texts and log-probabilities are the engine's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llama_te_infer import Engine, SamplingParams
from llama_te_infer.serve.command import make_parser, server_settings, with_defaults
from serving.conftest import RunningServer, serving

PROMPT = "The sky is"


def text_of(engine: Engine, prompt: Any, **params: Any) -> str:
    return engine.generate([prompt], SamplingParams(**params))[0].outputs[0].text


def test_a_text(server: RunningServer, reference: Engine) -> None:
    answer = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert choice.text == text_of(reference, PROMPT, max_tokens=8, temperature=0)
    assert choice.finish_reason == "length" and answer.model == "tiny" and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 8, 19)


def test_the_default_length_is_openais(server: RunningServer) -> None:
    extra = {"ignore_eos": True}
    answer = server.client.completions.create(model="tiny", prompt=PROMPT, temperature=0, extra_body=extra)
    assert answer.usage.completion_tokens == 16


def test_prompts_of_every_form(server: RunningServer, reference: Engine) -> None:
    ids = [1, 2, 3]
    for prompts, expected in (
        (ids, [ids]),
        ([ids, [4, 5]], [ids, [4, 5]]),
        (["ab", "cde"], ["ab", "cde"]),
    ):
        answer = server.client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0)
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        for choice, prompt in zip(answer.choices, expected, strict=True):
            assert choice.text == text_of(reference, prompt, max_tokens=5, temperature=0)


def test_several_choices_for_several_prompts(server: RunningServer) -> None:
    answer = server.client.completions.create(model="tiny", prompt=["ab", "cd"], n=3, max_tokens=4, seed=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) > 3
    again = server.client.completions.create(model="tiny", prompt=["ab", "cd"], n=3, max_tokens=4, seed=1)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


def test_a_negative_seed(server: RunningServer) -> None:
    texts = {server.client.completions.create(model="tiny", prompt="a", seed=-5).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def test_streams_join_to_the_whole_text(server: RunningServer) -> None:
    arguments: Any = {"model": "tiny", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 12, "seed": 3, "logprobs": 1}
    whole = server.client.completions.create(**arguments)
    texts, ids, reasons, offsets = [""] * 4, [0] * 4, [None] * 4, [[] for _ in range(4)]
    usage = None
    for chunk in server.client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ids[choice.index] += len(choice.logprobs.tokens)
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert ids == [len(choice.logprobs.tokens) for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_events_are_lines_for_every_client(server: RunningServer) -> None:
    """A client may split at any line end of Unicode, and the text may have such characters."""
    body = {"prompt": "ab", "max_tokens": 64, "n": 4, "seed": 1, "ignore_eos": True, "stream": True}
    lines = httpx.post(f"{server.url}/v1/completions", json=body).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    assert any(not text.isascii() for chunk in chunks for choice in chunk["choices"] for text in [choice["text"]])


def test_a_prompt_alone_in_a_stream(server: RunningServer) -> None:
    stream = server.client.completions.create(model="tiny", prompt="ab", echo=True, max_tokens=0, stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == "<|bos|>ab" and choices[-1].finish_reason == "length"


def test_log_probabilities(server: RunningServer, reference: Engine) -> None:
    answer = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    (output,) = reference.generate([PROMPT], SamplingParams(max_tokens=6, temperature=0, logprobs=3))
    expected = output.outputs[0].logprobs
    assert found.token_logprobs == pytest.approx([each.logprob for each in expected], abs=1e-6)
    for top, each in zip(found.top_logprobs, expected, strict=True):
        # A dict has one entry for all tokens of one text, such as of bytes that are no whole character.
        likeliest = [logprob for _, logprob in each.top]
        assert max(top.values()) == pytest.approx(likeliest[0], abs=1e-6)
        assert all(any(abs(value - other) < 1e-6 for other in likeliest) for value in top.values())


def test_log_probabilities_after_the_parameters(make_engine: Callable[..., Engine], folder: Path) -> None:
    options = make_parser().parse_args([str(folder), "--logprobs-mode", "processed_logprobs"])
    settings = with_defaults(server_settings(options), options, {"temperature": 0.5})
    assert settings.default_params == {"temperature": 0.5, "logprobs_mode": "processed"}
    engine = make_engine(prefix_caching=False)
    with serving(engine, default_params=settings.default_params) as server:
        fields: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 1, "logprobs": 3}
        found = server.client.completions.create(**fields, extra_body={"top_k": 2}).choices[0].logprobs
        assert all(len(top) <= 3 for top in found.top_logprobs)  # two tokens, and the chosen one
        assert all(math.exp(min(top.values())) > 0 for top in found.top_logprobs)
        beams = server.client.completions.create(**fields, extra_body={"use_beam_search": True, "n": 2})
    params = SamplingParams(max_tokens=6, temperature=0.5, top_k=2, seed=1, logprobs=3, logprobs_mode="processed")
    (output,) = make_engine(prefix_caching=False).generate([PROMPT], params)
    expected = [each.logprob for each in output.outputs[0].logprobs or ()]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-6)
    assert len(beams.choices) == 2


def test_echo_scores_a_prompt(server: RunningServer, reference: Engine) -> None:
    arguments: Any = {"model": "tiny", "prompt": PROMPT, "echo": True, "temperature": 0, "logprobs": 1}
    alone = server.client.completions.create(**arguments, max_tokens=0).choices[0]
    more = server.client.completions.create(**arguments, max_tokens=3).choices[0]
    (output,) = reference.generate([PROMPT], SamplingParams(max_tokens=3, temperature=0, logprobs=0, prompt_logprobs=1))
    assert alone.text == f"<|bos|>{PROMPT}" and more.text == alone.text + output.outputs[0].text
    expected = [None if each is None else each.logprob for each in output.prompt_logprobs]
    assert alone.logprobs.token_logprobs[0] is None
    assert alone.logprobs.token_logprobs[1:] == pytest.approx(expected[1:], abs=1e-6)
    assert more.logprobs.token_logprobs[1 : len(expected)] == pytest.approx(expected[1:], abs=1e-6)
    assert len(more.logprobs.token_logprobs) == len(expected) + 3
    for each, top in zip(output.prompt_logprobs[1:], alone.logprobs.top_logprobs[1:], strict=True):
        assert max(top.values()) == pytest.approx(each.top[0][1], abs=1e-6) and len(top) <= 2


def words_of(value: Any) -> Any:
    """Return JSON without its floats."""
    if isinstance(value, dict):
        return {key: words_of(each) for key, each in value.items()}
    return (
        [words_of(each) for each in value] if isinstance(value, list) else None if isinstance(value, float) else value
    )


def numbers_of(value: Any) -> list[float]:
    """Return the floats of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers_of(each)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_stream_echoes_as_the_whole_answer_does(server: RunningServer, max_tokens: int) -> None:
    arguments: Any = {"model": "tiny", "prompt": [PROMPT, "ab"], "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    arguments |= {"seed": 1, "n": 2, "extra_body": {"prompt_logprobs": 1}}
    whole = server.client.completions.create(**arguments)
    streamed: dict[int, list[Any]] = {}
    for chunk in server.client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            streamed.setdefault(choice.index, []).append(choice)
    assert usage == whole.usage and usage.completion_tokens == 4 * max_tokens
    for choice in whole.choices:
        parts = streamed[choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            found = [value for part in parts for value in getattr(part.logprobs, name)]
            assert words_of(found) == words_of(getattr(choice.logprobs, name)), name
            # The sums of a product depend on what else is in the batch.
            assert numbers_of(found) == pytest.approx(numbers_of(getattr(choice.logprobs, name)), abs=1e-5), name
        assert words_of(parts[0].prompt_logprobs) == words_of(choice.prompt_logprobs)
        assert numbers_of(parts[0].prompt_logprobs) == pytest.approx(numbers_of(choice.prompt_logprobs), abs=1e-5)
        assert len(choice.prompt_logprobs) > 2


def test_beams(server: RunningServer, reference: Engine) -> None:
    answer = server.client.completions.create(
        model="tiny",
        prompt=PROMPT,
        n=2,
        max_tokens=6,
        temperature=0,
        extra_body={"use_beam_search": True, "best_of": 4},
    )
    (output,) = reference.generate([PROMPT], SamplingParams(max_tokens=6, num_beams=4, n=2))
    assert [choice.text for choice in answer.choices] == [completion.text for completion in output.outputs]


def test_token_ids(server: RunningServer, reference: Engine) -> None:
    answer = server.client.completions.create(
        model="tiny", prompt=[5, 6], max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
    )
    (output,) = reference.generate([[5, 6]], SamplingParams(max_tokens=4, temperature=0))
    assert answer.choices[0].token_ids == output.outputs[0].token_ids
    assert answer.choices[0].prompt_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature=-1.0 is not possible: give 0"),
        ({"temperature": "1"}, "temperature", "temperature='1' is not possible"),
        ({"max_tokens": 2.5}, "max_tokens", "max_tokens=2.5 is not possible"),
        ({"max_tokens": 1000}, "prompt", "prompt has 2 tokens and max_tokens=1000, but max_sequence_length=512"),
        ({"prompt": []}, "prompt", "prompt=[] is not possible"),
        ({"prompt": [[1], []]}, None, "prompt[1]: prompt has no tokens"),
        ({"prompt": [300]}, "prompt", "prompt has the tokens 300 to 300, but the model knows 0 to 258"),
        ({"prompt": {"a": 1}}, "prompt", "prompt={'a': 1} is not possible"),
        ({"nonsense": 1}, "nonsense", "nonsense is no field of this request: leave it out."),
        ({"suffix": "a"}, "suffix", "suffix is not supported: the models write no middle of a text."),
        ({"logprobs": 50}, "logprobs", "logprobs=50 is not possible: give a number of tokens from 0 to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias={'a': ...} is not possible"),
        ({"logit_bias": {"1": 1000}}, "logit_bias", "from -100 to 100"),
        ({"best_of": 3}, "best_of", "best_of=3 needs use_beam_search=true"),
        ({"n": 2, "temperature": 0}, None, "n=2 with temperature=0 gives equal answers"),
        ({"stop": [""]}, "stop", "give strings that are not empty"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(
    server: RunningServer, fields: dict[str, Any], param: str | None, message: str, stream: bool
) -> None:
    arguments = {"model": "tiny", "prompt": "a", "stream": stream, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.post("/completions", body=arguments, cast_to=object)
    error = caught.value
    assert message in error.body["message"]
    assert error.body["type"] == "invalid_request_error"
    if param is not None:
        assert error.body["param"] == param


def test_another_model(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError, match="model='gpt-9' is not served here: ask for tiny") as caught:
        server.client.completions.create(model="gpt-9", prompt="a")
    assert caught.value.body["code"] == "model_not_found"
