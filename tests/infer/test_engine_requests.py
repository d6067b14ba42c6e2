"""The forms that prompts and parameters take, chats, streams, and the one thread that uses an engine."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

from byte_tokenizers import chat_tokenizer
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import Engine, SamplingParams
from llama_te_infer.engine.outputs import Completion
from llama_te_infer.engine.tokenization import tokens_of_bad_words

NEW = 6
GREEDY = SamplingParams(max_tokens=NEW, temperature=0)
CHAT = [{"role": "user", "content": "abc"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}{% if shout %}!{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer(TEMPLATE)


@pytest.fixture
def hf(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_llama(vocab_size=259, initializer_range=0.3, num_hidden_layers=1, eos_token_id=None)


@pytest.fixture
def model(hf: PreTrainedModel) -> PreTrainedModel:
    return convert_llama_hf_to_te(hf)


@pytest.fixture
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(model, tokenizer, max_batch_size=4, page_size=8)


def prompts_of(engine: Engine, *arguments: Any, **options: Any) -> list[list[int]]:
    return [output.prompt_token_ids for output in engine.generate(*arguments, **options)]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_prompt(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    one, two = tokenizer("abc")["input_ids"], tokenizer("defgh")["input_ids"]
    assert one[0] == 256 and len(one) == 4
    batch = tokenizer(["abc", "defgh"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, -1] == 258 and isinstance(batch, BatchEncoding)
    templated = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
    chat = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))["input_ids"][1:]
    for prompts, expected in (
        ("abc", [one]),
        (one, [one]),
        (tuple(one), [one]),
        (torch.tensor(one), [one]),
        (torch.tensor([one]), [one]),
        (np.array(one), [one]),
        (["abc", two, np.array(two), tokenizer("abc")], [one, two, two, one]),
        (tokenizer("abc"), [one]),
        (tokenizer("abc", return_tensors="pt"), [one]),
        (batch, [one, two]),
        (dict(batch), [one, two]),
        (tokenizer(["abc", "defgh"]), [one, two]),
        (templated, [chat]),
        (tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_tensors="pt"), [chat]),
        (tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True), [chat]),
        ((text for text in ["abc", "defgh"]), [one, two]),
        ([], []),
    ):
        assert prompts_of(engine, prompts, GREEDY) == expected
    assert {event.request_id for event in engine.stream(batch, GREEDY)} != {0}
    assert engine.submit(tokenizer("abc"), GREEDY) > 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (3, "prompts=3 is no prompt: give a text, a list of token ids, or the output of a tokenizer or of apply_chat"),
        (None, "prompts=None is no prompt"),
        ([3.0, 4.5], r"prompts\[0\]=3.0 is no prompt"),
        ([[3.5]], r"prompts\[0\]=\[3.5\] is no prompt"),
        ([True], r"prompts\[0\]=True is no prompt"),
        ([["abc", "d"]], r"prompts\[0\]=\['abc', 'd'\] is no prompt"),
        (b"abc", r"prompts\[0\]|prompts=b'abc'"),
        (CHAT, r"prompts\[0\] has chat messages: pass them to chat"),
        ([CHAT], r"prompts\[0\] has chat messages: pass them to chat"),
        ({"text": "abc"}, r"prompts={'text': 'abc'} is no prompt"),
        (
            torch.tensor([[3, 4], [5, 0]]),
            "prompts is a tensor or an array of 2 rows, in which padding looks",
        ),
        (torch.tensor([3.0]), r"prompts=tensor\(\[3.\]\) is no prompt"),
        (torch.tensor([True]), r"prompts=tensor\(\[True\]\) is no prompt"),
        (np.array(["5"]), r"prompts=array\(\['5'\].* is no prompt"),
        ([np.float32(3)], r"prompts\[0\]=.* is no prompt"),
        ([[1, 1.9]], r"prompts\[0\]=\[1, 1.9\] is no prompt"),
        ([[1, True]], r"prompts\[0\]=\[1, True\] is no prompt"),
        ({"input_ids": [1, 1.9]}, "prompts=.* is no prompt"),
        ({"input_ids": [1, "5"]}, "prompts=.* is no prompt"),
        ({"input_ids": torch.tensor([1.0])}, "prompts=.* is no prompt"),
        ({"input_ids": 5}, "prompts=.* is no prompt"),
        ({"input_ids": "5"}, "prompts=.* is no prompt"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, r"prompts has the attention_mask \[1\]: give 1 for each token"),
        ({"input_ids": [1, 2], "attention_mask": ["0", "1"]}, "prompts has the attention_mask"),
        ({"input_ids": [1, 2], "attention_mask": 1}, "prompts=.* is no prompt"),
        ([[-1]], "prompt has the tokens -1 to -1, but the model knows 0 to 258"),
        ([[259]], "prompt has the tokens 259 to 259"),
        ([[2**80]], "prompt has the tokens"),
    ],
)
def test_what_is_no_prompt(engine: Engine, prompts: Any, message: str) -> None:
    if prompts == b"abc":
        prompts, message = [b"abc"], r"prompts\[0\]=b'abc' is no prompt"
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, GREEDY)
    assert not engine.has_unfinished


def test_what_is_no_single_prompt(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="prompt holds 2 prompts: give one, or pass all of them to generate"):
        engine.submit(tokenizer(["a", "b"]), GREEDY)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 3}, r"params={'max_tokens': 3} is a dict: pass SamplingParams\(\*\*params\)"),
        ([{"max_tokens": 3}], "is a dict: pass SamplingParams"),
        (3, "params is a int: pass a SamplingParams, or a list with one for each prompt"),
    ],
)
def test_what_is_no_parameters(engine: Engine, params: Any, message: str) -> None:
    for call in (engine.generate, engine.stream, engine.chat):
        with pytest.raises(ValueError, match=message):
            call(CHAT if call == engine.chat else ["abc"], params)
    if not isinstance(params, list):
        with pytest.raises(ValueError, match=message):
            engine.submit("abc", params)


def test_a_text_that_begins_with_bos_gets_no_second_one(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = tokenizer("abc")["input_ids"]
    assert tokenizer("<|bos|>abc")["input_ids"] == [256, *plain], "the tokenizer itself writes two"
    texts = ["abc", "<|bos|>abc", "<|bos|><|bos|>abc", "<|bos|>"]
    assert prompts_of(engine, texts, GREEDY) == [plain, plain, [256, *plain], [256]]
    tokens = [256, 256, 3]
    assert prompts_of(engine, [tokens], GREEDY) == [tokens], "token ids are taken as they are"


def test_a_prompt_is_the_engines_own(engine: Engine) -> None:
    """The caller may change its list while the request runs."""
    for prompt in ([3, 4, 5], {"input_ids": [[3, 4, 5]]}):
        request = engine.submit(prompt, GREEDY)
        (prompt["input_ids"][0] if isinstance(prompt, dict) else prompt).append(9)
        outputs = []
        while engine.has_unfinished:
            outputs += engine.step()
        assert [output.prompt_token_ids for output in outputs if output.request_id == request] == [[3, 4, 5]]


# --- chats ------------------------------------------------------------------------------------------------------------


def test_chats(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    output = engine.chat(CHAT, GREEDY)[0]
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert output.prompt_token_ids == ids and ids[:2] != [256, 256]
    assert tokenizer.decode(ids) == "<|bos|>user:abc<|end|>assistant:"
    assert output.outputs[0].token_ids == engine.generate(ids, GREEDY)[0].outputs[0].token_ids
    other = [{"role": "system", "content": "x"}, *CHAT]
    two = engine.chat([CHAT, other], [GREEDY, SamplingParams(max_tokens=2, temperature=0)])
    assert two[0].outputs == output.outputs
    assert len(two[1].outputs[0].token_ids) == 2
    options = {"add_generation_prompt": False, "tools": [{"name": "f"}], "chat_template_kwargs": {"shout": True}}
    options = engine.chat(CHAT, GREEDY, **options)[0]
    assert tokenizer.decode(options.prompt_token_ids) == "<|bos|>user:abc<|end|>1!"
    written = [*CHAT, {"role": "assistant", "content": "Well"}]
    going_on = engine.chat(written, GREEDY, add_generation_prompt=False, continue_final_message=True)[0]
    assert tokenizer.decode(going_on.prompt_token_ids) == "<|bos|>user:abc<|end|>assistant:Well"
    assert tokenizer.decode(engine.chat(CHAT, GREEDY, chat_template="hey")[0].prompt_token_ids) == "hey"


@pytest.mark.parametrize("messages", ["Hello", [], ["Hello"], [{"content": "x"}], {"role": "user"}, [CHAT, "x"], [[3]]])
def test_what_is_no_conversation(engine: Engine, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"is no conversation: give a list of messages such as \[{\"role\""):
        engine.chat(messages, GREEDY)


def test_chats_need_a_tokenizer(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="messages are texts, but the engine has no tokenizer"):
        Engine(model).chat(CHAT, GREEDY)


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_as_many_tokens_as_fit(model: PreTrainedModel) -> None:
    endless = SamplingParams(max_tokens=None, temperature=0)
    engine = Engine(model, max_batch_size=3, max_sequence_length=40, page_size=4)
    assert len(engine.generate([[3] * 30, [3]], endless)[0].outputs[0].token_ids) == 10
    assert len(engine.generate([[3] * 39], endless)[0].outputs[0].token_ids) == 1
    few_pages = Engine(model, max_batch_size=3, max_sequence_length=40, page_size=4, total_num_pages=5)
    for prompt, options in (
        ([3] * 5, {}),
        ([3] * 8, {"n": 3, "temperature": 1.0, "seed": 1}),
        ([3] * 5, {"num_beams": 3, "n": 2}),
    ):
        params = SamplingParams(**{"max_tokens": None, "temperature": 0, **options})
        written = len(few_pages.generate([prompt], params)[0].outputs[-1].token_ids)
        most = SamplingParams(**{"temperature": 0, **options, "max_tokens": written})
        assert len(few_pages.generate([prompt], most)[0].outputs[-1].token_ids) == written
        with pytest.raises(ValueError, match="but total_num_pages=5"):
            few_pages.submit(prompt, SamplingParams(**{"temperature": 0, **options, "max_tokens": written + 1}))
    with pytest.raises(ValueError, match=r"prompt has 40 tokens, but max_sequence_length=40, so no token can follow"):
        engine.submit([3] * 40, endless)
    with pytest.raises(ValueError, match=r"prompt has 70 tokens, but max_sequence_length=64.*the model's limit"):
        Engine(model).submit([3] * 70, SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="prompt has 30 tokens and min_tokens=11, but max_sequence_length=40"):
        engine.submit([3] * 30, SamplingParams(max_tokens=None, min_tokens=11))


# --- stop strings that are special tokens -----------------------------------------------------------------------------


def ended(completion: Completion) -> tuple[Any, ...]:
    return completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason


def test_a_stop_string_that_is_a_special_token(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model writes <|end|> because a bias makes it; the text does not show the token."""
    at_end = {"max_tokens": 5, "temperature": 0, "stop": ["nowhere", "<|end|>"]}
    for fields in ({"num_beams": 1}, {"num_beams": 2}):
        usual = engine.generate("abc", SamplingParams(max_tokens=5, temperature=0, **fields))[0].outputs[0]
        stopping = usual.token_ids[2]
        assert stopping not in usual.token_ids[:2]
        # The token that comes third stands for <|end|>.
        tokenizer_of = engine._special_tokens
        engine._special_tokens = {**tokenizer_of, "<|end|>": stopping}
        before, whole = tokenizer.decode(usual.token_ids[:2]), usual.token_ids[:3]
        plain = engine.generate("abc", SamplingParams(**at_end, **fields))[0].outputs[0]
        assert ended(plain) == (whole, before, "stop", "<|end|>")
        shown = SamplingParams(**at_end, **fields, include_stop_str_in_output=True)
        assert ended(engine.generate("abc", shown)[0].outputs[0]) == (whole, before + "<|end|>", "stop", "<|end|>")
        least = SamplingParams(**at_end, **fields, min_tokens=4)
        assert len(engine.generate("abc", least)[0].outputs[0].token_ids) >= 4
        engine._special_tokens = tokenizer_of


