"""`llama-te-serve` as a user starts it, on the real SmolLM2 in its three formats, and the official client.

The oracles are an engine of its own on the converted float32 model, and transformers' `generate`.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from transformers import PreTrainedModel

from clients.test_lm_eval_server import check_scores
from infer.test_structured_outputs import CHECKED, random_schemas
from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_infer import Engine, SamplingParams

OPTIONS = {"max_batch_size": 16, "max_sequence_length": 256, "page_size": 16, "total_num_pages": 128}
QUESTIONS = ["Why is the sky blue?", "What is the capital of France?", "Say 😀🎉 in three languages."]
NEW = 16
Url = str


@pytest.fixture(scope="module")
def engine(smollm2: PreTrainedModel, smollm2_tokenizer: Any) -> Engine:
    return Engine(convert_llama_hf_to_te(smollm2), smollm2_tokenizer, **OPTIONS)


@pytest.fixture(scope="module")
def checkpoints(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as a folder of transformers and as a converted folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    # transformers does not save the model that it has read from a GGUF file.
    for name, model in (("hf", convert_llama_te_to_hf(engine.model)), ("te", engine.model)):
        model.save_pretrained(folder / name)
        engine.tokenizer.save_pretrained(folder / name)
    return {"hf": folder / "hf", "te": folder / "te"}


def start(source: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llama_te_infer.serve", str(source), "--port=0", "--served-model-name=smol"]
    command += ["--dtype=float32", *(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="session", autouse=True)
def server_of_the_file(smollm2_file: Path) -> Iterator[subprocess.Popen[str]]:
    """A server of the GGUF file, which begins to load before the tests themselves load the model."""
    with start(smollm2_file) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def urls(server_of_the_file: subprocess.Popen[str], checkpoints: dict[str, Path]) -> Iterator[dict[str, Url]]:
    """Servers of all formats."""
    with ExitStack() as ended:
        processes = {"gguf": server_of_the_file}
        for name, source in checkpoints.items():
            processes[name] = ended.enter_context(start(source))
            ended.callback(processes[name].kill)
        found = {}
        for name, process in processes.items():
            assert process.stdout is not None
            ready = process.stdout.readline()
            found[name] = re.search(r"smol at (http://127.0.0.1:\d+)", ready)
            assert found[name], f"{name}: {ready}"
        yield {name: f"{match[1]}/v1" for name, match in found.items()}


@pytest.fixture(scope="module")
def client(urls: dict[str, Url]) -> OpenAI:
    return OpenAI(base_url=urls["te"], api_key="none", max_retries=0)


def chat(question: str) -> Any:
    return [{"role": "user", "content": question}]


def test_greedy_text_of_every_format_is_transformers_own(
    urls: dict[str, Url], engine: Engine, smollm2: PreTrainedModel, smollm2_tokenizer: Any
) -> None:
    for question in QUESTIONS:
        prompt = smollm2_tokenizer.apply_chat_template(
            chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = smollm2.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        expected = smollm2_tokenizer.decode(written, skip_special_tokens=True)
        (output,) = engine.chat(chat(question), SamplingParams(max_tokens=NEW, temperature=0))
        assert output.outputs[0].text == expected
        for url in urls.values():
            client = OpenAI(base_url=url, api_key="none")
            answer = client.chat.completions.create(
                model="smol", messages=chat(question), max_completion_tokens=NEW, temperature=0
            )
            assert answer.choices[0].message.content == expected
            assert answer.usage is not None and answer.usage.prompt_tokens == prompt["input_ids"].shape[1]


def test_beams_are_the_engines(client: OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.create(
        model="smol",
        messages=chat(QUESTIONS[0]),
        max_tokens=NEW,
        n=2,
        extra_body={"use_beam_search": True, "best_of": 3},
    )
    (output,) = engine.chat(chat(QUESTIONS[0]), SamplingParams(max_tokens=NEW, num_beams=3, n=2))
    assert [choice.message.content for choice in answer.choices] == [each.text for each in output.outputs]


def test_log_probabilities_are_the_engines(client: OpenAI, engine: Engine) -> None:
    params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=5)
    (output,) = engine.chat(chat(QUESTIONS[1]), params)
    expected = output.outputs[0].logprobs
    answer = client.chat.completions.create(
        model="smol", messages=chat(QUESTIONS[1]), max_tokens=NEW, temperature=0, logprobs=True, top_logprobs=5
    )
    found = answer.choices[0].logprobs.content
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected], abs=1e-6)
    for each, here in zip(found, expected, strict=True):
        assert [top.logprob for top in each.top_logprobs] == pytest.approx([p for _, p in here.top], abs=1e-6)
        assert [top.token for top in each.top_logprobs] == [engine.tokenizer.decode([token]) for token, _ in here.top]
    # The last token ended the text, so its bytes are not of the text.
    ended = answer.choices[0].finish_reason == "stop"
    written = bytes(byte for each in found[: -1 if ended else None] for byte in each.bytes)
    assert written.decode() == answer.choices[0].message.content


def test_echo_gives_the_logprobs_and_the_place_of_each_token(client: OpenAI, engine: Engine) -> None:
    prompt = "Naïve cafés cost 5 €."
    answer = client.completions.create(
        model="smol", prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=0
    ).choices[0]
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=4, temperature=0, logprobs=0, prompt_logprobs=0))
    expected = [each and each.logprob for each in output.prompt_logprobs] + [
        each.logprob for each in output.outputs[0].logprobs
    ]
    assert answer.logprobs.token_logprobs[0] is None
    assert answer.logprobs.token_logprobs[1:] == pytest.approx(expected[1:], abs=1e-6)
    assert answer.text == prompt + output.outputs[0].text
    for token, offset in zip(answer.logprobs.tokens, answer.logprobs.text_offset, strict=True):
        assert answer.text.startswith(token, offset) or "\N{REPLACEMENT CHARACTER}" in token


def test_a_seed_gives_the_same_text_also_under_load(urls: dict[str, Url], client: OpenAI) -> None:
    def arguments(seed: int | None) -> Any:
        return {
            "model": "smol",
            "messages": chat("Tell me a story."),
            "max_tokens": 8,
            "seed": seed,
            "logprobs": True,
        }

    alone = client.chat.completions.create(**arguments(7)).choices
    assert client.chat.completions.create(**arguments(7)).choices[0].message == alone[0].message

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=urls["te"], api_key="none") as many:
            calls = [many.chat.completions.create(**arguments(seed)) for seed in [None, 7, 8] * 3]
            return await asyncio.gather(*calls)

    texts = [answer.choices[0].message.content for answer in asyncio.run(ask())]
    assert set(texts[1::3]) == {alone[0].message.content}
    assert len(set(texts[2::3])) == 1


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(prompt=st.text(min_size=1, max_size=20), seed=st.integers(0, 2**63 - 1), special=st.booleans())
def test_the_deltas_of_a_stream_join_to_the_whole_text(client: OpenAI, prompt: str, seed: int, special: bool) -> None:
    """A high temperature draws tokens that are parts of characters."""
    arguments: Any = {"model": "smol", "prompt": prompt, "max_tokens": 8, "seed": seed, "temperature": 3.0}
    extra = {"skip_special_tokens": special, "return_token_ids": True}
    whole = client.completions.create(**arguments, extra_body=extra).choices[0]
    chunks = list(client.completions.create(**arguments, extra_body=extra, stream=True))
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.text
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == whole.token_ids
    assert chunks[0].choices[0].prompt_token_ids == whole.prompt_token_ids


def test_characters_of_several_tokens_come_whole(client: OpenAI, engine: Engine) -> None:
    text = "👩‍👧 🇫🇷 漢"
    tokens = engine.tokenizer(text)["input_ids"]
    assert len(tokens) > len(text.split()) * 2
    # A bias lets the model write these tokens, one request for each place.
    for index in range(1, len(tokens)):
        answer = client.completions.create(
            model="smol", prompt=tokens[:index], max_tokens=1, temperature=0, logit_bias={str(tokens[index]): 100}
        )
        assert answer.choices[0].text == engine.tokenizer.decode(tokens[index : index + 1])


def test_required_calls_fit_their_schemas(client: OpenAI) -> None:
    """The chat template of SmolLM2 does not write tools, so a system message describes them."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    function: Any = {"name": "weather", "description": "Weather of a city.", "parameters": schema}
    for question in ("How warm is it in Rome?", "Zürich!"):
        answer = client.chat.completions.create(
            model="smol",
            messages=chat(question),
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
        )
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), schema)


