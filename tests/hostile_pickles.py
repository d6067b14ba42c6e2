"""Pickles that are made to do harm, and a process in which to read them under limits of time and memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

from fuzzing import fuzz

PROTO = b"\x80\x02"


def text(value: str) -> bytes:
    """The opcodes that push a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def name(module: str, attribute: str) -> bytes:
    """The opcodes that push a class or function."""
    return f"c{module}\n{attribute}\n".encode()


def shared_tuples(levels: int) -> bytes:
    """The opcodes that push a tuple of 2^levels elements, of which each two halves are one object."""
    return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def nested(opcodes: bytes, levels: int) -> bytes:
    """The opcodes that push an empty tuple inside others."""
    return b")" + opcodes * levels


def attacks(trace: Path) -> dict[str, bytes]:
    """Hostile pickles by name.

    Args:
        trace: The file that an attack makes if its code runs.
    """
    path = text(str(trace))
    return {
        "os.mkdir": PROTO + name("os", "mkdir") + path + b"\x85R.",
        "posix.system": PROTO + name("posix", "system") + text(f"touch {trace}") + b"\x85R.",
        "eval": PROTO + name("builtins", "eval") + text(f"open({str(trace)!r}, 'w')") + b"\x85R.",
        "import by STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + path + b"\x85R.",
        "name through a module": PROTO + name("torch", "os.mkdir") + path + b"\x85R.",
        "torch.load": PROTO + name("torch", "load") + path + b"\x85R.",
        "INST": PROTO + b"(" + path + b"ios\nmkdir\n.",
        "OBJ": PROTO + b"(" + name("os", "mkdir") + path + b"o.",
        "EXT1": PROTO + b"\x82\x01.",
        "EXT4": PROTO + b"\x84\xff\xff\xff\x7f.",
        "REDUCE of a value": PROTO + text("os.mkdir") + path + b"\x85R.",
        "BUILD of a class": PROTO + name("collections", "OrderedDict") + b"}" + text("planted") + b"\x88sb.",
        "BUILD of a dict": PROTO + b"}}" + text("planted") + b"\x88sb.",
        "persistent id": PROTO + text("storage") + b"Q.",
        "key of shared tuples": PROTO + b"}" + shared_tuples(200) + b"\x88s.",
        "member of shared tuples": PROTO + b"\x8f(" + shared_tuples(200) + b"\x90.",
        "value of shared tuples": PROTO + b"}" + text("a") + shared_tuples(200) + b"s.",
        "nested tuples": PROTO + nested(b"\x85", 1_000_000) + b".",
        "nested lists": PROTO + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "nested dicts": PROTO + (b"}" + text("a")) * 300_000 + b"}" + b"s" * 300_000 + b".",
        "key of nested tuples": PROTO + b"}" + nested(b"\x85", 1_000_000) + b"\x88s.",
        "a list in itself": PROTO + b"]q\x00h\x00a.",
        "a dict in its list": PROTO + b"}q\x00" + text("a") + b"]h\x00as.",
        "huge memo index": PROTO + b"Nr\xff\xff\xff\x7f.",
        "huge memo indices": PROTO
        + b"".join(b"Nr" + (2**31 - n).to_bytes(4, "little") + b"0" for n in range(9))
        + b"N.",
        "unknown memo index": PROTO + b"j\xff\xff\xff\x7f.",
        "BINBYTES of 4 GB": PROTO + b"B\xff\xff\xff\xffabc.",
        "BINBYTES8 of 2^62": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
        "BINUNICODE8 of 2^62": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
        "BYTEARRAY8 of 2^62": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"abc.",
        "LONG4 of 2 GB": PROTO + b"\x8b\xff\xff\xff\x7fabc.",
        "frame of 2^62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        "bytearray by number": PROTO + name("builtins", "bytearray") + b"\x8a\x05\x00\x00\x00\x00\x40\x85R.",
        "keys with one hash": PROTO
        + b"}("
        + b"".join(
            b"\x8a\x0d" + (n * (2**61 - 1)).to_bytes(13, "little", signed=True) + b"N"
            for n in range(2**32, 2**32 + 60_000)
        )
        + b"u.",
        "DUP": PROTO + b"N" + b"2" * 1_000_000 + b".",
        "marks": PROTO + b"(" * 3_000_000 + b".",
        "no end": PROTO + b"N",
        "no stack": PROTO + b"R.",
        "text protocol": pickle.dumps({"a": 1}, protocol=0),
    }


def assert_harmless(
    read: Callable[[bytes], object],
    seed: bytes,
    attack: bytes,
    folder: Path,
    refusals: type[BaseException] | tuple[type[BaseException], ...],
) -> None:
    """Let a child read a hostile file: it must be refused within 5 seconds and 300 MB.

    Args:
        read: It reads the content of a file.
        seed: A whole file, which must be read.
        attack: The hostile one.
        folder: An empty folder.
        refusals: Errors that it may raise.
    """
    refusals = refusals if isinstance(refusals, tuple) else (refusals,)
    found = fuzz(
        read, [seed], folder, refusals=refusals, cases=1, seconds=5, megabytes=300, damage=lambda seed, source: attack
    )
    assert found.accepted == 0
