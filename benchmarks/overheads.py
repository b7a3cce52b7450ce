"""What it costs that nothing is lost: the durable acknowledgement alone, and chat and ingest with and without it.

    python benchmarks/overheads.py [--acks 320] [--turns 40] [--pieces 12] [--seed 0] [--stores file,s3,redis]
        [--json FILE]

An acknowledgement is a segment of 256 tokens in the journal (group commit), with `sync` also in the store, and then a
read of the ownership record. `store` is a folder, a ministack or a redis-server (appendfsync always) on this machine.
Each row is checked before it counts: everything acknowledged is in the journal, with `sync` in the store too, and a
newer owner is heard of at once.

Chat and ingest run in the real keeper on the shipped model, in process, turn about with journal and fencing on and off;
off is a journal that keeps nothing and a gate that asks nobody, put in place here. Ratios are on over off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import lzma
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from actors import keeper as keeper_module  # noqa: E402
from actors.figures import Figures  # noqa: E402
from actors.keeper import MemoryKeeper, open_keeper  # noqa: E402
from actors.messages import ChatCall, IngestCall, RenderedMessage, TokenEvent  # noqa: E402
from actors.options import DURABILITIES, KeeperOptions  # noqa: E402
from actors.ownership import Gate, Grace, claim, confirm  # noqa: E402
from actors.replicator import Replicator  # noqa: E402
from benchmarks.report import report  # noqa: E402
from cluster.config import Config  # noqa: E402
from storage.errors import Fenced  # noqa: E402
from storage.journal import Journal  # noqa: E402
from storage.names import UserKey  # noqa: E402
from storage.segment import SEGMENT_TOKENS_MAX, Segment  # noqa: E402
from storage.store import MemoryStore, open_store  # noqa: E402
from tests.servers import ministack, redis_server  # noqa: E402
from titanmem.tokenizer import ChatTokenizer  # noqa: E402

USERS = (1, 8, 64)
TOKENS = 256
REPLY_TOKENS = 24
CHATTERS = 8


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": round(1e3 * statistics.median(ordered), 3), "p99_ms": round(1e3 * p99, 3)}


# -- the acknowledgement alone ------------------------------------------------------------------------------------


def segment(key: UserKey, chunk: int) -> Segment:
    return Segment(
        key=key, update_id=f"u{chunk}", conversation="c", role="user", context=np.zeros(0, np.int32),
        tokens=np.full(TOKENS, chunk, np.int32), first_chunk_id=chunk, last_chunk_id=chunk, epoch=1,
    )  # fmt: skip


async def acknowledged(url: str, journals: str, durability: str, users: int, acks: int) -> dict[str, float]:
    """One row: `users` at once, `acks` in all."""
    store = open_store(url)
    owner = claim(store, "shard-0", cluster="bench", incarnation="i", take_over=True)
    options = KeeperOptions(
        model="",
        store_url=url,
        journal_dir=journals,
        shard="shard-0",
        epoch=owner.epoch,
        durability=durability,
    )
    journal = Journal(options.journal)
    replicator = Replicator(journal, store.segments, options, Figures("shard-0"))
    replicator.start()
    gate = Gate(
        partial(confirm, store, "shard-0", owner.epoch), Grace(seconds=options.grace_s, held=journal.is_held)
    )
    each, keys = -(-acks // users), [UserKey("bench", f"u{n}") for n in range(users)]
    taken: list[float] = []

    async def speak(key: UserKey) -> None:
        for chunk in range(1, each + 1):
            started = time.perf_counter()
            said = segment(key, chunk)
            await asyncio.wrap_future(journal.append(said))
            replicator.add(said, ())
            await replicator.durable(key)
            await gate.confirm()
            taken.append(time.perf_counter() - started)

    await speak(UserKey("bench", "first"))  # connections and pages are there from here on
    taken.clear()
    began, reads = time.perf_counter(), gate.reads
    await asyncio.gather(*(speak(key) for key in keys))
    wall_s = time.perf_counter() - began
    await checked(store, journal, gate, keys, each, in_store=durability == "sync")
    await replicator.close()
    await asyncio.to_thread(journal.close)
    reads_each = round((gate.reads - reads) / len(taken), 3)
    return {**milliseconds(taken), "acks_per_s": round(len(taken) / wall_s, 1), "reads_per_ack": reads_each}


async def checked(
    store: MemoryStore, journal: Journal, gate: Gate, keys: list[UserKey], each: int, *, in_store: bool
) -> None:
    """Nothing that was acknowledged is missing, and no answer goes out under an epoch that is over."""
    for key in keys:
        assert len(journal.pending(key)) == each, f"{key}: the journal lacks something"
        pieces = store.segments.pieces(key) if in_store else []
        packets = filter(None, (store.segments.read(key, piece) for piece in pieces))
        held = {said.update_id for packet in packets for said in packet.segments}
        assert not in_store or len(held) == each, f"{key}: the store lacks something"
    assert gate.unconfirmed == 0, "the store was there all the time"
    claim(store, "shard-0", cluster="other", incarnation="j", take_over=True)
    try:
        await gate.confirm()
    except Fenced:
        return
    raise AssertionError("a gate let somebody through whose epoch is over")


@contextlib.contextmanager
def store_of(kind: str, folder: Path) -> Iterator[str]:
    """A URL of an empty store of that kind; `{}` in it takes a name."""
    if kind == "file":
        yield f"file://{folder}/store-{{}}"
    elif kind == "s3":
        with ministack(folder) as server:
            server.make_bucket("bench")
            yield server.url("bench", "{}")
    else:
        with redis_server(folder) as server:
            yield server.url("{}")


def acknowledgements(kinds: list[str], acks: int, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for kind in kinds:
        place = folder / kind
        place.mkdir()
        with store_of(kind, place) as url:
            for durability in DURABILITIES:
                for users in USERS:
                    name = f"{durability}{users}"
                    row = asyncio.run(
                        acknowledged(url.format(name), f"{place}/{name}", durability, users, acks)
                    )
                    rows.append({"store": kind, "durability": durability, "users": users, **row})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


# -- chat and ingest, with and without ----------------------------------------------------------------------------


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class NoJournal:
    """Takes everything and keeps nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append_all(self, segments: Sequence[Segment], seen: Sequence[int] = ()) -> Future[list[str]]:
        return done([])

    def set_outcome(self, *_: Any) -> Future[None]:
        return done(None)

    def trim(self, *_: Any) -> Future[int]:
        return done(0)

    def outcome(self, *_: Any) -> None:
        return None

    def pending(self, *_: Any) -> list[Segment]:
        return []

    unreplicated = seen = users_pending = pending

    def bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


