"""`titanmem bench needle`: hide facts in a long text, let a memory read it, ask in new conversations.

The whole is done by a `MemoryKeeper`, the same code that serves, with journal and store in a temporary folder; only
HTTP and Ray are not there. Nothing is teacher-forced: the model writes its reply freely.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from actors.keeper import MemoryKeeper, open_keeper
from actors.messages import ChatCall, DoneEvent, IngestCall, RenderedMessage
from actors.options import KeeperOptions
from cluster.config import Config
from storage.names import UserKey
from storage.segment import SEGMENT_TOKENS_MAX
from titanmem.consolidation import PASSES
from titanmem.corpus import read_text
from titanmem.needles import Needle, hide, read_needles
from titanmem.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parent.parent
NEEDLES = ROOT / "benchmarks" / "needles" / "plain.jsonl"
HAYSTACK = ROOT / "examples" / "decline-and-fall.txt.xz"
HAYSTACK_CHARS_MAX = 12_000_000
REPLY_TOKENS_MAX = 40
PERSIST_TOKENS = 65536
"""A store in a temporary folder is no part of what is measured: as few versions as may be."""

Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleOptions:
    """One benchmark: `runs` times for each length, with other needles each time."""

    lengths: tuple[int, ...]
    needles: Path | None = None
    haystack: Path | None = None
    mode: str = "mac"
    rule: str = "sparse"
    depths: int = 10
    queries: int = 20
    """Questions of a run."""
    facts: tuple[int, ...] = ()
    """Facts to hide in a run, one row of figures for each number; empty is as many as there are questions."""
    runs: int = 1
    seed: int = 0
    model: Path | None = None
    memory: str = "read_only"
    """How the questions see the memory: `read_only`, or `off` for the baseline that must not know."""
    consolidate: int | None = None
    """Passes over the reservoir before the questions; None is what serving does while a user rests."""
    spec: Mapping[str, object] = field(default_factory=dict)
    """Knobs of the `MemorySpec` that win over the checkpoint's."""


def passes_of(consolidate: int | None) -> int:
    """Passes over the reservoir that are made; None asks for what serving does while a user rests."""
    if consolidate is not None:
        return consolidate
    return PASSES if Config().consolidate_after_s else 0


def choose(needles: Sequence[Needle], count: int, rng: random.Random) -> list[Needle]:
    """At most `count` needles, no two of which have the same question: one would take the place of the other."""
    by_question = {needle.question: needle for needle in rng.sample(needles, len(needles))}
    return list(by_question.values())[:count]


def run_needle_bench(options: NeedleOptions, report: Report = lambda what, share: None) -> dict[str, Any]:
    """The result of the contract: `{"mode", "rule", "chunk_size", "window", "lengths": [...]}`."""
    return asyncio.run(_run(options, report))


async def _run(options: NeedleOptions, report: Report) -> dict[str, Any]:
    needles = read_needles(options.needles or NEEDLES)
    folder = options.model or Config().model_folder
    tokenizer = ChatTokenizer(folder)
    text = read_text(options.haystack or HAYSTACK)[:HAYSTACK_CHARS_MAX]
    haystack = tokenizer.encode(text)
    rows = []
    with tempfile.TemporaryDirectory(prefix="titanmem-bench-") as scratch:
        keeper = await open_keeper(
            KeeperOptions(
                model=str(folder),
                store_url=f"file://{scratch}/store",
                journal_dir=f"{scratch}/journal",
                shard="shard-0",
                epoch=1,
                slots=2,
                mode=options.mode,
                rule=options.rule,
                spec_overrides=options.spec,
                persist_tokens=PERSIST_TOKENS,
                consolidate_after_s=0.0,  # when it is to be is said below
            )
        )
        try:
            points = [*product(options.lengths, options.facts or (options.queries,))]
            share = 1 / (len(points) * options.runs)
            for index, (length, facts) in enumerate(points):
                measured = []
                for run in range(options.runs):
                    rng = random.Random(f"{options.seed}/{length}/{run}")
                    chosen = choose(needles, facts, rng)
                    key = UserKey("bench", f"n{length}f{facts}r{run}")
                    one = _Run(keeper, tokenizer, key, chosen, options)
                    done = (index * options.runs + run) * share
                    measured.append(await one.measure(haystack, length, rng, report, done, share))
                rows.append(_summed(length, measured, keeper))
            spec = keeper.roster.spec
        finally:
            await keeper.close()
    return {
        "mode": options.mode,
        "rule": options.rule,
        "memory": options.memory,
        "consolidate": passes_of(options.consolidate),
        "spec": dict(options.spec),
        "chunk_size": spec.chunk_size,
        "window": spec.window,
        "seed": options.seed,
        "runs": options.runs,
        "lengths": rows,
    }


