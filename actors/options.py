"""What a shard's keeper is opened with: one plain record, picklable, no Ray and no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DURABILITIES: tuple[str, ...] = ("local", "replicated", "sync")
"""When an answer may end: `local` = its tokens are in the journal on this node's disk; `replicated` = the same, and the
shared store has them at most `replicate_interval_s` later; `sync` = the store has them."""

JOURNAL_SUFFIX = ".journal"


def journal_path(journal_dir: Path | str, shard: str) -> Path:
    """The journal's database of one shard; the handover at a cold start looks for files by this name."""
    return Path(journal_dir) / f"{shard}{JOURNAL_SUFFIX}"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperOptions:
    """All that one `MemoryKeeper` needs to serve its users; whoever makes it has checked the values."""

    model: str
    """Folder of θ_F, tokenizer and chat template."""
    store_url: str
    """Absolute `file://`, `s3://` or `redis://` URL of the memory store."""
    journal_dir: str
    """Absolute local folder of journals; this shard's file is `journal`."""
    shard: str
    """Name of the shard, `shard-0` and so on."""
    epoch: int
    """Fencing epoch that this start of the shard has claimed."""
    buckets: frozenset[int] | None = None
    """Buckets whose users are this shard's; None = all."""
    slots: int = 64
    """Users whose θ_M is resident at once."""
    mode: str = "mac"
    rule: str = "sparse"
    spec_overrides: Mapping[str, object] = field(default_factory=dict)
    """Knobs of `MemorySpec` that the operator has set; they win over the checkpoint's."""
    persist_tokens: int = 4096
    """A new stored version after so many folded tokens of a user."""
    idle_flush_s: float = 30.0
    """A user without requests for so long is persisted."""
    consolidate_after_s: float = 20.0
    """A user without requests for so long is consolidated, if anything was written since the last time; 0 = never."""
    queue_max: int = 256
    """Requests that may wait in this shard; more are refused with `QueueFull`."""
    durability: str = "local"
    """One of DURABILITIES."""
    replicate_interval_s: float = 2.0
    """With durability `replicated`: how long after an answer its tokens are in the store at the latest."""
    sync_timeout_s: float = 10.0
    """With durability `sync`: how long an answer waits for the store before it ends with `NotReplicated`."""
    unconfirmed_s: float = 60.0
    """With durability `replicated`: how long answers go out while nobody can read whose shard this is."""
    snapshots_url: str = ""
    """Where the cold backups are, for the marks of erased users; empty: there are none."""
    seed: int = 0
    """Of sampling, where a request brings none."""

    @property
    def grace_s(self) -> float:
        """How long answers may go out unconfirmed: under `local` without end, under `sync` never."""
        return {"local": math.inf, "replicated": self.unconfirmed_s, "sync": 0.0}[self.durability]

    @property
    def journal(self) -> Path:
        return journal_path(self.journal_dir, self.shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """What one start of a shard actor is given."""

    keeper: KeeperOptions
    buckets: frozenset[int]
    """Buckets that this shard owns, as of `map_version`."""
    map_version: int
    open_keeper: str = "actors.keeper:open_keeper"
    """`module:function`, an async function of `KeeperOptions`."""
    set_up: str = ""
    """`module:function` of `endpoint` and `instance`, called once in the shard's process; may be empty."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector of the shard's spans."""
