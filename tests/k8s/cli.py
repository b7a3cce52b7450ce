"""Whether a command line of ours exists: looked up in the real tree of commands, nothing is run."""

from __future__ import annotations

from functools import cache
from typing import Any

import typer.main

from cluster.cli import build_app


@cache
def tree() -> Any:
    return typer.main.get_command(build_app())


def check(words: list[str]) -> None:
    """Raises `AssertionError` if a command or an option in `words` does not exist; arguments are free."""
    assert words[0] == "titanmem", f"{words[0]!r} is no command of ours"
    command, rest = tree(), list(words[1:])
    while hasattr(command, "commands"):
        word = rest.pop(0) if rest else ""
        assert word in command.commands, f"{' '.join(words)!r}: no command {word!r}"
        command = command.commands[word]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("-"):
            assert word.split("=")[0] in options | {"--help"}, f"{' '.join(words)!r}: no option {word!r}"
