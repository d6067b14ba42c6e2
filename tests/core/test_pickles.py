"""The reader of pickles: it reads what the standard library writes, runs no code, and ends soon with hostile files."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostile_pickles
from fuzzing import fuzz
from llama_te_core.files import pickles
from llama_te_core.files.pickles import Constructor, PickleFileError, RefusedNameError, Vocabulary, read_pickle

WORDS = Vocabulary({("collections", "OrderedDict"): Constructor(lambda: OrderedDict())})
PLAIN = Vocabulary({})
KEYS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary()
VALUES = st.recursive(
    KEYS | st.floats(allow_nan=False) | st.integers(-(2**2000), 2**2000),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.lists(inner).map(lambda items: (items, items))
    ),
)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@given(value=VALUES)
def test_it_reads_what_pickle_writes(value: Any, protocol: int) -> None:
    read = read_pickle(pickle.dumps(value, protocol=protocol), PLAIN)
    assert read == value and repr(read) == repr(value)


def test_what_occurs_twice_is_one_object() -> None:
    inner = [1]
    one, other = read_pickle(pickle.dumps((inner, inner)), PLAIN)
    assert one is other


def test_names(tmp_path: Path) -> None:
    value = OrderedDict(b=1, a=2)
    read = read_pickle(pickle.dumps(value), WORDS)
    assert read == value and type(read) is OrderedDict
    with pytest.raises(RefusedNameError, match="it asks for collections.OrderedDict, .* could run any code") as error:
        read_pickle(pickle.dumps(value), PLAIN)
    assert error.value.name == "collections.OrderedDict"


ATTACKS = hostile_pickles.attacks(Path("/nonexistent"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(attack: str, tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    content = hostile_pickles.attacks(trace)[attack]
    if attack in ("huge memo index", "huge memo indices"):  # harmless where the memo is a dict
        assert read_pickle(content, WORDS) is None
        return
    hostile_pickles.assert_harmless(
        lambda data: read_pickle(data, WORDS), pickle.dumps({"a": 1}), content, tmp_path, PickleFileError
    )
    assert not trace.exists()


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("os.mkdir", r"is refused: it asks for os\.mkdir, which .* could run any code"),
        ("INST", r"has the opcode 0x69 at byte \d+, which such files do not need"),
        ("EXT1", "has the opcode 0x82"),
        ("REDUCE of a value", "calls a value of type str, which is not allowed"),
        ("BUILD of a class", "sets the state of a Constructor, which is not allowed"),
        ("persistent id", "refers to a storage, which such files do not have"),
        ("key of shared tuples", "has more than 16,777,216 values"),
        ("nested tuples", "has values nested more than 100 deep"),
        ("nested lists", "has values nested more than 100 deep"),
        ("a list in itself", "has a value that refers to itself"),
        ("a dict in its list", "has a value that refers to itself"),
        ("unknown memo index", "refers to value 2147483647, which it does not have"),
        ("BINBYTES of 4 GB", "is damaged: it ends within the 4294967295 bytes at byte 7"),
        ("keys with one hash", "has a number of more than 64 bits as a key"),
        ("no end", "is damaged: it has no end"),
    ],
)
def test_messages(attack: str, message: str) -> None:
    with pytest.raises(PickleFileError, match=message):
        read_pickle(ATTACKS[attack], WORDS)


def test_keys_are_quick_to_hash() -> None:
    for key in ((1, 2), 1.5):
        with pytest.raises(PickleFileError, match="has a (tuple|float) as a key, which is not allowed"):
            read_pickle(pickle.dumps({key: 1}), PLAIN)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps([[number] for number in range(300)])
    read_pickle(content, PLAIN)
    monkeypatch.setattr(pickles, "MAX_STEPS", 100)
    with pytest.raises(PickleFileError, match="has more than 100 steps"):
        read_pickle(content, PLAIN)
    monkeypatch.undo()
    monkeypatch.setattr(pickles, "MAX_VALUES", 100)
    with pytest.raises(PickleFileError, match="has more than 100 values"):
        read_pickle(content, PLAIN)


@pytest.mark.fuzz
def test_damaged_pickles(tmp_path: Path, counts: Any) -> None:
    value = {"a": [1, 2.5, None, (True, b"bytes")], 3: {"nested": [{}, (), []]}, "same": ["x" * 300] * 2, "big": 10**30}
    seeds = [pickle.dumps(value, protocol=protocol) for protocol in (3, 4, 5)]
    seeds.append(pickle.dumps(OrderedDict(value)))
    found = fuzz(lambda data: read_pickle(data, WORDS), seeds, tmp_path, refusals=(PickleFileError,), cases=3000)
    counts(f"pickles: {found}")
