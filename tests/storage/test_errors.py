"""The error tree: one root, one class a rule, and messages that stay short and printable."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from storage import errors
from storage.errors import BadMemoryFile, Fenced, InvalidName, TitanmemError, Truncated

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, TitanmemError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_survives_pickling_and_copying(kind: type[TitanmemError]) -> None:
    if issubclass(kind, BadMemoryFile):
        error: TitanmemError = kind("f.titanmem", "a rule", [1, 2], b"x")
    else:
        error = kind("what happened", epoch=7, key="local/alice")
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is kind
        assert (str(back), back.details) == (str(error), error.details)


def test_the_tree_is_as_drawn() -> None:
    assert errors.__doc__ is not None
    for kind in CLASSES:
        assert kind.__name__ in errors.__doc__


def test_details_are_attributes() -> None:
    error = pickle.loads(pickle.dumps(Fenced("epoch 7 is over", epoch=7, seen=9)))
    assert (error.epoch, error.seen, error.message) == (7, 9, "epoch 7 is over")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = error.nothing


def test_a_bad_file_says_what_where_and_what_to_do() -> None:
    error = Truncated("alice.titanmem", "the end", "22 bytes", "x" * 10_000 + "\n")
    assert str(error).startswith("alice.titanmem: the end: expected 22 bytes, found xxx")
    assert "previous version" in str(error)
    assert len(str(error)) < 500
    assert str(error).isprintable()


def test_an_invalid_name_is_a_value_error() -> None:
    assert issubclass(InvalidName, ValueError)
