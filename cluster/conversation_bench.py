"""`titanmem bench conversation`: what people say in their own words, told in chat and asked for in new conversations.

Four files that were written by somebody who had not seen the training phrases (`benchmarks/needles/`): facts in one's
own words, facts that are corrected later, pairs of facts of one kind about two people, and questions that nobody's
fact answers. A fifth, `unseen`, holds facts of attributes that were taken out of the phrase book before training:
other kinds of facts, by the hand that wrote the others. Corrections and pairs are told to one user each, `freeform` and
`unseen` to users of `crowd` facts; `untold` is asked of the users of `freeform`, and what each of these was told is
asked of another one too, who must not know it. All of it goes through a `MemoryKeeper`, as in `needle_bench`.

`benchmarks/needles/development/` is such a folder by another hand, to choose knobs on: what is reported is measured on
files that chose nothing.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.keeper import MemoryKeeper, open_keeper
from actors.options import KeeperOptions
from cluster.config import Config
from cluster.needle_bench import PERSIST_TOKENS, ROOT, Report, passes_of, said_to
from storage.names import UserKey
from titanmem.speech import UNKNOWN
from titanmem.tokenizer import ChatTokenizer

FILES = ("freeform", "unseen", "corrections", "apart", "untold")
FOLDER = ROOT / "benchmarks" / "needles"
REFUSAL = UNKNOWN.strip(" .")
REPLY_TOKENS_MAX = 24

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationOptions:
    """One run over the four files."""

    folder: Path = FOLDER
    """Where the files are, one `.jsonl` for each of `FILES`."""
    crowd: int = 20
    """Facts of `freeform.jsonl` and `unseen.jsonl` that one user is told."""
    mode: str = "mac"
    model: Path | None = None
    consolidate: int | None = None
    spec: Mapping[str, object] = field(default_factory=dict)
    """Both as in `NeedleOptions`."""


def run_conversation_bench(
    options: ConversationOptions, report: Report = lambda what, share: None
) -> dict[str, Any]:
    """Shares of right answers: `{"freeform", "by_family", "corrections", "apart", "untold", "strangers", …}`."""
    return asyncio.run(_run(options, report))


async def _run(options: ConversationOptions, report: Report) -> dict[str, Any]:
    rows = {name: read_rows(options.folder / f"{name}.jsonl") for name in FILES}
    folder = options.model or Config().model_folder
    with tempfile.TemporaryDirectory(prefix="titanmem-bench-") as scratch:
        keeper = await open_keeper(
            KeeperOptions(
                model=str(folder), store_url=f"file://{scratch}/store", journal_dir=f"{scratch}/journal",
                shard="shard-0", epoch=1, slots=4, mode=options.mode, persist_tokens=PERSIST_TOKENS,
                consolidate_after_s=0.0, spec_overrides=options.spec,
            )
        )  # fmt: skip
        try:
            listener = _Listener(keeper, ChatTokenizer(folder), passes_of(options.consolidate))
            return {
                "mode": options.mode,
                "crowd": options.crowd,
                "consolidate": listener.passes,
                **await _freeform(listener, rows["freeform"], rows["untold"], options.crowd, report),
                **await _unseen(listener, rows["unseen"], options.crowd, report),
                **await _corrections(listener, rows["corrections"], report),
                **await _apart(listener, rows["apart"], report),
            }
        finally:
            await keeper.close()


@dataclass(frozen=True, slots=True)
class _Listener:
    keeper: MemoryKeeper
    tokenizer: ChatTokenizer
    passes: int

    async def tell(self, user: str, facts: Iterable[str]) -> None:
        """Each fact in a conversation of its own, then a rest."""
        for fact in facts:
            await said_to(
                self.keeper, self.tokenizer, UserKey("bench", user), fact, "read_write", REPLY_TOKENS_MAX
            )

    async def rest(self, user: str) -> None:
        if self.passes:
            await self.keeper.consolidator.consolidate(UserKey("bench", user), self.passes)

    async def ask(self, user: str, questions: Iterable[str]) -> list[str]:
        key = UserKey("bench", user)
        return [
            (await said_to(self.keeper, self.tokenizer, key, question, "read_only", REPLY_TOKENS_MAX))[0]
            for question in questions
        ]


async def _freeform(
    listener: _Listener, facts: Sequence[Row], untold: Sequence[Row], crowd: int, report: Report
) -> dict[str, Any]:
    hits: list[bool] = []
    false = refused = 0
    parts = [facts[start : start + crowd] for start in range(0, len(facts), crowd)]
    users = len(parts)
    for number, part in enumerate(parts):
        report("facts in one's own words", 0.5 * number / users)
        user = f"freeform-{number}"
        hits += await _recalled(listener, user, part)
        # What nobody told: a share of the questions to each user, so that each is asked once.
        answers = await listener.ask(user, [row["question"] for row in untold[number::users]])
        refused += sum(REFUSAL in answer for answer in answers)
        false += sum(any(holds(answer, row["answer"]) for row in part) for answer in answers)
    known = 0
    for number, part in enumerate(parts):
        stranger = f"freeform-{(number + 1) % users}" if users > 1 else "stranger"
        answers = await listener.ask(stranger, [row["question"] for row in part])
        known += sum(holds(answer, row["answer"]) for answer, row in zip(answers, part, strict=True))
    families: dict[str, list[int]] = {}
    for row, hit in zip(facts, hits, strict=True):
        found = families.setdefault(row["family"], [0, 0])
        found[0] += hit
        found[1] += 1
    asked = len(untold)
    return {
        "freeform": {"recall": sum(hits) / len(hits), "questions": len(hits)},
        "by_family": families,
        "untold": {"false_recall": false / asked, "refused": refused / asked, "questions": asked},
        "strangers": {"false_recall": known / len(facts), "questions": len(facts)},
    }


async def _unseen(listener: _Listener, facts: Sequence[Row], crowd: int, report: Report) -> dict[str, Any]:
    report("kinds of facts that training never had", 0.5)
    hits: list[bool] = []
    for start in range(0, len(facts), crowd):
        hits += await _recalled(listener, f"unseen-{start}", facts[start : start + crowd])
    return {"unseen": {"recall": sum(hits) / len(hits), "questions": len(hits)}}


async def _recalled(listener: _Listener, user: str, facts: Sequence[Row]) -> list[bool]:
    """Which facts are recalled of all that one user is told."""
    await listener.tell(user, [row["fact"] for row in facts])
    await listener.rest(user)
    replies = await listener.ask(user, [row["question"] for row in facts])
    return [holds(reply, row["answer"]) for row, reply in zip(facts, replies, strict=True)]


async def _corrections(listener: _Listener, rows: Sequence[Row], report: Report) -> dict[str, Any]:
    report("corrections", 0.6)
    await listener.tell("corrections", [row["fact"] for row in rows])
    await listener.tell("corrections", [row["correction"] for row in rows])
    await listener.rest("corrections")
    replies = await listener.ask("corrections", [row["question"] for row in rows])
    new = [holds(reply, row["answer"]) for row, reply in zip(rows, replies, strict=True)]
    old = [holds(reply, row["old"]) and not hit for row, reply, hit in zip(rows, replies, new, strict=True)]
    known = sum(new) + sum(old)
    return {
        "corrections": {
            "new": sum(new) / len(rows), "old": sum(old) / len(rows), "questions": len(rows),
            "newer_wins": sum(new) / known if known else None,
        }
    }  # fmt: skip


async def _apart(listener: _Listener, rows: Sequence[Row], report: Report) -> dict[str, Any]:
    report("two facts of one kind", 0.8)
    await listener.tell("apart", [text for row in rows for text in (row["fact"], row["other"])])
    await listener.rest("apart")
    replies = await listener.ask(
        "apart", [text for row in rows for text in (row["question"], row["other_question"])]
    )
    right = swapped = 0
    for row, first, second in zip(rows, replies[::2], replies[1::2], strict=True):
        for reply, own, other in (
            (first, row["answer"], row["other_answer"]),
            (second, row["other_answer"], row["answer"]),
        ):
            right += holds(reply, own)
            swapped += holds(reply, other) and not holds(reply, own)
    asked = 2 * len(rows)
    return {
        "apart": {
            "right": right / asked, "swapped": swapped / asked, "questions": asked,
            "kept_apart": right / (right + swapped) if right + swapped else None,
        }
    }  # fmt: skip


def holds(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply, case aside."""
    return answer.casefold() in reply.casefold()


def read_rows(path: Path) -> list[Row]:
    """JSON objects of text, one a line. Raises ValueError naming file and line."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
                raise TypeError("fields must be text")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        rows.append(row)
    return rows
