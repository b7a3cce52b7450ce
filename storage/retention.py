"""How long cold backups stay: so many days, weeks and months; and what interrupted jobs have left."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from storage.objects import Objects
from storage.snapshot_manifest import list_snapshots

SWEEP_AGE_S = 86_400.0
_PART = re.compile(r"(\d{8}T\d{6}Z-[a-z0-9]{6})/part-[A-Za-z0-9_-]{1,64}\.parquet")
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


def prune(
    target: Objects,
    *,
    daily: int = 7,
    weekly: int = 4,
    monthly: int = 12,
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
    """Deletes parts that no manifest stands beside and that are older than any job; their names."""
    finished: set[str] = set()
    parts: list[tuple[str, str]] = []
    for info in target.list():
        folder, _, file = info.name.partition("/")
        match = _PART.fullmatch(info.name)
        if file == "manifest.json":
            finished.add(folder)
        elif match and (now - info.modified).total_seconds() > older_than_s:
            parts.append((match.group(1), info.name))
    swept = [name for snapshot_id, name in parts if snapshot_id not in finished]
    for name in swept:
        target.delete(name)
    return swept
