"""How long cold backups stay: so many days, weeks and months; and what interrupted jobs have left."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

from storage.errors import SnapshotDamaged, StoreUnavailable
from storage.objects import Objects
from storage.snapshot_manifest import Manifest, list_snapshots, read_manifest

SWEEP_AGE_S = 86_400.0
DAILY, WEEKLY, MONTHLY = 7, 4, 12
"""Snapshots that are kept: the newest of each of so many days, weeks and months."""
_LEFT = re.compile(r"\d{8}T\d{6}Z-[a-z0-9]{6}/(part-[A-Za-z0-9_-]{1,100}\.(parquet|json)|begun\.json)")
_log = logging.getLogger(__name__)

_PERIODS: dict[str, Callable[[datetime], object]] = {
    "daily": lambda moment: moment.date(),
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
}


def choose_kept(
    snapshots: Iterable[tuple[str, datetime]], *, daily: int, weekly: int, monthly: int
) -> set[str]:
    """Ids to keep: the newest snapshot of each of the last so many days, weeks and months that have one.

    Days, weeks (ISO) and months are those of UTC. The newest of all always stays.
    """
    ordered = sorted(((moment.astimezone(UTC), name) for name, moment in snapshots), reverse=True)
    kept = {name for _, name in ordered[:1]}
    for period, limit in (("daily", daily), ("weekly", weekly), ("monthly", monthly)):
        seen: set[object] = set()
        for moment, name in ordered:
            mark = _PERIODS[period](moment)
            if mark not in seen and len(seen) < limit:
                seen.add(mark)
                kept.add(name)
    return kept


def kept_until(
    manifests: Iterable[Manifest],
    *,
    now: datetime,
    daily: int = DAILY,
    weekly: int = WEEKLY,
    monthly: int = MONTHLY,
) -> dict[str, datetime]:
    """When each snapshot goes, if there is one more every day from now on: the day of the pruning that drops it."""
    there = [(manifest.id, manifest.created_at) for manifest in manifests]
    waiting, until, moment = {name for name, _ in there}, {}, now
    while waiting:
        moment += timedelta(days=1)
        there.append((f"{moment:%Y%m%d}", moment))
        kept = choose_kept(there, daily=daily, weekly=weekly, monthly=monthly)
        there = [line for line in there if line[0] in kept]
        until |= {name: moment for name in waiting - kept}
        waiting &= kept
    return until


def prune(
    target: Objects,
    *,
    daily: int = DAILY,
    weekly: int = WEEKLY,
    monthly: int = MONTHLY,
    now: datetime,
    sweep_age_s: float = SWEEP_AGE_S,
) -> list[str]:
    """Deletes snapshots that no rule keeps, then sweeps; the ids of the deleted ones.

    A snapshot from after `now` (another clock) is kept. The manifest goes first: from then on there is no
    such snapshot, and an interruption leaves parts that the sweep finds.
    """
    for name, value in (("daily", daily), ("weekly", weekly), ("monthly", monthly)):
        if value < 0:
            raise ValueError(f"{name}: {value}: expected 0 or more")
    manifests = list_snapshots(target)
    past = [(manifest.id, manifest.created_at) for manifest in manifests if manifest.created_at <= now]
    kept = choose_kept(past, daily=daily, weekly=weekly, monthly=monthly)
    pruned = []
    for manifest in manifests:
        if manifest.created_at > now or manifest.id in kept:
            continue
        target.delete(f"{manifest.id}/manifest.json")
        for part in manifest.parts:
            target.delete(part.name)
        pruned.append(manifest.id)
        _log.info("pruned snapshot %s", manifest.id)
    sweep(target, now=now, older_than_s=sweep_age_s)
    return pruned


def sweep(target: Objects, *, now: datetime, older_than_s: float = SWEEP_AGE_S) -> list[str]:
    """Deletes what is older than any job and belongs to no snapshot: parts and notes that no manifest lists, and what
    no listing shows of interrupted uploads; names."""
    finished: set[str] = set()
    left: list[tuple[str, str]] = []
    for info in target.list():
        folder, _, file = info.name.partition("/")
        if file == "manifest.json":
            finished.add(folder)
        elif _LEFT.fullmatch(info.name) and (now - info.modified).total_seconds() > older_than_s:
            left.append((folder, info.name))
    for folder in {folder for folder, _ in left} & finished:
        try:
            listed = {part.name for part in read_manifest(target, folder).parts}
        except SnapshotDamaged:  # what it lists is not known: nothing goes
            listed = {name for _, name in left}
        left = [line for line in left if line[0] != folder or line[1] not in listed]
    for _, name in left:
        target.delete(name)
    swept = [name for _, name in left]
    try:
        return swept + target.sweep(older_than_s=older_than_s)
    except StoreUnavailable as error:
        _log.warning("unfinished uploads, if any, are left where they are: %s", error)
        return swept