def test_both_clients_get_the_same_answers_whole_and_in_streams(urls: dict[str, Url], client: OpenAI) -> None:
    chats: Any = {"model": "smol", "messages": chat(QUESTIONS[0]), "max_tokens": 8, "n": 3, "seed": 5}
    texts: Any = {"model": "smol", "prompt": ["The sky is", "Two and two"], "max_tokens": 8, "seed": 5}

    def joined(chunks: list[Any]) -> dict[int, str]:
        found: dict[int, str] = {}
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            part = choice.text if hasattr(choice, "text") else choice.delta.content
            found[choice.index] = found.get(choice.index, "") + (part or "")
        return found

    async def ask() -> list[Any]:
        async with AsyncOpenAI(base_url=urls["te"], api_key="none", max_retries=0) as other:
            return [
                await other.chat.completions.create(**chats),
                [chunk async for chunk in await other.chat.completions.create(**chats, stream=True)],
                await other.completions.create(**texts),
                [chunk async for chunk in await other.completions.create(**texts, stream=True)],
            ]

    def plain(answer: Any) -> list[Any]:
        return [choice.to_dict() for choice in answer.choices]

    whole_chat, chat_chunks, whole_text, text_chunks = asyncio.run(ask())
    contents = {choice.index: choice.message.content for choice in whole_chat.choices}
    assert len(set(contents.values())) == 3, "each answer is drawn by itself"
    assert plain(client.chat.completions.create(**chats)) == plain(whole_chat)
    assert joined(chat_chunks) == joined(list(client.chat.completions.create(**chats, stream=True))) == contents
    continued = {choice.index: choice.text for choice in whole_text.choices}
    assert plain(client.completions.create(**texts)) == plain(whole_text)
    assert joined(text_chunks) == joined(list(client.completions.create(**texts, stream=True))) == continued


