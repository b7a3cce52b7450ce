"""Taking a store away from whatever cluster serves on it, before something else writes there.

Nobody can ask a cluster that may hang, or be cut off, whether it serves. But each of its shards reads its ownership
record before it acknowledges: when another epoch stands there, it acknowledges no more, can store nothing over what was
written since, and ends. So a restore first claims every record there is. A cluster that starts claims them back.
"""

from __future__ import annotations

import uuid

from actors import ownership
from actors.ownership import Owner, claim
from storage.errors import Fenced
from storage.store import MemoryStore

_MARK = "restore-"


def owners(store: MemoryStore) -> list[Owner]:
    """Who may be serving on a store: the records that a cluster has claimed last."""
    return [owner for owner in ownership.owners(store) if not owner.cluster.startswith(_MARK)]


def shut_out(store: MemoryStore, *, above: int = 0) -> int:
    """Takes every shard's record, and gives a newer epoch to write under: from here on no shard acknowledges anything.

    It is larger than `above`, too: with the epochs of what is to be restored, journals from before are void even where
    the store that knew the epochs is lost. Raises `Fenced` when somebody else claims one at the same time.
    """
    name = _MARK + uuid.uuid4().hex
    for owner in owners(store):
        claim(store, owner.shard, cluster=name, incarnation=name, take_over=True)
    return store.next_epoch(above)


def check_shut_out(store: MemoryStore, epoch: int) -> None:
    """Raises `Fenced` when a cluster has begun to serve since: then not everything is as it was put there."""
    since = owners(store)
    if since:
        shards = ", ".join(owner.shard for owner in since)
        raise Fenced(
            f"{store.url}: a cluster has started on this store meanwhile ({shards}): users who were served before they "
            "were restored are as that cluster has them. Stop it and restore again, with --force.",
            epoch=epoch,
        )
