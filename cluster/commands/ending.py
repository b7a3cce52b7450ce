"""How every command ends: one line on stderr and an exit code, whatever went wrong inside."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from cluster.commands.terminal import INTERRUPTED, CommandStopped, note, say
from storage.errors import TitanmemError

NOUNS = ("serve", "chat", "ingest", "users", "shards", "snapshot", "bench", "train", "doctor")
"""What `titanmem --help` lists, in its order; each is a module of this package with an `app`."""
FAILED = 1
LINE_CHARS_MAX = 1000


def _version(wanted: bool) -> None:
    if wanted:
        try:
            say(f"titanmem {importlib.metadata.version('titanmem')}")
        except importlib.metadata.PackageNotFoundError:
            say("titanmem, run from its sources")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """A chat backend that remembers: one neural long-term memory a user."""


class Nouns(Mapping[str, Any]):
    """The commands below the root, each built when it is asked for: a start builds one of them."""

    def __getitem__(self, name: str) -> Any:
        if name not in NOUNS:
            raise KeyError(name)
        return _built(name)

    def __iter__(self) -> Iterator[str]:
        return iter(NOUNS)

    def __len__(self) -> int:
        return len(NOUNS)


@functools.cache
def _built(name: str) -> Any:
    command = get_command(importlib.import_module(f"cluster.commands.{name}").app)
    command.name = name
    return command


class OneLineGroup(TyperGroup):
    """The root of the commands: turns errors and Ctrl-C of any command below into one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, Nouns())

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.TyperException, BrokenPipeError):
            raise  # typer's own ways to end, wrong use (2) among them; a closed pipe is handled in main()
        except (KeyboardInterrupt, typer.Abort, CommandStopped) as error:
            # From here on only the one line is left to say: a second Ctrl-C must not tear it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            note(one_line(error) if isinstance(error, CommandStopped) else "stopped")
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if os.environ.get("TITANMEM_DEBUG") == "1":
                raise
            note(one_line(error))
            raise typer.Exit(FAILED) from error


def one_line(error: BaseException) -> str:
    """What the user reads of an error: its message, and its kind where that alone says too little."""
    if isinstance(error, TitanmemError | ValueError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, ModuleNotFoundError):
        text = f"a part of the installation is missing: {error}; run `make install`"
    else:
        text = f"unexpected {type(error).__name__}: {error} (TITANMEM_DEBUG=1 shows where)"
    text = " ".join(text.split()) or f"unexpected {type(error).__name__} (TITANMEM_DEBUG=1 shows where)"
    return text if len(text) <= LINE_CHARS_MAX else text[: LINE_CHARS_MAX - 1] + "…"
