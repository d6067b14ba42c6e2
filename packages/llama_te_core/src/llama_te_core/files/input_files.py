"""Reading of files that somebody else made: only regular files are opened, and JSON is read within limits.

This module imports only the standard library, for tools that only read and write files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from typing import Any, BinaryIO, NoReturn

# Real files stay far below these limits: the index of a model with 90,000 tensors has 9 MB and 90,000 values.
MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_VALUES = 2**20
MAX_JSON_DEPTH = 64
_MAX_DIGITS = 100  # tokenizers write 10**30 for "no limit"

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Each part is possessive and the last quote is optional, so that the time is linear in the length.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def open_file(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading. A symbolic link to one counts as one.

    Opening a named pipe waits for its writer, and a device such as /dev/zero never ends.

    Args:
        path: The file.
        buffering: See `open`.

    Raises:
        OSError: The file cannot be opened or is not a regular file. `strerror` says why.
    """
    _refuse_others(os.stat(path), path)  # before it is opened, since opening alone has an effect on some devices
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_others(os.fstat(descriptor), path)  # another file may have taken its place
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_others(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "special")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a whole regular file of limited size.

    Args:
        path: The file.
        max_bytes: The largest size in bytes.

    Raises:
        OSError: See `open_file`. Or the file is larger; then nothing was read.
    """
    with open_file(path, buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = bytearray()
        # Files in /proc have the size 0, and a file may grow while it is read.
        while size <= max_bytes and (part := file.read(min(max_bytes + 1 - len(content), 2**20))):
            content += part
            size = max(size, len(content))
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, but at most {max_bytes:,} are read", os.fspath(path))
    return bytes(content)


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file that somebody else made: see `json_object`.

    Args:
        path: The file.
        max_bytes: The largest size in bytes.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large.
        ValueError: The content is refused. The message does not have the path.
    """
    return json_object(read_bytes(path, max_bytes))


def json_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in foreign bytes.

    Unlike `json.loads`, this refuses what readers of JSON treat in different ways or cannot write again: keys that
    occur twice, NaN and infinities (`1e999` is one), integers of more than 100 digits and single surrogates. It also
    refuses content that needs much memory or recursion.

    Args:
        content: The object as UTF-8.

    Raises:
        ValueError: The content is refused. The message says why, on one line.
    """
    _check_limits(content)
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error}") from error
    except RecursionError as error:  # the caller itself was deep in recursion
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it does not hold a JSON object")
    if rb"\u" in content:
        _refuse_surrogates(value)
    return value


def _check_limits(content: bytes) -> None:
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, but at most {MAX_JSON_BYTES:,} are read")
    structure = _STRING.sub(b'"', content)
    # Each value but the first follows a bracket, a comma or a colon.
    values = structure.count(b",") + structure.count(b"[") + structure.count(b"{")
    if values > MAX_JSON_VALUES:
        raise ValueError(f"it has about {values:,} values, but at most {MAX_JSON_VALUES:,} are read")
    depth = 0
    for match in _BRACKET.finditer(structure):
        depth += 1 if match[0] in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"it has more than {MAX_JSON_DEPTH} levels of lists and objects")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its keys and values; an `object_pairs_hook` of the module json.

    Args:
        pairs: The keys and values.

    Raises:
        ValueError: A key occurs twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {_short(twice)!r} twice: remove the wrong one")
    return made


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(text):,} digits: {_short(text)}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_constant(_short(text))
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it has the number {text}, which is not finite")


def _refuse_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            try:
                each.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"it has the text {_short(each)!r}, which has half of a surrogate pair") from error
        elif isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