@dataclass(kw_only=True)
class Side:
    """One keeper, with journal and gate or without, and what it took."""

    keeper: MemoryKeeper
    gate: Gate | None
    first_s: list[float] = field(default_factory=list)
    turn_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    async def confirm(self) -> None:
        if self.gate is not None:
            await self.gate.confirm()

    async def chat(self, tokenizer: ChatTokenizer, key: UserKey, text: str) -> None:
        parts, prompt = tokenizer.render([{"role": "user", "content": text}])
        name = secrets.token_hex(8)
        call = ChatCall(
            key=key, request_id=name, update_id=name, conversation=name, generation_prompt=prompt,
            messages=tuple(RenderedMessage(role=p.role, tokens=p.tokens, prefix_hash=p.prefix_hash) for p in parts),
            max_tokens=REPLY_TOKENS,
        )  # fmt: skip
        started, first_s = time.perf_counter(), 0.0
        async for event in self.keeper.chat(call):
            if isinstance(event, TokenEvent) and not first_s:
                first_s = time.perf_counter() - started
        await self.confirm()
        self.first_s.append(first_s)
        self.turn_s.append(time.perf_counter() - started)

    async def ingest(self, tokens: np.ndarray, number: int) -> None:
        call = IngestCall(
            key=UserKey("bench", "reader"), update_id=f"p{number}", conversation="book", tokens=tokens
        )
        started = time.perf_counter()
        await self.keeper.ingest(call)
        await self.confirm()
        self.tokens_per_s.append(len(tokens) / (time.perf_counter() - started))


