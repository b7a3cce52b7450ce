"""Every error of the tree survives pickling, since Ray carries errors between processes."""

from __future__ import annotations

import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from storage.errors import TitanmemError
from tests.tidy import rules

TREES = tuple(
    name.removesuffix(".py").replace("/", ".")
    for name, _ in rules.python_files(Path(__file__).resolve().parents[2])
    if name.endswith("errors.py")
)
DETAILS = {"retry_after_s": 2.5, "epoch": 7, "key": ("default", "alice")}
SAMPLES: dict[str, Any] = {
    "int": 7,
    "float": 2.5,
    "bool": True,
    "dict": {"a": 1},
    "list": ["a"],
    "tuple": ("a",),
}


def error_classes(module_names: tuple[str, ...]) -> list[type[TitanmemError]]:
    found = []
    for name in module_names:
        module = importlib.import_module(name)
        for member in vars(module).values():
            if isinstance(member, type) and issubclass(member, BaseException) and member.__module__ == name:
                found.append(member)
    return found


def sample(annotation: object) -> Any:
    """A value for a parameter, going by its annotation's first word; text where nothing else fits."""
    word = str(getattr(annotation, "__name__", annotation)).split("[")[0].split("|")[0].strip()
    return SAMPLES.get(word, "some text")


def build(kind: type[BaseException]) -> BaseException:
    """An instance with every parameter given, positional and keyword-only, and details where it takes any."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            args.append(sample(parameter.annotation))
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = sample(parameter.annotation)
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(DETAILS)
    return kind(*args, **kwargs)


def check_travels(kind: type[BaseException]) -> None:
    error = build(kind)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol=protocol))
        assert type(back) is kind
        assert str(back) == str(error)
        assert back.args == error.args
        assert back.__dict__ == error.__dict__


def test_both_trees_are_looked_at() -> None:
    assert {"storage.errors", "cluster.errors"} <= set(TREES)


@pytest.mark.parametrize("kind", error_classes(TREES), ids=lambda kind: kind.__name__)
def test_an_error_travels(kind: type[TitanmemError]) -> None:
    assert issubclass(kind, TitanmemError), "one tree: build it on storage.errors.TitanmemError"
    check_travels(kind)


class TakesTwoPassesOne(Exception):
    """The classic mistake: the base class hears of one argument, the constructor wants two."""

    def __init__(self, shard: str, epoch: int) -> None:
        super().__init__(f"{shard} is at {epoch}")
        self.shard, self.epoch = shard, epoch


class ForgetsADetail(Exception):
    """Comes back, but not the same."""

    def __init__(self, message: str = "", detail: int = 0) -> None:
        super().__init__(message)
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0],)


@pytest.mark.parametrize(
    ("kind", "caught_as"), [(TakesTwoPassesOne, TypeError), (ForgetsADetail, AssertionError)]
)
def test_a_planted_mistake_is_caught(kind: type[Exception], caught_as: type[Exception]) -> None:
    with pytest.raises(caught_as):
        check_travels(kind)
