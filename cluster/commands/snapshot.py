"""`titanmem snapshot`: cold backups. Only `create` needs a server; the rest works on the URL alone."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.terminal import (
    DEFAULT_URL,
    CommandFailed,
    CommandStopped,
    JsonOption,
    KeyOption,
    UrlOption,
    checked_user,
    connect,
    emit,
    note,
    progress_bar,
    show_record,
    show_rows,
    waiting,
)

if TYPE_CHECKING:
    from storage.objects import Objects

app = typer.Typer(help="Cold backups: create, list, verify, restore, prune.", no_args_is_help=True)

TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="file:// or s3:// URL of the backups; default: the configured place."),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Snapshot, as `list` names it.")]


@app.command(epilog="Example: titanmem snapshot create --target s3://backups/titanmem")
def create(
    target: TargetOption = None, url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False
) -> None:
    """Back up the model and all memories of a running server, without stopping anybody."""
    try:
        with connect(url, key) as client, waiting("writing the snapshot"):
            record = client.snapshot(_target_url(target) if target else None)
    except KeyboardInterrupt:
        raise CommandStopped(
            "stopped waiting: `titanmem snapshot list` shows the snapshot once it is whole"
        ) from None
    if json:
        emit(record)
    else:
        show_record(record, title="snapshot")


@app.command("list", epilog="Example: titanmem snapshot list --target file:///srv/snapshots")
def list_snapshots(target: TargetOption = None, json: JsonOption = False) -> None:
    """List the finished snapshots, newest first."""
    url = _target_url(target)
    from storage import snapshot

    with waiting(f"reading {url}"):
        rows = [_plain(info) for info in snapshot.list_snapshots(_open(url))]
    if json:
        emit({"target": url, "snapshots": rows})
    elif rows:
        show_rows(rows)
    else:
        note(f"no snapshot at {url}")


@app.command(epilog="Example: titanmem snapshot verify 20261122T221500Z-0a1b2c")
def verify(id_: IdArgument, target: TargetOption = None, json: JsonOption = False) -> None:
    """Read a whole snapshot back and check every checksum in it."""
    from storage import snapshot

    objects = _open(_target_url(target))
    with waiting(f"verifying {id_}"):
        report = _plain(snapshot.verify(objects, id_))
    if json:
        emit(report)
    else:
        show_record(report, title=f"{id_} is whole")


@app.command(epilog="Example: titanmem snapshot restore 20261122T221500Z-0a1b2c --store file:///srv/titanmem")
def restore(
    id_: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Snapshot, as `list` names it; or give --at.")
    ] = None,
    store: Annotated[str | None, typer.Option("--store", help="URL of the store to fill.")] = None,
    user: Annotated[str | None, typer.Option("--user", callback=checked_user, help="Only this user.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="The nearest snapshot at or before this time (ISO 8601, UTC).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also into a store that has users.")] = False,
    target: TargetOption = None,
    json: JsonOption = False,
) -> None:
    """Bring memories back into a store: all, a tenant's or a user's. Stop the server on that store first."""
    if store is None:
        raise typer.BadParameter("--store URL says which store to fill")
    if (id_ is None) == (at is None):
        raise typer.BadParameter("give either the ID of a snapshot or --at TIME")
    url, store_url = _target_url(target), _store_url(store)
    time = _time(at) if at else None
    from storage import snapshot
    from storage.store import open_store

    objects = _open(url)
    chosen = id_ or _nearest(objects, time or datetime.now(UTC), url)
    memories = open_store(store_url)
    bar = progress_bar()
    with bar:
        task = bar.add_task(f"restoring {chosen}", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            result = _plain(
                snapshot.restore(
                    objects,
                    chosen,
                    memories,
                    user=user,
                    tenant=tenant,
                    force=force,
                    epoch=memories.next_epoch(),
                    progress=report,
                )
            )
        except KeyboardInterrupt:
            raise CommandStopped(
                f"stopped: each user in {store} is whole, but not all are there; "
                "the same command with --force brings the rest"
            ) from None
    if json:
        emit(result)
    else:
        show_record(result, title=f"restored from {chosen}")


@app.command(epilog="Example: titanmem snapshot prune --daily 7 --weekly 4 --monthly 12")
def prune(
    daily: Annotated[int, typer.Option("--daily", min=0, help="Days of which the newest stays.")] = 7,
    weekly: Annotated[int, typer.Option("--weekly", min=0, help="Weeks of which the newest stays.")] = 4,
    monthly: Annotated[int, typer.Option("--monthly", min=0, help="Months of which the newest stays.")] = 12,
    target: TargetOption = None,
    json: JsonOption = False,
) -> None:
    """Delete snapshots that the retention no longer keeps, and what interrupted ones left."""
    if daily + weekly + monthly == 0:
        raise typer.BadParameter("that would keep nothing: leave at least one of the three above 0")
    from storage import snapshot

    objects = _open(_target_url(target))
    with waiting("pruning"):
        result = snapshot.prune(objects, daily=daily, weekly=weekly, monthly=monthly, now=datetime.now(UTC))
    document = _plain(result) if not isinstance(result, list) else {"removed": result}
    if json:
        emit(document)
    else:
        show_record(document, title="pruned")


def _target_url(target: str | None) -> str:
    """Where the backups are: as said, else as configured."""
    from cluster.config import load

    try:
        return load(flags={"snapshots": target}).snapshots
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _store_url(store: str) -> str:
    from cluster.config import load

    try:
        return load(flags={"store": store}).store
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _open(url: str) -> Objects:
    from storage.objects import open_objects

    return open_objects(url)


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"--at: {text[:64]!r} is no time like 2026-11-22T22:15:00") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _nearest(objects: Objects, at: datetime, url: str) -> str:
    """The newest snapshot that was finished at or before `at`."""
    from storage.snapshot import list_snapshots

    before = [info for info in list_snapshots(objects) if info.created_at <= at]
    if not before:
        raise CommandFailed(f"no snapshot at {url} is as old as {at.isoformat()}")
    return max(before, key=lambda info: info.created_at).id


def _plain(value: Any) -> dict[str, Any]:
    """A record of storage's as JSON values."""
    fields: dict[str, Any] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return {name: part.isoformat() if isinstance(part, datetime) else part for name, part in fields.items()}
