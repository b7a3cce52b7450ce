"""What must hold in every life, whatever failed in it; each breach is one sentence.

Said of the final state: every acknowledged update is in it, once and in order, and nothing that nobody sent. Said of
every moment: a version in the store never goes back nor changes, an epoch is given once, and nobody acknowledges under
an old epoch what a newer owner of that user has overtaken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from actors.ownership import OWNERS_PREFIX
from storage.head import Head, hash_of
from storage.names import UserKey
from storage.records import decode_record
from tests.simulator.chain import history_in
from tests.simulator.cloud import Bucket
from tests.simulator.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack:
    """An answer as it left its shard."""

    user: str
    epoch: int
    left_at: float
    durable_at: float
    """When the journal had it."""
    confirmed_at: float
    """When the store carried out the last read of the ownership record that was answered there."""
    unconfirmed: bool
    """The store was away: the answer is under the promise of the disk alone, and is counted as such."""


@dataclass(slots=True)
class Ledger:
    """What was sent, heard and stored in one life."""

    world: World
    bucket: Bucket
    sent: dict[str, set[str]] = field(default_factory=dict)
    acked: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """User → (update id, cluster that acknowledged it), in the order of sending."""
    acks: list[Ack] = field(default_factory=list)
    saved: dict[str, set[str]] | None = None
    """What the store had of each user when a cluster with a disk of its own took over; None if none did."""
    lost_disk: str = ""
    """The cluster that was taken over from: what only its disk had is not promised."""
    breaches: list[str] = field(default_factory=list)
    unconfirmed: int = 0
    _epochs: dict[str, int] = field(default_factory=dict)

    def breach(self, text: str) -> None:
        self.breaches.append(f"at {self.world.now:.3f} s: {text}")

    # -- at every moment -------------------------------------------------------------------------------------

    def watch(self, name: str, before: bytes | None, after: bytes | None) -> None:
        """Every change of the store comes by here."""
        if name.startswith(OWNERS_PREFIX):
            self._watch_owner(name, decode_record(after, name) if after else {})
        elif name.endswith("/HEAD"):
            self._watch_head(name, before, after)
        elif name.endswith(".titanmem") and before is not None and before != after:
            folder, _, file = name.rpartition("/")
            if any(info.file == file for info in self._head(f"{folder}/HEAD").versions):
                self.breach(f"{name} has {'changed' if after else 'gone'} while HEAD lists it")

    def _watch_owner(self, name: str, record: dict[str, Any]) -> None:
        known, epoch = self._epochs.get(name, 0), record.get("epoch", 0)
        announced = epoch == known and record["actor"]
        if epoch <= known and not announced:
            self.breach(f"{name}: epoch {epoch} was claimed after {known}")
        self._epochs[name] = max(epoch, known)

    def _watch_head(self, name: str, before: bytes | None, after: bytes | None) -> None:
        if after is None:
            self.breach(f"{name} is gone")
            return
        new = Head.from_record(decode_record(after, name), name)
        old = Head.from_record(decode_record(before, name), name) if before else Head(epoch=0, versions=())
        if new.epoch < old.epoch:
            self.breach(f"{name}: its epoch went back from {old.epoch} to {new.epoch}")
        was, newest = old.newest, new.newest
        if newest is None and was is None and new.begun:
            return
        if newest is None or (was is not None and newest.file != was.file and newest.version <= was.version):
            self.breach(f"{name}: its version went back from {was} to {newest}")
            return
        files = [info.file for info in new.versions]
        if len(set(files)) < len(files):
            self.breach(f"{name} lists a file twice")
        stored = self._stored(name.removesuffix("HEAD") + newest.file)
        if stored is None or hash_of(stored) != newest.hash:
            self.breach(
                f"{name} lists {newest.file}, which {'is not there' if stored is None else 'differs'}"
            )

    def _head(self, name: str) -> Head:
        stored = self._stored(name)
        return Head.from_record(decode_record(stored, name), name) if stored else Head(epoch=0, versions=())

    def _stored(self, name: str) -> bytes | None:
        found = self.bucket.objects.get(f"store/{name}")
        return found and found[0]

    def newest(self, key: UserKey) -> set[str]:
        """Updates in the newest version that the store has of a user."""
        folder = f"users/{key.tenant}/{key.user}/"
        info = self._head(folder + "HEAD").newest
        data = self._stored(folder + info.file) if info else None
        return set(history_in(data)) if data else set()

    def heard(self, shard: Any, call: Any, answer: Any) -> None:
        """An answer to an ingest leaves its shard."""
        durable_at = shard.actor._keeper.roster.journal.durable_at.get(call.update_id, 0.0)
        confirmed_at = shard.process.reads.get(OWNERS_PREFIX + shard.name, -1.0)
        ack = Ack(
            user=call.key.user, epoch=shard.epoch, left_at=self.world.now, durable_at=durable_at,
            confirmed_at=confirmed_at, unconfirmed=shard.actor._gate.unconfirmed > 0 and confirmed_at < durable_at,
        )  # fmt: skip
        self.acks.append(ack)
        self.unconfirmed += ack.unconfirmed
        if answer.duplicate is False and answer.tokens != len(call.tokens):
            self.breach(
                f"{call.update_id}: {len(call.tokens)} tokens were sent, {answer.tokens} acknowledged"
            )
        overtaken_at = min(
            (other.left_at for other in self.acks if other.user == ack.user and other.epoch > ack.epoch),
            default=float("inf"),
        )
        in_time = ack.durable_at <= ack.confirmed_at < overtaken_at
        if overtaken_at <= ack.left_at and not in_time and not ack.unconfirmed:
            self.breach(
                f"{call.update_id} was acknowledged under epoch {ack.epoch}, after a newer owner had answered"
            )

    # -- at the end ------------------------------------------------------------------------------------------

    def judge(self, key: UserKey, final: list[str]) -> None:
        """The final state of a user, as a shard that starts afresh has it."""
        user, final = key.user, [update.partition("~")[0] for update in final]  # what broken variants add
        if len(set(final)) < len(final):
            twice = sorted({update for update in final if final.count(update) > 1})
            self.breach(f"{user}: {', '.join(twice)} is in the memory more than once")
        for update in set(final) - self.sent.get(user, set()):
            self.breach(f"{user}: nobody sent {update}")
        promised = [
            update
            for update, cluster in self.acked.get(user, [])
            if self.saved is None or cluster != self.lost_disk or update in self.saved.get(user, ())
        ]
        lost = [update for update in promised if update not in final]
        if lost:
            self.breach(f"{user}: acknowledged and lost: {', '.join(lost)}")
        elif [update for update in final if update in set(promised)] != promised:
            self.breach(f"{user}: acknowledged updates are out of order: {final}")