@dataclass(frozen=True, slots=True)
class _Run:
    """One haystack for one user."""

    keeper: MemoryKeeper
    tokenizer: ChatTokenizer
    key: UserKey
    needles: list[Needle]
    options: NeedleOptions

    async def measure(
        self, haystack: np.ndarray, length: int, rng: random.Random, report: Report, done: float, share: float
    ) -> dict[str, Any]:
        facts = [self.tokenizer.encode(f"\n{needle.fact}\n") for needle in self.needles]
        tokens = hide(haystack, facts, length, self.options.depths, rng)
        started, written = time.perf_counter(), 0
        for place in range(0, len(tokens), SEGMENT_TOKENS_MAX):
            piece = tokens[place : place + SEGMENT_TOKENS_MAX]
            call = IngestCall(key=self.key, update_id=f"{place}", conversation="haystack", tokens=piece)
            written += (await self.keeper.ingest(call)).tokens_written
            report(f"{length:,} tokens: reading", done + share * 0.9 * (place + len(piece)) / length)
        ingest_s = time.perf_counter() - started
        await self.keeper.flush()
        if passes := passes_of(self.options.consolidate):
            report(f"{length:,} tokens: consolidating", done + share * 0.9)
            await self.keeper.consolidator.consolidate(self.key, passes)
        replies, first_s = [], []
        asked = self.needles[: self.options.queries]
        for number, needle in enumerate(asked):
            reply, seconds = await said_to(
                self.keeper, self.tokenizer, self.key, needle.question, self.options.memory, REPLY_TOKENS_MAX
            )
            replies.append(reply)
            first_s.append(seconds)
            report(f"{length:,} tokens: asking", done + share * (0.9 + 0.1 * number / len(asked)))
        found = [needle.found_in(reply) for needle, reply in zip(asked, replies, strict=True)]
        return {
            "found": found,
            "facts": len(facts),
            "families": [n.family for n in asked],
            "ingest_s": ingest_s,
            "first_s": first_s,
            "written": written,
            "replies": replies,
        }


async def said_to(
    keeper: MemoryKeeper, tokenizer: ChatTokenizer, key: UserKey, text: str, memory: str, most: int
) -> tuple[str, float]:
    """The reply to a message in a conversation of its own, and the seconds to its first token."""
    parts, prompt = tokenizer.render([{"role": "user", "content": text}])
    name = secrets.token_hex(8)
    call = ChatCall(
        key=key,
        request_id=name,
        update_id=name,
        conversation=name,
        messages=tuple(
            RenderedMessage(role=p.role, tokens=p.tokens, prefix_hash=p.prefix_hash) for p in parts
        ),
        generation_prompt=prompt,
        max_tokens=most,
        memory=memory,  # type: ignore[arg-type]
    )
    started, first_s = time.perf_counter(), 0.0
    async for event in keeper.chat(call):
        first_s = first_s or time.perf_counter() - started
        if isinstance(event, DoneEvent):
            return event.text, first_s
    raise RuntimeError("a reply ended without its last event")


def _summed(length: int, runs: list[dict[str, Any]], keeper: MemoryKeeper) -> dict[str, Any]:
    found = [hit for run in runs for hit in run["found"]]
    families = [family for run in runs for family in run["families"]]
    by_family = {
        family: [
            sum(hit for hit, f in zip(found, families, strict=True) if f == family),
            families.count(family),
        ]
        for family in sorted(set(families))
    }
    return {
        "tokens": length,
        "facts": runs[0]["facts"],
        "queries": len(found),
        "recall": sum(found) / len(found),
        "ttft_ms": 1000 * median(second for run in runs for second in run["first_s"]),
        "state_bytes": keeper.roster.spec.state_bytes,
        "ingest_tokens_per_s": length * len(runs) / sum(run["ingest_s"] for run in runs),
        "written_share": sum(run["written"] for run in runs) / (length * len(runs)),
        "by_family": by_family,
    }
