"""The page at `/`: a chat with the model, in files that the browser gets from this server alone."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..errors import ApiError

# The page shows what models write. So the browser runs no script but the page's files, talks to no other host, and
# refuses to read strings as HTML.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_MEDIA_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}


class PageFile:
    """A file of the page, in memory.

    Args:
        name: Its name in the folder `files`.
    """

    def __init__(self, name: str) -> None:
        self._content = (files(__name__) / "files" / name).read_bytes()
        self._media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        self._headers = {
            # The browser asks each time whether its copy is current, so old and new files never meet.
            "Cache-Control": "no-cache",
            "ETag": self._tag,
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def answer(self, request: Request) -> Response:
        """Return the file, or status 304 if the browser has it."""
        known = request.headers.get("If-None-Match", "").split(",")
        if self._tag in [tag.strip().removeprefix("W/") for tag in known]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, media_type=self._media_type, headers=self._headers)


_INDEX = PageFile("index.html")
_FILES = {file.name: PageFile(file.name) for file in (files(__name__) / "files").iterdir()}
del _FILES["index.html"]
# These need no API key: the page asks for it.
PATHS = ("/", *(f"/page/{name}" for name in _FILES))

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def get_page(request: Request) -> Response:
    """Return the page."""
    return _INDEX.answer(request)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def get_file(request: Request, name: str) -> Response:
    """Return a file that the page consists of."""
    if name not in _FILES:
        raise ApiError(404, f"{request.method} {request.url.path}: Not Found.")
    return _FILES[name].answer(request)
