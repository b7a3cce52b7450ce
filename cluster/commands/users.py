"""`titanmem users`: one user's memory, looked at, moved, taken back, erased."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.terminal import (
    DEFAULT_URL,
    CommandFailed,
    JsonOption,
    KeyOption,
    UrlOption,
    UserArgument,
    byte_count,
    connect,
    emit,
    note,
    say,
    show_record,
    show_rows,
    waiting,
)

app = typer.Typer(
    help="Memories of users: list, show, roll back, export, erase.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command("list", epilog="Example: titanmem users list")
def list_users(url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False) -> None:
    """List the users that have a memory."""
    with connect(url, key) as client:
        rows = client.users()
    if json:
        emit({"users": rows})
    elif rows:
        show_rows(rows)
    else:
        note("no user has a memory yet")


@app.command(epilog="Example: titanmem users show alice")
def show(
    user: UserArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False
) -> None:
    """Show the figures of one memory."""
    with connect(url, key) as client:
        record = client.memory(user)
    if json:
        emit(record)
    else:
        show_record(record, title=user)


@app.command(epilog="Example: titanmem users versions alice")
def versions(
    user: UserArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False
) -> None:
    """List the stored versions of one memory, newest first."""
    with connect(url, key) as client:
        rows = client.versions(user)
    if json:
        emit({"user": user, "versions": rows})
    elif rows:
        show_rows(rows)
    else:
        note(f"no version of {user} is stored yet")


@app.command(epilog="Example: titanmem users rollback alice --to 12")
def rollback(
    user: UserArgument,
    to: Annotated[
        int | None,
        typer.Option("--to", min=0, help="Version to go back to; default: the one before the current."),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Take a memory back to a stored version."""
    with connect(url, key) as client, waiting(f"rolling {user} back"):
        record = client.rollback(user, to)
    if json:
        emit(record)
    else:
        show_record(record, title=f"{user} rolled back")


@app.command(epilog="Example: titanmem users pin alice")
def pin(
    user: UserArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False
) -> None:
    """Keep the current version for good: it is not swept when newer ones come."""
    with connect(url, key) as client:
        record = client.pin(user)
    if json:
        emit(record)
    else:
        show_record(record, title=f"{user} pinned")


@app.command(epilog="Example: titanmem users export alice alice.titanmem")
def export(
    user: UserArgument,
    file: Annotated[Path, typer.Argument(help="File to write; - for stdout.", allow_dash=True)],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Write one memory into a .titanmem file. The file appears whole or not at all."""
    dash = str(file) == "-"
    if dash and json:
        raise typer.BadParameter("--json and the file itself cannot both go to stdout")
    if file.is_dir():
        raise CommandFailed(f"{file}: is a directory")
    if not dash and not file.parent.is_dir():
        raise CommandFailed(f"{file.parent}: no such directory")
    with connect(url, key) as client, waiting(f"exporting {user}"):
        data = client.export(user)
    if dash:
        sys.stdout.buffer.write(data)
        return
    _write_whole(file, data)
    if json:
        emit({"user": user, "file": str(file), "bytes": len(data)})
    else:
        say(f"{file}: {byte_count(len(data))}")


@app.command("import", epilog="Example: titanmem users import alice alice.titanmem")
def import_(
    user: UserArgument,
    file: Annotated[Path, typer.Argument(help="A .titanmem file that `export` wrote.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Put a .titanmem file in the place of one memory. The version before it stays stored."""
    with file.open("rb") as data, connect(url, key) as client, waiting(f"importing {user}"):
        record = client.import_(user, data)
    if json:
        emit(record)
    else:
        show_record(record, title=f"{user} imported from {file}")


@app.command(epilog="Example: titanmem users forget alice --yes")
def forget(
    user: UserArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Erase one memory everywhere, backups included at their next restore, and print the receipt."""
    asks = not yes and not json and sys.stdin.isatty()
    if asks and not typer.confirm(f"Erase everything that is remembered of {user}?", err=True):
        raise CommandFailed(f"nothing was erased: {user} is as before")
    with connect(url, key) as client, waiting(f"erasing {user}"):
        receipt = client.forget(user)
    if json:
        emit(receipt)
    else:
        show_record(receipt, title=f"receipt: {user} is forgotten")


def _write_whole(file: Path, data: bytes) -> None:
    """`data` under the name `file`, which never holds a part of it: written beside it first, then renamed."""
    handle, beside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, file)
    except BaseException:
        os.unlink(beside)
        raise