def test_special_tokens_of_a_real_tokenizer(engine: Engine) -> None:
    assert engine._special_tokens == {"<|bos|>": 256, "<|end|>": 257, "<|pad|>": 258}
    with pytest.raises(ValueError, match=r"stop='<\|end\|>\\n' has the special token '<\|end\|>', which the text does"):
        engine.submit("abc", SamplingParams(max_tokens=3, stop="<|end|>\n"))
    shown = SamplingParams(max_tokens=3, stop="<|end|>\n", skip_special_tokens=False)
    assert engine.cancel(engine.submit("abc", shown))


def test_special_tokens_in_a_text(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    """`skip_special_tokens=False` shows them, and the text of an ending token on request."""
    only_end = {"max_tokens": 2, "temperature": 0, "allowed_token_ids": [257]}
    texts = [
        engine.generate("abc", SamplingParams(**only_end, **fields))[0].outputs[0].text
        for fields in (
            {},
            {"skip_special_tokens": False},
            {"skip_special_tokens": False, "stop_token_ids": [257]},
            {"skip_special_tokens": False, "stop_token_ids": [257], "include_stop_str_in_output": True},
            {"stop": "<|end|>"},
            {"stop": "<|end|>", "include_stop_str_in_output": True},
            {"stop": "d|><|e", "skip_special_tokens": False},
        )
    ]
    assert texts == ["", "<|end|><|end|>", "", "<|end|>", "", "<|end|>", "<|en"]


def test_parameters_that_forbid_every_token(engine: Engine) -> None:
    for fields in (
        {"allowed_token_ids": [65], "bad_words": "b"},
        {"allowed_token_ids": [257], "stop": "<|end|>", "min_tokens": 1},
    ):
        with pytest.raises(ValueError, match="leaves no token that min_tokens=.* and bad_words=.* do not forbid"):
            engine.submit("abc", SamplingParams(max_tokens=3, **fields))
    for fields, name in (
        ({"allowed_token_ids": [300]}, "allowed_token_ids"),
        ({"logit_bias": {300: 1}}, "logit_bias"),
    ):
        with pytest.raises(ValueError, match=f"{name} has the tokens 300 to 300, but the model knows 0 to 258"):
            engine.submit("abc", SamplingParams(max_tokens=3, **fields))
    assert not engine.has_unfinished


# --- bad words --------------------------------------------------------------------------------------------------------


def test_the_tokens_of_bad_words(tokenizer: PreTrainedTokenizerFast) -> None:
    class Words:
        """Knows "red", " red", "car" and the letters."""

        words = ("red", " red", "car", *" abcder")

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            ids = []
            while text:
                word = next(word for word in self.words if text.startswith(word))
                ids.append(self.words.index(word))
                text = text[len(word) :]
            return {"input_ids": ids}

    tokens = tokens_of_bad_words([" red", "car", "redcar"], Words())
    # Behind a space "car" is the space and the word: the word alone covers it.
    assert tokens == [[0], [1], [2], [0, 2], [1, 2]]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_dropped_before_its_first_event(engine: Engine) -> None:
    stream = engine.stream(["abc", "def"], GREEDY)
    assert engine.has_unfinished
    del stream
    gc.collect()
    assert not engine.has_unfinished
    assert engine.step() == [] and not engine._requests
    stream = engine.stream("abc", GREEDY)
    stream.close()
    assert not engine._requests and list(stream) == []
    for _ in engine.stream("abc", GREEDY):
        break
    assert not engine.has_unfinished
    kept = engine.submit("abc", GREEDY)
    engine.stream("abc", GREEDY)  # dropped at once
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output.request_id for output in outputs] == [kept]