def test_a_stop_string_ends_a_text_before_it(client: OpenAI, engine: Engine) -> None:
    (output,) = engine.chat(chat(QUESTIONS[1]), SamplingParams(max_tokens=NEW, temperature=0))
    text = output.outputs[0].text
    stop = text[8:12]  # it may begin and end within a token
    arguments: Any = {"model": "smol", "messages": chat(QUESTIONS[1]), "max_tokens": NEW, "temperature": 0}
    (choice,) = client.chat.completions.create(**arguments, stop=["never", stop]).choices
    chunks = list(client.chat.completions.create(**arguments, stop=stop, stream=True))
    assert choice.message.content == text[: text.index(stop)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "stop" and choice.stop_reason == stop


def test_answers_validate_under_200_random_schemas(urls: dict[str, Url], counts: Callable[[str], None]) -> None:
    schemas = random_schemas(200)

    async def ask() -> list[Any]:
        async with AsyncExitStack() as opened:
            clients = [
                await opened.enter_async_context(AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600))
                for url in urls.values()
            ]

            def answer(index: int) -> Any:
                schema = schemas[index]
                fields: dict[str, Any] = {
                    "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
                }
                if index % 4:
                    fields = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
                return clients[index % len(clients)].chat.completions.create(
                    model="smol", messages=chat("Answer."), max_tokens=32, temperature=0, extra_body=fields
                )

            return await asyncio.gather(*map(answer, range(len(schemas))))

    stopped = 0
    for schema, answer in zip(schemas, asyncio.run(ask()), strict=True):
        if answer.choices[0].finish_reason == "stop":
            stopped += 1
            content = json.loads(answer.choices[0].message.content)
            jsonschema.Draft202012Validator(schema, format_checker=CHECKED).validate(content)
    counts(f"{stopped} of 200 answers in JSON were whole after 32 tokens, and each fits its schema")
    assert stopped > 60


def test_errors_name_the_field(client: OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], message: str, **fields: Any) -> Any:
        arguments: dict[str, Any] = {"model": "smol", "messages": chat("Hi"), "max_tokens": 1}
        with pytest.raises(kind, match=message) as caught:
            client.chat.completions.create(**arguments | fields)
        return caught.value.body

    assert refused(openai.BadRequestError, "temperature=-1", temperature=-1)["param"] == "temperature"
    assert refused(openai.NotFoundError, "other", model="other")["code"] == "model_not_found"
    refused(openai.BadRequestError, "colour is no field", extra_body={"colour": 1})
    refused(openai.BadRequestError, "256", messages=chat("word " * 300))
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}
    refused(openai.BadRequestError, "llguidance", response_format=form)


def test_lm_eval_scores_as_on_transformers_model(
    urls: dict[str, Url], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    check_scores(urls["te"], "smol", checkpoints["hf"], tmp_path)