async def opened(folder: Path, *, on: bool) -> Side:
    url = f"file://{folder}/store"
    store = open_store(url)
    owner = claim(store, "shard-0", cluster="bench", incarnation="i", take_over=True)
    options = KeeperOptions(
        model=str(Config().model_folder), store_url=url, journal_dir=f"{folder}/journal", shard="shard-0",
        epoch=owner.epoch, slots=CHATTERS + 2, consolidate_after_s=0.0, idle_flush_s=3600.0, persist_tokens=10**9,
    )  # fmt: skip
    with contextlib.nullcontext() if on else patch.object(keeper_module, "Journal", NoJournal):
        keeper = await open_keeper(options)
    return Side(
        keeper=keeper, gate=Gate(partial(confirm, store, "shard-0", owner.epoch), Grace()) if on else None
    )


async def chatted(
    sides: dict[str, Side], tokenizer: ChatTokenizer, lines: list[str], users: int, turns: int
) -> dict[str, Any]:
    """Figures of both sides with `users` who speak at once; turn about, so that what drifts drifts for both."""
    keys = [UserKey("bench", f"c{users}-{n}") for n in range(users)]
    for turn in range(-1, -(-turns // users)):
        said = [lines[(turn * users + n) % len(lines)] for n in range(users)]
        for name in ("on", "off") if turn % 2 else ("off", "on"):
            side = sides[name]
            await asyncio.gather(*map(partial(side.chat, tokenizer), keys, said))
            if turn < 0:  # the first turn brings users in
                side.first_s, side.turn_s = [], []
    row: dict[str, Any] = {"users": users, "turns": len(sides["on"].turn_s)}
    for name, side in sides.items():
        row[name] = {"first_token": milliseconds(side.first_s), "turn": milliseconds(side.turn_s)}
    on, off = sides["on"], sides["off"]
    row["first_token_ratio"] = round(statistics.median(on.first_s) / statistics.median(off.first_s), 3)
    row["turn_ratio"] = round(statistics.median(on.turn_s) / statistics.median(off.turn_s), 3)
    for side in sides.values():
        side.first_s, side.turn_s = [], []
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


async def read_in(sides: dict[str, Side], tokens: np.ndarray, pieces: int) -> dict[str, Any]:
    """Tokens a second of a book in whole pieces; the first piece brings the user in."""
    for number in range(-1, pieces):
        part = tokens[(number + 1) * SEGMENT_TOKENS_MAX :][:SEGMENT_TOKENS_MAX]
        for name in ("on", "off") if number % 2 else ("off", "on"):
            await sides[name].ingest(part, number)
            if number < 0:
                sides[name].tokens_per_s = []
    speed = {name: round(statistics.median(side.tokens_per_s)) for name, side in sides.items()}
    return {"tokens_per_s": speed, "ratio": round(speed["on"] / speed["off"], 3), "pieces": pieces}


async def served(folder: Path, lines: list[str], book: str, turns: int, pieces: int) -> dict[str, Any]:
    tokenizer = ChatTokenizer(Config().model_folder)
    sides = {name: await opened(folder / name, on=name == "on") for name in ("on", "off")}
    chat = [await chatted(sides, tokenizer, lines, users, turns) for users in (1, CHATTERS)]
    tokens = tokenizer.encode(book[: 8 * SEGMENT_TOKENS_MAX * (pieces + 1)])
    ingest = await read_in(sides, tokens, pieces)
    for side in sides.values():
        assert side.gate is None or side.gate.unconfirmed == 0, "the store was there all the time"
        await side.keeper.close()
    return {"chat": chat, "ingest": ingest}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acks", type=int, default=320, help="acknowledgements a row")
    parser.add_argument("--turns", type=int, default=40, help="chat turns a side and number of users")
    parser.add_argument("--pieces", type=int, default=12, help="pieces of 4,096 tokens a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", default="file,s3,redis")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="titanmem-overheads-") as scratch:
        folder = Path(scratch)
        acks = acknowledgements([kind for kind in options.stores.split(",") if kind], options.acks, folder)
        rows: dict[str, Any] = {}
        if options.turns:
            needles = (ROOT / "benchmarks" / "needles" / "heldout.jsonl").read_text("utf-8").splitlines()
            lines = [json.loads(line)["fact"] for line in needles]
            random.Random(options.seed).shuffle(lines)
            book = lzma.decompress((ROOT / "examples" / "decline-and-fall.txt.xz").read_bytes()).decode(
                "utf-8"
            )
            rows = asyncio.run(served(folder, lines, book, options.turns, options.pieces))
    document = {
        "acknowledgement": acks,
        **rows,
    }
    report(document, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