# --- threads ----------------------------------------------------------------------------------------------------------


def in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in another thread; return its result or its exception."""
    results: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            results.put(function())
        except Exception as error:
            results.put(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    return results.get()


def test_a_second_thread_is_refused_while_requests_run(engine: Engine) -> None:
    running = engine.submit("abc", GREEDY)
    for call in (
        lambda: engine.submit("abc", GREEDY),
        engine.step,
        lambda: engine.generate("abc", GREEDY),
        lambda: engine.chat(CHAT, GREEDY),
        lambda: engine.stream("abc", GREEDY),
        lambda: engine.cancel(running),
        engine.reset_prefix_cache,
    ):
        error = in_thread(call)
        assert isinstance(error, RuntimeError)
        assert "thread 'other' has called an engine that thread 'MainThread' uses: use an engine from one" in str(error)
    assert in_thread(lambda: engine.has_unfinished) is True
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [NEW]


def test_an_idle_engine_changes_its_thread(engine: Engine) -> None:
    expected = engine.generate("abc", GREEDY)[0].outputs
    assert in_thread(lambda: engine.generate("abc", GREEDY))[0].outputs == expected
    assert in_thread(lambda: engine.submit("abc", GREEDY)) > 0
    # That thread has ended: nobody else could finish its request.
    assert len(engine.generate("abc", GREEDY)) == 1


def test_a_callback_in_another_thread_is_refused(engine: Engine) -> None:
    errors: list[Any] = []
    engine.submit("abc", GREEDY, lambda event: errors.append(in_thread(lambda: engine.submit("abc", GREEDY))))
    while engine.has_unfinished:
        engine.step()
    assert len(errors) == NEW and all(isinstance(error, RuntimeError) for error in errors)


# --- beams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "n": 2, "length_penalty": -1.0},
        {"num_beams": 4, "n": 3, "early_stopping": True},
        {"num_beams": 3, "n": 3, "early_stopping": "never", "length_penalty": 0.0},
    ],
    ids=str,
)
def test_beams_end_at_stop_strings_as_those_of_generate(
    hf: PreTrainedModel, engine: Engine, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    """Stop strings of one and of two tokens, which end some candidates of many steps."""
    new, prompts = 12, [tokenizer(text)["input_ids"] for text in ("abc", "What?", "x")]
    usual = engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True, **options))
    best = [bytes_of(tokenizer, output.outputs[0].token_ids) for output in usual]
    stop = [next(piece for piece in pieces[2:] if piece.isascii() and piece.isprintable()) for pieces in best]
    pairs = [a + b for pieces in best for a, b in itertools.pairwise(pieces[1:]) if (a + b).isascii() and a and b]
    stop += pairs[:3]
    assert len(stop) > 3
    params = SamplingParams(max_tokens=new, stop=stop, **options)
    outputs = engine.generate(prompts, params)
    ends = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        theirs = {{"n": "num_return_sequences"}.get(name, name): value for name, value in options.items()}
        expected = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=258,
            stop_strings=stop,
            tokenizer=tokenizer,
            return_dict_in_generate=True,
            output_scores=True,
            **theirs,
        )
        for beam, ids, score in zip(output.outputs, expected.sequences, expected.sequences_scores, strict=True):
            written = ids[len(prompt) :].tolist()
            assert beam.token_ids == written[: len(beam.token_ids)]
            assert set(written[len(beam.token_ids) :]) <= {-1}  # the filling of a search without EOS
            assert beam.score == pytest.approx(score.item(), rel=1e-5)
            text = tokenizer.decode(beam.token_ids, skip_special_tokens=True)
            if beam.finish_reason == "stop":
                ends += 1
                assert beam.stop_reason in stop and text.startswith(beam.text + str(beam.stop_reason))
            else:
                assert len(beam.token_ids) == new and not any(string in text for string in stop)
    assert ends, "no beam ended at a stop string"


def bytes_of(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    return [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]


def test_log_probabilities_after_the_parameters(hf: PreTrainedModel, engine: Engine) -> None:
    prompt = [256, 70, 71, 72]
    params = SamplingParams(max_tokens=6, temperature=0.7, top_k=3, seed=5, logprobs=5, logprobs_mode="processed")
    both = [params, dataclasses.replace(params, logprobs_mode="raw")]
    after, model_own = (output.outputs[0] for output in engine.generate([prompt] * 2, both))
    assert after.token_ids == model_own.token_ids
    with torch.no_grad():
        logits_SV = hf(torch.tensor([prompt + after.token_ids])).logits[0, len(prompt) - 1 : -1].double()
    assert after.logprobs is not None and model_own.logprobs is not None
    for logits_V, token, processed, raw in zip(
        logits_SV, after.token_ids, after.logprobs, model_own.logprobs, strict=True
    ):
        assert raw.logprob == pytest.approx(logits_V.log_softmax(-1)[token].item(), abs=1e-4)
        assert len(raw.top) == 5
        best = (logits_V / 0.7).topk(3)
        assert [token for token, _ in processed.top] == best.indices.tolist()
        expected = best.values.log_softmax(-1)
        assert [logprob for _, logprob in processed.top] == pytest.approx(expected.tolist(), abs=1e-4)
        assert processed.logprob == pytest.approx(dict(processed.top)[token], abs=1e-6)


def test_log_probabilities_of_beams(hf: PreTrainedModel, engine: Engine) -> None:
    prompt = [256, 70, 71, 72]
    params = [
        SamplingParams(max_tokens=7, num_beams=3, n=3, logprobs=4, stop_token_ids=[5, 9]),
        SamplingParams(max_tokens=5, num_beams=3, n=2, logprobs=0),
        SamplingParams(max_tokens=7, num_beams=3, n=3, stop_token_ids=[5, 9]),
    ]
    with_top, chosen_alone, without = engine.generate([prompt] * 3, params)
    assert [beam.token_ids for beam in with_top.outputs] == [beam.token_ids for beam in without.outputs]
    assert all(beam.logprobs is None for beam in without.outputs)
    for beam in [*with_top.outputs, *chosen_alone.outputs]:
        with torch.no_grad():
            logits_SV = hf(torch.tensor([prompt + beam.token_ids])).logits[0, len(prompt) - 1 : -1]
        logprob_SV = logits_SV.double().log_softmax(-1)
        assert beam.logprobs is not None and len(beam.logprobs) == len(beam.token_ids)
        for logprob_V, token, found in zip(logprob_SV, beam.token_ids, beam.logprobs, strict=True):
            assert found.logprob == pytest.approx(logprob_V[token].item(), abs=1e-4)
            best = logprob_V.topk(len(found.top))
            assert [token for token, _ in found.top] == best.indices.tolist()
            assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert sum(found.logprob for found in beam.logprobs) / len(beam.token_ids) == pytest.approx(
            beam.score, abs=1e-4
        )
    assert {len(found.top) for found in with_top.outputs[0].logprobs or ()} == {4}
    assert {len(found.top) for found in chosen_alone.outputs[0].logprobs or ()} == {0}
