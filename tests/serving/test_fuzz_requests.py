"""Random requests against the whole server: none is answered with a 500, crashes a process, or stays."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing import ROUNDS, damaged
from llama_te_infer import Engine

STATUSES = {200, 400, 404, 405, 408, 413, 415, 429, 503}
FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [1, 2]},
}
EXTREMES: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**12, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *("", "\0", "\ud800", "\ufeff", "a" * 5000, "😀" * 300, "<|end|>", None, True, False, [], {}, [[]], [{}], [""]),
    *([0] * 600, ["a"] * 100, [[1]] * 100, [-1], [258, 259], [10**30], {"1": 1e308}, {"-1": 1}, {str(10**25): 1}),
]
VALUES = st.recursive(
    st.sampled_from(EXTREMES) | st.integers() | st.floats() | st.text(max_size=20) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def url(make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as users run it; it must be well at the end."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    engine = make_engine()
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    options = ["--port=0", "--served-model-name=tiny", "--max-batch-size=4", "--page-size=8", "--max-model-len=64"]
    with (folder / "errors").open("w+") as errors:
        running = subprocess.Popen(
            [sys.executable, "-m", "llama_te_infer.serve", str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert running.stdout is not None
            address = running.stdout.readline().partition(" at ")[2].partition(",")[0]
            yield address
            assert httpx.get(f"{address}/ready").status_code == 200 and running.poll() is None
        finally:
            running.kill()
            running.communicate()
        errors.seek(0)
        assert "Traceback" not in (text := errors.read()), text[-5000:]


@pytest.fixture(scope="module")
def fields(url: str) -> dict[str, list[str]]:
    """The names of each endpoint's fields."""
    schema = httpx.get(f"{url}/openapi.json").json()
    names = {}
    for path in VALID:
        (content,) = schema["paths"][path]["post"]["requestBody"]["content"].values()
        component = schema["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        names[path] = [name for name in component["properties"] if name != "metadata"]
    return names


def check(answer: httpx.Response) -> None:
    assert answer.status_code in STATUSES, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 2000
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
    else:
        answer.json()


def serialized(body: dict[str, Any], is_ascii: bool) -> bytes:
    return json.dumps(body, ensure_ascii=is_ascii).encode(errors="surrogatepass")


@pytest.mark.fuzz
@pytest.mark.parametrize("path", VALID)
def test_wrong_values(url: str, fields: dict[str, list[str]], path: str) -> None:
    client = httpx.Client(headers={"Content-Type": "application/json"}, timeout=60)

    @settings(max_examples=100 * ROUNDS, **FUZZ)
    @given(
        changes=st.dictionaries(st.sampled_from(fields[path]) | st.text(max_size=5), VALUES, max_size=3),
        is_ascii=st.booleans(),
    )
    def ask(changes: dict[str, Any], is_ascii: bool) -> None:
        check(client.post(f"{url}{path}", content=serialized(VALID[path] | changes, is_ascii)))

    with client:
        for name in fields[path]:
            for value in EXTREMES if ROUNDS > 1 else random.Random(name).sample(EXTREMES, 4):
                check(client.post(f"{url}{path}", content=serialized(VALID[path] | {name: value}, True)))
        ask()


@pytest.mark.fuzz
@pytest.mark.parametrize("path", VALID)
def test_damaged_bodies(url: str, path: str) -> None:
    seed = serialized(VALID[path], True)
    with httpx.Client(headers={"Content-Type": "application/json"}, timeout=60) as client:
        for number in range(50 * ROUNDS):
            content = damaged(seed, random.Random(number))
            check(client.post(f"{url}{path}", content=content))
