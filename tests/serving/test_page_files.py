"""The files of the page at `/`, as the server sends them. `tests/serving/page` looks at them in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest

from llama_te_infer import Engine
from llama_te_infer.serve.page import PATHS
from serving.conftest import RunningServer, serving


def test_the_page_needs_no_key(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), api_keys=("one",)) as server:
        for path in PATHS:
            assert httpx.get(f"{server.url}{path}").status_code == 200
        assert httpx.get(f"{server.url}/page/other.js").status_code == 401


def test_the_page_consists_of_its_files_alone(server: RunningServer) -> None:
    """What a file names is another file or the API, under a relative address: nothing comes from another host."""
    assert {"/", "/page/app.js", "/page/style.css", "/page/icon.svg"} < set(PATHS)
    for path in PATHS:
        text = httpx.get(f"{server.url}{path}").text
        named = re.findall(r'(?:src|href)="([^"]+)"|from "([^"]+)"|url\(([^)]+)\)', text)
        for name in filter(None, (name for names in named for name in names)):
            address = httpx.URL(f"{server.url}{path}").join(name)
            assert address.path in PATHS and str(address).startswith(server.url), f"{path} names {name}"
    assert httpx.get(f"{server.url}/page/..%2F__init__.py").status_code == 404
    assert httpx.get(f"{server.url}/page/index.html").status_code == 404


@pytest.mark.parametrize("path", PATHS)
def test_headers(server: RunningServer, path: str) -> None:
    answer = httpx.get(f"{server.url}{path}")
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}.get(
        path.rpartition(".")[2], "text/html"
    )
    assert answer.headers["Content-Type"].startswith(kind)
    assert httpx.head(f"{server.url}{path}").headers["Content-Length"] == str(len(answer.content))


def test_the_browser_keeps_files_until_they_change(server: RunningServer) -> None:
    url = f"{server.url}/page/app.js"
    first = httpx.get(url)
    assert first.headers["Cache-Control"] == "no-cache"
    tag = first.headers["ETag"]
    for known in (tag, f'"other", W/{tag}'):
        again = httpx.get(url, headers={"If-None-Match": known})
        assert again.status_code == 304 and again.content == b"" and again.headers["ETag"] == tag
    assert httpx.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_schema_of_the_api_has_no_page(server: RunningServer) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert "/v1/models" in paths and not [path for path in paths if path == "/" or path.startswith("/page")]
