"""The page at `/` as someone uses it, in a real browser."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from llama_te_infer import Engine
from serving.conftest import RunningServer, serving
from serving.page.conftest import answer_with, requests_of, send, settings
from serving.test_server import until

WRITES_ON = '{"ignore_eos": true}'  # so that only the limit ends a text of the tiny model


@pytest.fixture(scope="module")
def slow_server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    """A server whose texts take seconds, so that a test can look at one that is being written."""
    engine = make_engine()
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.02)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]
    with serving(engine) as running:
        yield running


def texts(page: Page) -> list[str]:
    return page.locator("#messages .text").all_inner_texts()


def test_a_chat(tab: Page) -> None:
    expect(tab.get_by_label("Model", exact=True)).to_have_text("tiny · context 512")
    expect(tab).to_have_title("tiny – llama-te")
    settings(tab, system="Be brief.", max_tokens=8, temperature=0, more=WRITES_ON)
    with requests_of(tab) as bodies:
        send(tab, "Hello")
        send(tab, "And now?")
    first, second = bodies
    system, hello = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    assert first["messages"] == [system, hello]
    assert first["model"] == "tiny" and first["stream"]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"]
    expect(tab.locator(".note").first).to_contain_text("limit reached · 8 tokens")
    # A tab that is loaded again has the conversation.
    before = texts(tab)
    tab.reload()
    assert texts(tab) == before and len(before) == 4


def test_an_answer_appears_while_it_is_written_and_stops(
    open_page: Callable[..., Page], slow_server: RunningServer
) -> None:
    page = open_page(slow_server)
    settings(page, temperature=0, more=WRITES_ON)
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Enter")
        answer = page.locator(".answers .text").last
        expect(answer).not_to_be_empty()
        assert slow_server.engine.num_requests == 1
        assert page.locator(".answer").last.get_attribute("aria-busy") == "true"
        begun = answer.inner_text()
        stop()
        expect(page.locator(".note").last).to_have_text("stopped")
        until(lambda: slow_server.engine.num_requests == 0)
        assert len(begun) <= len(answer.inner_text()) < 400
        expect(page.locator("#status")).to_have_text("The answer is stopped.")


def test_settings_reach_the_request(tab: Page) -> None:
    values: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 7, "max_tokens": 5}
    settings(tab, **values, n=2, logprobs=3, stop="END\n\\n\\n", more='{"min_tokens": 2}')
    with requests_of(tab) as bodies:
        send(tab, "Hello")
    (body,) = bodies
    expected = {**values, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["END", "\n\n"], "min_tokens": 2}
    assert {name: body[name] for name in expected} == expected
    assert tab.locator(".error").count() == 0
    expect(tab.locator(".chooser")).to_contain_text("1 of 2")


def test_empty_settings_are_the_servers_defaults(tab: Page) -> None:
    answer_with(tab, "Hello")
    with requests_of(tab) as bodies:
        send(tab, "Hello")
    assert bodies[0].keys() == {"model", "messages", "stream", "stream_options"}


def test_beam_search(tab: Page, server: RunningServer) -> None:
    settings(tab, temperature=0.7, top_k=5, beams=3, n=2, max_tokens=6)
    assert tab.locator(".field.unused").count() == 5
    send(tab, "Hello")
    found = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        n=2,
        max_tokens=6,
        extra_body={"use_beam_search": True, "best_of": 3},
    )
    shown = []
    for _ in range(2):
        shown.append(tab.evaluate("JSON.parse(sessionStorage['llama-te.conversation'])[1].content"))
        if not shown[1:]:
            tab.get_by_label("The next answer").click()
    assert shown == [choice.message.content for choice in found.choices]


def test_a_setting_out_of_range(tab: Page) -> None:
    settings(tab, top_p=3)
    with requests_of(tab) as bodies:
        send(tab, "Hello")
        expect(tab.get_by_role("alert")).to_have_text("Top p is 3: give a number from 0.01 to 1.")
        settings(tab, top_p="", more="{")
        tab.get_by_role("button", name="Regenerate").click()
        expect(tab.get_by_role("alert")).to_contain_text("Further fields are no JSON object")
    assert bodies == []
    tab.get_by_role("button", name="Reset").click()
    assert tab.locator("#setting-more").input_value() == ""


def test_logprobs(tab: Page, server: RunningServer) -> None:
    settings(tab, temperature=0, max_tokens=12, logprobs=4, more=WRITES_ON)
    send(tab, "Hello")
    found = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=4,
        extra_body={"ignore_eos": True},
    )
    assert found.choices[0].logprobs and found.choices[0].logprobs.content
    content = found.choices[0].logprobs.content
    tokens = tab.locator(".token")
    assert tokens.count() == len(content) == 12
    colours = tokens.evaluate_all("spans => spans.map((span) => getComputedStyle(span).borderBottomColor)")
    by_doubt = sorted(zip([each.logprob for each in content], colours, strict=True))
    assert by_doubt[0][1] != by_doubt[-1][1]
    tooltip = tab.get_by_role("tooltip")
    expect(tooltip).to_be_hidden()
    tokens.first.focus()
    for each in content:
        expect(tooltip).to_contain_text(f"logprob {each.logprob:.4f}")
        rows = [row.split() for row in tooltip.locator("li").all_inner_texts()]
        assert len(rows) == 4
        share = 100 * math.exp(each.top_logprobs[0].logprob)
        assert float(rows[0][-2]) == pytest.approx(share, abs=0.06)
        tab.keyboard.press("ArrowRight")
    assert tokens.last.get_attribute("aria-describedby") == "tooltip"
    tab.keyboard.press("Escape")
    expect(tooltip).to_be_hidden()
    tokens.first.hover()
    expect(tooltip).to_be_visible()
    tab.get_by_role("button", name="Tokens").click()
    expect(tokens.first).to_be_hidden()


ATTACK = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


def test_html_stays_text(tab: Page) -> None:
    markdown = f"{ATTACK}\n\n- {ATTACK}\n\n# {ATTACK}\n\n|a|b|\n|-|-|\n|{ATTACK}|b|\n\n```{ATTACK}\n{ATTACK}\n```\n\n"
    links = "[link](javascript:alert(1)) ![image](https://example.com/x.png) <a href='javascript:alert(1)'>b</a>"
    answer_with(tab, markdown, links)
    send(tab, ATTACK)
    messages = tab.locator("#messages")
    assert messages.locator("img, script, a[href^=javascript]").count() == 0
    assert tab.locator(".question .text").inner_text() == ATTACK
    assert tab.locator(".answers .text").inner_text().count("onerror") >= 4
    assert "javascript:alert(1)" in tab.locator(".answers .text").inner_text()
    tab.get_by_role("button", name="Edit").first.click()
    assert tab.get_by_label("Text of the message").input_value() == ATTACK
    assert tab.title() == "tiny – llama-te"


def test_html_in_tokens_and_errors_stays_text(tab: Page) -> None:
    token = {"token": ATTACK, "logprob": -1, "bytes": None, "top_logprobs": [{"token": ATTACK, "logprob": -1}]}
    choice = {"index": 0, "delta": {"content": ATTACK}, "logprobs": {"content": [token]}}
    error = {"error": {"message": ATTACK}}
    events = "".join(f"data: {json.dumps(each)}\n\n" for each in ({"choices": [choice]}, error))
    answer_with(tab, after=events)
    settings(tab, logprobs=1)
    send(tab, "Hello")
    tab.locator(".token").hover()
    expect(tab.get_by_role("tooltip")).to_contain_text("onerror")
    expect(tab.get_by_role("alert")).to_have_text(ATTACK)
    assert tab.locator("main img, main script, #tooltip img").count() == 0
    assert tab.title() == "tiny – llama-te"


def test_the_policy_stops_injected_code(tab: Page, console: list[str]) -> None:
    """The second line of defence: even code of the page cannot turn a string into HTML."""
    assert "TrustedHTML" in tab.evaluate("try { document.body.innerHTML = '<b>b</b>' } catch (error) { `${error}` }")
    assert "TrustedHTML" in console.pop()


def test_errors_are_told_in_words(tab: Page) -> None:
    settings(tab, more='{"nonsense": 1}')
    send(tab, "Hello")
    expect(tab.get_by_role("alert")).to_have_text("nonsense is no field of this request: leave it out.")
    # The conversation goes on.
    settings(tab, more="", max_tokens=2)
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.locator(".note").last).to_contain_text("tokens")
    expect(tab.get_by_role("alert")).to_have_count(0)


def test_a_stream_that_fails(tab: Page) -> None:
    answer_with(tab, "The answer is", after='data: {"error": {"message": "The engine is out of memory."}}\n\n')
    send(tab, "Hello")
    expect(tab.get_by_role("alert")).to_have_text("The engine is out of memory.")
    assert texts(tab)[-1] == "The answer is"
    answer_with(tab, "The answer is", after="")
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.get_by_role("alert")).to_contain_text("The connection broke")
    tab.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<html>Bad gateway"))
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.get_by_role("alert")).to_contain_text("status 502")
    tab.route("**/v1/chat/completions", lambda route: route.abort())


def test_a_key(open_page: Callable[..., Page], make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), api_keys=("right",)) as server:
        page = open_page(server)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("This server answers requests that have a key.")
        for key in ("wrong", "right"):
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
            if key == "wrong":
                expect(dialog).to_contain_text("The server refuses this key.")
        expect(dialog).to_be_hidden()
        expect(page.get_by_label("Model", exact=True)).to_have_text("tiny · context 512")
        settings(page, max_tokens=2)
        send(page, "Hello")
        expect(page.locator(".note")).to_contain_text("2 tokens")
        assert page.evaluate("sessionStorage['llama-te.key']") == "right"
        assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
        page.get_by_role("button", name="API key").click()
        page.get_by_role("button", name="Forget the key").click()
        expect(dialog).to_contain_text("This server answers requests that have a key.")
        assert page.evaluate("'llama-te.key' in sessionStorage") is False


def test_regenerate_choose_edit_and_clear(tab: Page) -> None:
    settings(tab, max_tokens=8, seed=1, more=WRITES_ON)
    send(tab, "Hello")
    first = texts(tab)[1]
    settings(tab, seed=2)
    tab.get_by_role("button", name="Regenerate").click()
    expect(tab.locator(".chooser")).to_contain_text("2 of 2")
    expect(tab.locator(".note")).to_contain_text("8 tokens")
    second = texts(tab)[1]
    assert second != first
    tab.get_by_label("The answer before").click()
    assert texts(tab)[1] == first
    with requests_of(tab) as bodies:
        tab.get_by_role("button", name="Continue").click()
        expect(tab.locator(".note")).to_contain_text("8 tokens")
    assert bodies[0]["continue_final_message"] and len(texts(tab)[1]) > len(first)

    tab.get_by_role("button", name="Edit").last.click()
    tab.get_by_label("Text of the message").fill("My own words")
    tab.get_by_role("button", name="Save").click()
    assert texts(tab) == ["Hello", "My own words"]

    send(tab, "More")
    tab.locator(".question").first.hover()
    tab.get_by_role("button", name="Edit").first.click()
    tab.get_by_label("Text of the message").fill("Goodbye")
    with requests_of(tab) as bodies:
        tab.keyboard.press("Control+Enter")
        expect(tab.locator(".note")).to_contain_text("8 tokens")
    assert bodies[0]["messages"] == [{"role": "user", "content": "Goodbye"}]
    assert len(texts(tab)) == 2

    tab.get_by_role("button", name="Clear").click()
    assert texts(tab) == []
    expect(tab.get_by_text("Ask the model something.")).to_be_visible()
    expect(tab.get_by_label("Message", exact=True)).to_be_focused()


def test_copy_and_export(open_page: Callable[..., Page], server: RunningServer) -> None:
    page = open_page(server, permissions=["clipboard-read", "clipboard-write"])
    code = "print('one')\nprint('two')"
    answer_with(page, f"**Look**\n\n```python\n{code}\n```")
    settings(page, system="Be brief.", top_k=3)
    send(page, "Hello")
    page.locator(".answers > .actions").get_by_role("button", name="Copy").click()
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == f"**Look**\n\n```python\n{code}\n```"
    page.locator("figure").get_by_role("button").click()
    page.wait_for_function("code => navigator.clipboard.readText().then((text) => text === code)", arg=code)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(download.value.path().read_text())
    assert exported["model"] == "tiny" and exported["settings"] == {"top_k": 3}
    assert [message["role"] for message in exported["messages"]] == ["system", "user", "assistant"]
    assert download.value.suggested_filename == "conversation.json"


def test_the_end_of_an_answer_stays_in_sight(tab: Page) -> None:
    answer_with(tab, *("A paragraph.\n\n" for _ in range(60)), after='data: {"error": {"message": "It broke."}}\n\n')
    send(tab, "Hello")
    expect(tab.get_by_role("alert")).to_be_in_viewport()
    expect(tab.get_by_role("button", name="Regenerate")).to_be_in_viewport()


def test_keys_of_the_keyboard(tab: Page) -> None:
    settings(tab, max_tokens=2)
    message = tab.get_by_label("Message", exact=True)
    message.focus()
    tab.keyboard.type("one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two")
    assert message.input_value() == "one\ntwo"
    tab.keyboard.press("Enter")
    expect(tab.locator(".question .text")).to_have_text("one\ntwo")
    expect(message).to_be_focused()
    expect(message).to_have_value("")
    tab.get_by_role("tab", name="Chat").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_role("tab", name="Completion")).to_be_focused()
    expect(tab.locator("#prompt")).to_be_visible()


def test_completions(tab: Page, server: RunningServer) -> None:
    tab.get_by_role("tab", name="Completion").click()
    settings(tab, temperature=0, max_tokens=6, logprobs=2)
    prompt = tab.locator("#prompt")
    prompt.fill("The sky is")
    with requests_of(tab) as bodies:
        tab.keyboard.press("Control+Enter")
        tab.get_by_role("button", name="Continue").wait_for()
    assert bodies[0]["prompt"] == "The sky is" and bodies[0]["logprobs"] == 2
    found = server.client.completions.create(
        model="tiny", prompt="The sky is", temperature=0, max_tokens=6, logprobs=2
    ).choices[0]
    assert tab.locator(".token").count() == len(found.logprobs.tokens)  # type: ignore[union-attr, arg-type]
    tab.get_by_role("button", name="Add to the prompt").click()
    # A text area has no carriage returns.
    assert prompt.input_value() == f"The sky is{found.text}".replace("\r\n", "\n").replace("\r", "\n")

    prompt.fill("The sky is")
    tab.get_by_role("button", name="Score the prompt").click()
    scored = server.client.completions.create(model="tiny", prompt="The sky is", echo=True, max_tokens=0, logprobs=2)
    logprobs = scored.choices[0].logprobs.token_logprobs  # type: ignore[union-attr]
    total = sum(each for each in logprobs if each is not None)  # type: ignore[union-attr]
    expect(tab.locator(".note")).to_contain_text(f"11 tokens · logprob {total:.3f}")
    tab.locator(".token").first.hover()
    expect(tab.get_by_role("tooltip")).to_contain_text("nothing precedes it")


def test_a_completion_without_a_limit_ends_with_the_text(tab: Page) -> None:
    tab.get_by_role("tab", name="Completion").click()
    settings(tab, more='{"allowed_token_ids": [257]}')
    tab.locator("#prompt").fill("The sky is")
    with requests_of(tab) as bodies:
        tab.get_by_role("button", name="Continue").click()
        tab.get_by_role("button", name="Continue").wait_for()
    assert bodies[0]["max_tokens"] is None
    expect(tab.locator(".note")).to_contain_text("1 token in")
    assert tab.locator(".error").count() == 0


METRICS = """# HELP vllm:num_requests_running Requests
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:generation_tokens_total{engine="0",model_name="tiny"} %d
"""


def test_metrics(open_page: Callable[..., Page], server: RunningServer) -> None:
    page = open_page(server)
    metrics = page.get_by_label("Metrics of the server")
    expect(metrics).to_contain_text("running0waiting0tokens/s")
    tokens = iter(range(0, 10**6, 1000))
    page.route("**/metrics", lambda route: route.fulfill(body=METRICS % next(tokens)))
    page.reload()
    expect(metrics).to_have_text("running3waiting2tokens/s–cache25 %")
    expect(metrics.locator("dd").nth(2)).to_have_text(re.compile(r"[1-9]"))
    page.route("**/metrics", lambda route: route.fulfill(status=404, body="{}"))
    page.reload()
    expect(metrics).to_contain_text("no metrics")


def test_a_phone(open_page: Callable[..., Page], server: RunningServer) -> None:
    page = open_page(server, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= 360 && innerWidth === 360"))

    panel = page.get_by_label("Settings", exact=True).locator("form")
    expect(panel).to_be_hidden()
    page.get_by_role("button", name="Settings").tap()
    expect(panel).to_be_visible()
    settings(page, max_tokens=12, logprobs=3, n=2)
    assert fits()
    page.get_by_role("button", name="Close").tap()
    expect(panel).to_be_hidden()
    long = "a-very-long-word-" * 20
    page.get_by_label("Message", exact=True).fill(long)
    page.get_by_role("button", name="Send", exact=True).tap()
    page.get_by_role("button", name="Send", exact=True).wait_for()
    page.locator(".token").nth(3).tap()
    box = page.get_by_role("tooltip").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    assert fits()
    outside = page.locator("main button:visible, main textarea:visible").evaluate_all(
        "all => all.filter((each) => each.getBoundingClientRect().right > 360).length"
    )
    assert outside == 0
    page.get_by_role("tab", name="Completion").tap()
    assert fits()


def test_every_control_has_a_name(tab: Page) -> None:
    settings(tab, max_tokens=2, logprobs=1)
    send(tab, "Hello")
    nameless = tab.locator("button, input, textarea, select").evaluate_all(
        """all => all.filter((each) => !each.ariaHidden && !each.ariaLabel && !each.textContent.trim()
               && ![...each.labels ?? []].some((label) => label.textContent.trim())).map((each) => each.outerHTML)"""
    )
    assert nameless == []
