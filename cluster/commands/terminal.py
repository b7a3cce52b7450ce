"""What all commands share: their options, their output, their progress bars, and how they fail.

Results go to stdout (with `--json` exactly one JSON document), everything else to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from cluster.client_errors import URL_DEFAULT, check_url
from storage.errors import InvalidName, TitanmemError
from storage.names import check_name

if TYPE_CHECKING:
    from cluster.client import Client

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells expect."""


class CommandFailed(TitanmemError):
    """The command cannot do what it was asked; the message is the one line that the user reads."""


class CommandStopped(TitanmemError):
    """Ctrl-C, with a line that says what stands and how to go on."""


def _url(value: str) -> str:
    try:
        return check_url(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _key(value: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise typer.BadParameter("holds characters that no HTTP header may carry")
    return value


def checked_user(value: str | None) -> str | None:
    """Callback of every option and argument that names a user."""
    return _checked("user", value)


def checked_tenant(value: str | None) -> str | None:
    """Callback of every option that names a tenant."""
    return _checked("tenant", value)


def _checked(kind: str, value: str | None) -> str | None:
    try:
        return None if value is None else check_name(kind, value)
    except InvalidName as error:
        raise typer.BadParameter(error.message) from error


UrlOption = Annotated[
    str, typer.Option("--url", envvar="TITANMEM_URL", callback=_url, help="Address of the server.")
]
KeyOption = Annotated[
    str,
    typer.Option(
        "--key",
        envvar="TITANMEM_API_KEY",
        callback=_key,
        show_default=False,
        help="API key; prefer the variable, arguments are visible to others.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")
]
UserOption = Annotated[str, typer.Option("--user", "-u", callback=checked_user, help="Whose memory.")]
UserArgument = Annotated[str, typer.Argument(callback=checked_user, metavar="USER", help="Whose memory.")]

DEFAULT_URL = URL_DEFAULT


def connect(url: str, key: str) -> Client:
    from cluster.client import Client

    return Client(url, key=key)


# what comes out


def stdout() -> Console:
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """`text` without what a terminal obeys: control characters other than line ends and tabs."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F))


def emit(document: Mapping[str, Any]) -> None:
    """The one JSON document of a `--json` run."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """One plain line of a result, on stdout."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def note(line: str) -> None:
    """One plain line beside the result, on stderr."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table of results; numbers stand right, and nothing in a cell is taken for markup."""
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, name in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(figure(cell)) for cell in row))
    # Not wrapped to 80 columns when it goes into a pipe: a cell that is cut in two is of no use to grep.
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 240)
    console.print(table)


def show_rows(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Records of one kind, one a line, a field a column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    show_table(columns, ([row.get(name) for name in columns] for row in rows), title=title)


def show_record(record: Mapping[str, Any], *, title: str | None = None) -> None:
    """One thing, a field a line."""
    show_table(("field", "value"), ((name, figure(value)) for name, value in record.items()), title=title)


def figure(value: Any) -> str:
    """A value of an answer as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, dict | list):
        return printable(json.dumps(value, ensure_ascii=False))
    return printable(str(value))


def byte_count(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# while it runs


def progress_bar(*columns: ProgressColumn | str) -> Progress:
    """A bar on stderr, gone when done; nothing at all when stderr is no terminal."""
    console = stderr()
    shown = columns or ("{task.description}", BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A turning sign with `what` beside it, while one long call runs."""
    with progress_bar(SpinnerColumn(), "{task.description}", _Elapsed()) as progress:
        progress.add_task(what, total=None)
        yield


class _Elapsed(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(f"{task.elapsed or 0:.0f} s", style="dim")
