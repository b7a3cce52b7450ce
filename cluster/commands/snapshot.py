"""`titanmem snapshot`: cold backups. Only `create` needs a server; the rest works on the URL alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.terminal import (
    DEFAULT_URL,
    CommandFailed,
    CommandStopped,
    JsonOption,
    KeyOption,
    UrlOption,
    checked_tenant,
    checked_user,
    connect,
    emit,
    note,
    progress_bar,
    say,
    show_record,
    show_table,
    waiting,
)
from storage.errors import StoreNotEmpty
from storage.names import UserKey

if TYPE_CHECKING:
    from storage.objects import Objects
    from storage.store import MemoryStore

LOCAL_TENANT = "local"
"""The tenant of a server without keys."""

app = typer.Typer(
    help="Cold backups: create, list, verify, restore, prune.", no_args_is_help=True, add_completion=False
)

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
        manifests = [manifest.to_dict() for manifest in snapshot.list_snapshots(_open(url))]
    if json:
        emit({"target": url, "snapshots": manifests})
    elif manifests:
        columns = ("id", "created_at", "users", "bytes", "base")
        rows = [[*(row[name] for name in columns), len(row["parts"])] for row in manifests]
        show_table((*columns, "parts"), rows)
    else:
        note(f"no snapshot at {url}")


@app.command(epilog="Example: titanmem snapshot verify 20261122T221500Z-0a1b2c")
def verify(id_: IdArgument, target: TargetOption = None, json: JsonOption = False) -> None:
    """Read a whole snapshot back and check every checksum, memory and model file in it."""
    objects = _open(_target_url(target))
    from storage import snapshot

    with _counting(f"verifying {id_}") as progress:
        report = snapshot.verify(objects, id_, progress=progress)
    _show_report(report, json, title=f"{id_}: {'whole' if report['ok'] else 'damaged'}")
    if not report["ok"]:
        raise CommandFailed(f"{id_} is damaged: {_problems(report, 'problems', 'problem_count')}")


@app.command(epilog="Example: titanmem snapshot restore 20261122T221500Z-0a1b2c --store file:///srv/titanmem")
def restore(
    id_: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Snapshot, as `list` names it; or give --at.")
    ] = None,
    store: Annotated[str | None, typer.Option("--store", help="URL of the store to fill.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", callback=checked_user, help="Only this user (of --tenant).")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", callback=checked_tenant, help="Only this tenant; of --user: default local."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="The newest snapshot at or before this time (ISO 8601, UTC).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Write the snapshot's model into this new folder, too.")
    ] = None,
    into_empty: Annotated[
        bool,
        typer.Option("--into-empty", help="The store has no users; a cluster that serves on it is shut out."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also into a store that has users; a cluster that serves on it is shut out."
        ),
    ] = False,
    target: TargetOption = None,
    json: JsonOption = False,
) -> None:
    """Bring memories back into a store: all, a tenant's or a user's. Stop the server on that store first: where
    one is known, a restore is refused or shuts it out."""
    if store is None:
        raise typer.BadParameter("--store URL says which store to fill")
    if (id_ is None) == (at is None):
        raise typer.BadParameter("give either the ID of a snapshot or --at TIME")
    moment = _time(at) if at else None
    objects, store_url = _open(_target_url(target)), _store_url(store)
    from cluster.shutout import check_shut_out, shut_out
    from storage import snapshot
    from storage.store import open_store

    chosen = snapshot.find_at(objects, moment).id if moment else str(id_)
    memories = open_store(store_url)
    # What can not be restored must cost nobody anything: no epoch, no cluster its shards.
    manifest = snapshot.read_manifest(objects, chosen)
    snapshot.check_parts(objects, manifest)
    if not force:
        _refuse_users(memories, store_url, tenant, user)
    if not (force or into_empty):
        _refuse_cluster(memories, store_url)
    epoch = shut_out(memories, above=max(part.epoch for part in manifest.parts))
    try:
        with _counting(f"restoring {chosen}") as progress:
            report = snapshot.restore(
                objects,
                chosen,
                memories,
                epoch=epoch,
                user=UserKey(tenant or LOCAL_TENANT, user) if user else None,
                tenant=tenant,
                force=force,
                progress=progress,
            )
        check_shut_out(memories, epoch)
        if model is not None:
            report["model"] = snapshot.restore_model(objects, chosen, model)
    except KeyboardInterrupt:
        raise CommandStopped(
            f"stopped: each user in {store_url} is whole, but not all may be there; "
            "the same command with --force brings the rest"
        ) from None
    _show_report(report, json, title=f"restored from {chosen}")
    if not report["ok"]:
        raise CommandFailed(f"not all came back: {_problems(report, 'failed', 'failed_count')}")


@app.command(epilog="Example: titanmem snapshot prune --daily 7 --weekly 4 --monthly 12")
def prune(
    daily: Annotated[int, typer.Option("--daily", min=0, help="Days of which the newest stays.")] = 7,
    weekly: Annotated[int, typer.Option("--weekly", min=0, help="Weeks of which the newest stays.")] = 4,
    monthly: Annotated[int, typer.Option("--monthly", min=0, help="Months of which the newest stays.")] = 12,
    target: TargetOption = None,
    json: JsonOption = False,
) -> None:
    """Delete snapshots that no retention keeps, what interrupted ones left, and forgotten users from the rest."""
    if daily + weekly + monthly == 0:
        raise typer.BadParameter("that would keep nothing: leave at least one of the three above 0")
    objects = _open(_target_url(target))
    from storage import snapshot

    with waiting("pruning"):
        now = datetime.now(UTC)
        removed = snapshot.prune(objects, daily=daily, weekly=weekly, monthly=monthly, now=now)
        erased = snapshot.erase_marked(objects, now=now)
    if json:
        emit({"removed": removed, "erased": erased})
    elif removed or erased:
        say("\n".join([*removed, *(f"{id_} without {', '.join(users)}" for id_, users in erased.items())]))
    else:
        note("nothing to prune")


def _refuse_users(memories: MemoryStore, url: str, tenant: str | None, user: str | None) -> None:
    """One user among others is looked at alone; else the store must have none of the tenant."""
    if user is None:
        found = next(iter(memories.users(tenant)), None)
    else:
        key = UserKey(tenant or LOCAL_TENANT, user)
        found = key if memories.versions(key) else None
    if found is not None:
        raise StoreNotEmpty(
            f"{url} has a memory of {found.tenant}/{found.user} already, and nothing was restored; "
            "with --force, what comes back becomes the newest version beside those that are there"
        )


def _refuse_cluster(memories: MemoryStore, url: str) -> None:
    """A cluster that serves on the store would go on from what it has in memory."""
    from cluster.shutout import owners

    for owner in owners(memories):
        raise StoreNotEmpty(
            f"{url}: {owner.shard} of cluster {owner.cluster} has this store, and nothing was restored; stop that "
            "cluster, then say --into-empty, or --force for a store with users: until it starts again it is shut out"
        )


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of users done; gives the function that moves it."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show_report(report: dict[str, Any], json: bool, *, title: str) -> None:
    if json:
        emit(report)
    else:
        show_record({name: value for name, value in report.items() if value not in ([], None)}, title=title)


def _problems(report: dict[str, Any], name: str, count: str) -> str:
    more = f" (and {report[count] - 1} more)" if report[count] > 1 else ""
    return f"{report[name][0]}{more}"


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
