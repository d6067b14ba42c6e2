"""The server's page in a Chromium: `CHROMIUM`, or the one on the path, or Playwright's own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from serving.conftest import RunningServer

# Chromium's own line about an answer with an error status. Pages cannot prevent it.
STATUS_LINE = "Failed to load resource: the server responded with a status of"

# A busy machine needs more than Playwright's five seconds.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def console() -> list[str]:
    """Errors and warnings in the console: scripts that failed, and what the Content-Security-Policy has refused."""
    return []


@pytest.fixture
def open_page(browser: Browser, console: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens a server's page in a browser without memory; at the end the console is empty."""
    contexts = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(STATUS_LINE):
            console.append(message.text)

    def open_page(server: RunningServer, **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert console == []


@pytest.fixture
def tab(open_page: Callable[..., Page], server: RunningServer) -> Page:
    """The page of the server with the tiny model."""
    return open_page(server)


def settings(page: Page, **values: object) -> None:
    """Fill in fields of the settings."""
    for name, value in values.items():
        page.locator(f"#setting-{name}").fill(str(value))


def send(page: Page, text: str) -> None:
    """Send a message, and wait until the answer is complete."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Send", exact=True).wait_for()


@contextmanager
def requests_of(page: Page) -> Iterator[list[dict[str, Any]]]:
    """Collect the bodies of the page's requests."""
    bodies: list[dict[str, Any]] = []

    def note(request: Any) -> None:
        if request.method == "POST":
            bodies.append(request.post_data_json)

    page.on("request", note)
    yield bodies
    page.remove_listener("request", note)


def answer_with(page: Page, *texts: str, after: str = "data: [DONE]\n\n") -> None:
    """Let chats get these texts, chunk by chunk, instead of what the model writes."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + after

    def fulfill(route: Route) -> None:
        route.fulfill(body=body, headers={"Content-Type": "text/event-stream"})

    page.route("**/v1/chat/completions", fulfill)
