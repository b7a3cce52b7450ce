"""What a shard counts, as Prometheus metrics under the names of the contract; the door merges all shards' texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from actors.roster import Roster

LOCK_BUCKETS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1)
PERSIST_BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Figures:
    """One registry a shard; every series carries the shard's name."""

    def __init__(self, shard: str) -> None:
        self.registry = CollectorRegistry()
        self._shard = shard
        self.resident_users = self._gauge("titan:resident_users", "Users whose memory is in a slot.")
        self.slots_total = self._gauge("titan:slots_total", "Slots of the slab.")
        self.frozen_users = self._gauge("titan:frozen_users", "Users whose memory is not written any more.")
        self.surprise_rate = self._gauge("titan:surprise_rate", "Share of offered tokens that were written.")
        self.utilisation = self._gauge("titan:memory_utilisation", "Mean |θ_M| of residents over its bound.")
        self.recall = self._gauge("titan:recall_probe", "Mean share of residents' recall probes answered.")
        self.journal_bytes = self._gauge(
            "titan:journal_bytes", "Bytes of acknowledged tokens in the journal."
        )
        self.store_away_s = self._gauge(
            "titan:store_away_seconds", "Time since the store began to fail; 0 while it answers."
        )
        self.replication_backlog = self._gauge(
            "titan:replication_backlog", "Segments in the journal that the store does not hold yet."
        )
        self.replication_lag_s = self._gauge(
            "titan:replication_lag_seconds",
            "Age of the oldest acknowledged segment that is not in the store.",
        )
        self.running = self._gauge("vllm:num_requests_running", "Conversations that hold a lane.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Conversations that wait for a lane.")
        self.updates = self._counter("titan:chunk_updates", "Chunks offered to a memory.", "outcome")
        self.rollbacks = self._counter(
            "titan:rollbacks", "Memories taken back to an older version.", "reason"
        )
        self.lost_chunks = self._counter(
            "titan:lost_chunks", "Acknowledged chunks that neither a version nor the journal holds.", "cause"
        )
        self.store_errors = self._counter("titan:store_errors", "Calls of the store that failed.", "op")
        self.consolidations = self._counter(
            "titan:consolidations", "Consolidations of users who rest.", "outcome"
        )
        self.lock_s = self._histogram(
            "titan:write_lock_seconds", "Time a user's memory is locked.", LOCK_BUCKETS_S
        )
        self.consolidation_s = self._histogram(
            "titan:consolidation_hold_seconds", "Time a user would wait for a consolidation.", LOCK_BUCKETS_S
        )
        self.persist_s = self._histogram(
            "titan:persist_seconds", "Time to store one version.", PERSIST_BUCKETS_S
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["shard"], registry=self.registry).labels(self._shard)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["shard"], registry=self.registry, buckets=buckets).labels(self._shard)

    def _counter(self, name: str, text: str, label: str) -> Labelled:
        return Labelled(Counter(name, text, ["shard", label], registry=self.registry), self._shard)

    def of_roster(self, roster: Roster) -> None:
        """Sets the gauges of residents, journal and replication."""
        residents, journal, replicator = roster.slab.residents(), roster.journal, roster.replicator
        self.resident_users.set(len(residents))
        self.slots_total.set(roster.slab.slots)
        self.frozen_users.set(len(roster.watch.frozen))
        self.recall.set(sum(r.recall for r in residents) / len(residents) if residents else 1.0)
        self.journal_bytes.set(journal.bytes())
        self.replication_backlog.set(replicator.backlog())
        self.replication_lag_s.set(replicator.lag_s())
        seen = sum(resident.tokens_seen for resident in residents)
        self.surprise_rate.set(sum(r.tokens_written for r in residents) / seen if seen else 0.0)
        norms = [roster.slab.norm(resident) for resident in residents]
        self.utilisation.set(sum(norms) / len(norms) / roster.spec.max_norm if norms else 0.0)

    def text(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)


class Labelled:
    """A counter of this shard with one label left to give."""

    def __init__(self, counter: Counter, shard: str) -> None:
        self._counter, self._shard = counter, shard

    def add(self, label: str, amount: float = 1.0) -> None:
        self._counter.labels(self._shard, label).inc(amount)
