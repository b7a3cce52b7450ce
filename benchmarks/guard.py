"""How often the guard takes an undisturbed memory back (never, is the aim), and how soon it notices a damaged one.

    python benchmarks/guard.py [--facts 2000] [--together 1] [--rest-every 50] [--pieces 24] [--seeds 3]
        [--seed 0] [--json FILE]

One user of the real keeper on the shipped model is told facts (benchmarks/needles/heldout.jsonl), so many together in a
turn, and then reads a book that it never saw, in pieces of 4,096 tokens. A version is stored as in serving, after
every 4,096 tokens, and after so many facts or pieces the user rests: stored, consolidated, stored. Each time the
guard has judged.

Then the memory, as it is, goes to users who are damaged in RAM, each in one way, and are told more facts, one an
update, stored after each: after how many is the damage noticed, and is the memory then bit for bit what an undamaged
twin's is? What answers its probes is not noticed, by intention. Noise and what is zeroed are of the rows of W₃ that
hold anything; noise in units of their root mean square.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import lzma
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from actors.keeper import MemoryKeeper, open_keeper  # noqa: E402
from actors.messages import IngestCall  # noqa: E402
from actors.options import KeeperOptions  # noqa: E402
from benchmarks.report import report  # noqa: E402
from cluster.config import Config  # noqa: E402
from cluster.needle_bench import said_to  # noqa: E402
from storage.names import UserKey  # noqa: E402
from storage.segment import SEGMENT_TOKENS_MAX  # noqa: E402
from titanmem.tokenizer import ChatTokenizer  # noqa: E402

TELLER = UserKey("bench", "teller")
UPDATES = 3
"""Told to a damaged memory at most."""

Damage = Callable[[Tensor, torch.Generator], Tensor]


def noise(size: float) -> Damage:
    return lambda rows, dice: (
        rows + size * rows.float().square().mean().sqrt() * torch.randn(rows.shape, generator=dice)
    )


def chosen(share: float, new: Callable[[Tensor], Tensor]) -> Damage:
    """That share of the rows, at random, as `new` makes them."""

    def damage(rows: Tensor, dice: torch.Generator) -> Tensor:
        hit = torch.rand(len(rows), generator=dice) < share
        return torch.where(hit[:, None], new(rows), rows)

    return damage


def one_number(value: float) -> Damage:
    def damage(rows: Tensor, dice: torch.Generator) -> Tensor:
        rows = rows.clone()
        rows[int(torch.randint(len(rows), (1,), generator=dice)), 0] = value
        return rows

    return damage


DAMAGES: dict[str, Damage] = {
    **{f"noise {size:g} rms": noise(size) for size in (0.3, 1.0, 3.0, 10.0, 30.0)},
    **{f"{share:.0%} of rows zeroed": chosen(share, torch.zeros_like) for share in (0.05, 0.2, 0.5, 0.8, 1.0)},
    **{f"{share:.0%} of rows negated": chosen(share, torch.neg) for share in (0.05, 0.2, 0.5, 1.0)},
    "one NaN": one_number(float("nan")),
    "one infinity": one_number(float("inf")),
}  # fmt: skip


async def taken_back(keeper: MemoryKeeper) -> dict[str, int]:
    """Rollbacks by reason, so far."""
    text = (await keeper.metrics()).decode()
    found = re.findall(r'titan:rollbacks_total\{reason="([^"]+)"[^}]*\} ([0-9.]+)', text)
    return {reason: int(float(count)) for reason, count in found if float(count)}


async def tell(keeper: MemoryKeeper, key: UserKey, tokens: np.ndarray, name: str) -> None:
    await keeper.ingest(IngestCall(key=key, update_id=name, conversation=name, tokens=tokens))


async def rest(keeper: MemoryKeeper, tally: dict[str, Any]) -> None:
    """What an idle user gets; whatever the guard says is counted."""
    await keeper.flush()
    resident = keeper.roster.slab.peek(TELLER)
    assert resident is not None
    tally["waits"] += resident.crowded
    tally["recall_min"] = min(tally["recall_min"], round(resident.recall, 3))
    await keeper.consolidator.consolidate(TELLER)
    await keeper.flush()
    tally["rests"] += 1


async def undisturbed(
    keeper: MemoryKeeper,
    tokenizer: ChatTokenizer,
    facts: list[str],
    together: int,
    rest_every: int,
    book: np.ndarray,
) -> dict[str, Any]:
    """A long life without any damage."""
    tally: dict[str, Any] = {
        "facts": len(facts),
        "book_tokens": len(book),
        "rests": 0,
        "waits": 0,
        "recall_min": 1.0,
    }
    started = time.perf_counter()
    for number in range(together, len(facts) + 1, together):
        await said_to(
            keeper, tokenizer, TELLER, "\n".join(facts[number - together : number]), "read_write", 1
        )
        if number // rest_every > (number - together) // rest_every:
            await rest(keeper, tally)
            print(
                f"{number} facts, {time.perf_counter() - started:.0f} s: {tally}", file=sys.stderr, flush=True
            )
    pieces = range(0, len(book), SEGMENT_TOKENS_MAX)
    for number, place in enumerate(pieces, 1):
        await tell(keeper, TELLER, book[place : place + SEGMENT_TOKENS_MAX], f"book{place}")
        if number % rest_every == 0 or number == len(pieces):
            await rest(keeper, tally)
    about = await keeper.describe(TELLER)
    return {
        **tally, "rollbacks": await taken_back(keeper), "frozen": about["frozen"],
        "utilisation": round(about["utilisation"], 3), "versions_to": about["memory_version"],
    }  # fmt: skip


async def twin(keeper: MemoryKeeper, file: bytes, key: UserKey, facts: list[np.ndarray]) -> list[Tensor]:
    """The slot of a user who is not damaged, after each fact."""
    await keeper.import_(key, file)
    slots = []
    for number, tokens in enumerate(facts):
        await tell(keeper, key, tokens, f"more{number}")
        await keeper.flush()
        slots.append(slot_of(keeper, key).clone())
    return slots


def slot_of(keeper: MemoryKeeper, key: UserKey) -> Tensor:
    resident = keeper.roster.slab.peek(key)
    assert resident is not None, "nobody else wants its slot"
    return keeper.roster.slab.written_SHD[resident.slot]


async def damaged(
    keeper: MemoryKeeper, file: bytes, key: UserKey, facts: list[np.ndarray], right: list[Tensor], spoil: Damage,
    seed: int,
) -> tuple[int, bool, float]:  # fmt: skip
    """After how many updates the damage was noticed, 0 for never; whether all is as it should be then; and the share of
    probes that was answered when they were first asked."""
    await keeper.import_(key, file)
    slot = slot_of(keeper, key)
    rows = slot.any(-1).nonzero()[:, 0]
    slot[rows] = spoil(slot[rows].float(), torch.Generator().manual_seed(seed)).half()
    before, recall = await taken_back(keeper), 1.0
    for number, tokens in enumerate(facts):
        await tell(keeper, key, tokens, f"more{number}")
        await keeper.flush()
        resident = keeper.roster.slab.peek(key)
        assert resident is not None, "nobody else wants its slot"
        recall = recall if number else resident.recall
        if await taken_back(keeper) != before:
            return number + 1, torch.equal(slot_of(keeper, key), right[number]), recall
    return 0, False, recall


async def run(
    facts: list[str], told: int, together: int, rest_every: int, pieces: int, seeds: int
) -> dict[str, Any]:
    tokenizer = ChatTokenizer(Config().model_folder)
    text = lzma.decompress((ROOT / "examples" / "decline-and-fall.txt.xz").read_bytes()).decode("utf-8")
    book = tokenizer.encode(text[: 8 * SEGMENT_TOKENS_MAX * pieces])[: SEGMENT_TOKENS_MAX * pieces]
    with tempfile.TemporaryDirectory(prefix="titanmem-guard-") as scratch:
        keeper = await open_keeper(KeeperOptions(
            model=str(Config().model_folder), store_url=f"file://{scratch}/store", journal_dir=f"{scratch}/journal",
            shard="shard-0", epoch=1, slots=2, idle_flush_s=3600.0, consolidate_after_s=0.001,
        ))  # fmt: skip
        keeper.consolidator.idle_s = 3600.0  # it consolidates, and when is said here
        life = await undisturbed(keeper, tokenizer, facts[:told], together, rest_every, book)
        print(json.dumps(life), file=sys.stderr, flush=True)
        file = await keeper.export(TELLER)
        more = [tokenizer.encode(f"\n{fact}\n") for fact in facts[told : told + UPDATES]]
        right = await twin(keeper, file, UserKey("bench", "twin"), more)
        rows = []
        for name, spoil in DAMAGES.items():
            trials = [
                await damaged(keeper, file, UserKey("bench", f"d{len(rows)}-{n}"), more, right, spoil, n)
                for n in range(seeds)
            ]
            after = [updates for updates, _, _ in trials if updates]
            row = {
                "damage": name, "trials": seeds, "noticed": len(after), "after_updates": after,
                "healed": sum(is_right for _, is_right, _ in trials), "recall": [round(r, 3) for _, _, r in trials],
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        await keeper.close()
    return {"undisturbed": life, "damaged": rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=2000)
    parser.add_argument("--together", type=int, default=1, help="facts a turn")
    parser.add_argument("--rest-every", type=int, default=50, help="facts or pieces between two rests")
    parser.add_argument("--pieces", type=int, default=24, help="pieces of the book, 4,096 tokens each")
    parser.add_argument("--seeds", type=int, default=3, help="trials of each kind of damage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    needles = (ROOT / "benchmarks" / "needles" / "heldout.jsonl").read_text("utf-8").splitlines()
    facts = [json.loads(line)["fact"] for line in needles]
    random.Random(options.seed).shuffle(facts)
    told = min(options.facts, len(facts) - UPDATES)
    found = asyncio.run(run(facts, told, options.together, options.rest_every, options.pieces, options.seeds))
    report(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
