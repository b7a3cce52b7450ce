"""Pieces of a document that come in one call: the bits of pieces that come one by one, each written once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import MemoryFrozen
from actors.keeper import open_keeper
from actors.messages import IngestCall, IngestOutcome
from storage.segment import SEGMENT_TOKENS_MAX
from tests.actors.test_keeper import ALICE, crash, live, opened, same, state

TOKENS = np.random.default_rng(0).integers(4, 300, 3 * SEGMENT_TOKENS_MAX + 70).astype(np.int32)


def call(begin: int, end: int) -> IngestCall:
    """Pieces `begin` to `end` of the document, which has four."""
    tokens = TOKENS[begin * SEGMENT_TOKENS_MAX : end * SEGMENT_TOKENS_MAX]
    return IngestCall(key=ALICE, update_id="book", conversation="book", tokens=tokens, first=begin)


@pytest.fixture
async def one_by_one(options: Any, model: Path, tmp_path: Path) -> tuple:
    """What the document makes of a memory, a piece a call, beside which nothing happens."""
    async with opened(
        replace(options, journal_dir=tmp_path / "other", store_url=f"file://{tmp_path}/other")
    ) as keeper:
        await live(keeper, model)
        for number in range(4):
            outcome = await keeper.ingest(call(number, number + 1))
            assert (outcome.pieces, outcome.duplicates) == (1, 0)
        return await state(keeper, ALICE)


def counts(outcome: IngestOutcome) -> tuple[int, int, int]:
    return outcome.pieces, outcome.duplicates, outcome.tokens


async def test_one_call_leaves_the_same_bits_as_one_a_piece(options, model, one_by_one):
    async with opened(options) as keeper:
        await live(keeper, model)
        before = await state(keeper, ALICE)
        outcome = await keeper.ingest(call(0, 4))
        assert same(await state(keeper, ALICE), one_by_one)
        assert counts(outcome) == (4, 0, len(TOKENS))
        assert outcome.memory_version == before[2] + 4
        assert outcome.chunks == -(-len(TOKENS) // keeper.roster.spec.chunk_size)
        again = await keeper.ingest(call(0, 4))
        assert again == replace(outcome, duplicates=4)
        assert again.duplicate


@pytest.mark.parametrize("known_to", ["the memory", "the journal alone"])
async def test_what_is_written_already_is_left_out(options, model, one_by_one, known_to):
    async with opened(options) as keeper:
        await live(keeper, model)
        await keeper.ingest(call(0, 2))
        if known_to == "the journal alone":
            async with keeper.roster.turn(ALICE) as resident:
                resident.seen.clear()
        outcome = await keeper.ingest(call(1, 4))
        assert counts(outcome) == (3, 1, len(TOKENS) - SEGMENT_TOKENS_MAX)
        assert not outcome.duplicate
        assert same(await state(keeper, ALICE), one_by_one)


async def test_a_fold_that_fails_in_the_middle_loses_nothing(options, model, one_by_one, monkeypatch):
    async with opened(options) as keeper:
        await live(keeper, model)
        folds, fold = [], keeper.roster.writer.fold

        def fails_once(resident: Any, segment: Any) -> Any:
            folds.append(segment.update_id)
            if len(folds) == 3:
                raise MemoryError("no room")
            return fold(resident, segment)

        monkeypatch.setattr(keeper.roster.writer, "fold", fails_once)
        with pytest.raises(MemoryError):
            await keeper.ingest(call(0, 4))
        assert folds == ["book:0", "book:1", "book:2"]
        assert (await keeper.ingest(call(0, 4))).duplicate, "all of it was in the journal"
        assert same(await state(keeper, ALICE), one_by_one)


async def test_a_crash_between_journal_and_folds_loses_nothing(options, model, one_by_one, monkeypatch):
    async def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    keeper = await open_keeper(options)
    await live(keeper, model)
    monkeypatch.setattr(keeper.roster, "fold", killed)
    with pytest.raises(RuntimeError, match="killed"):
        await keeper.ingest(call(0, 4))
    await crash(keeper)
    async with opened(options, epoch=2) as keeper:
        assert same(await state(keeper, ALICE), one_by_one)
        assert (await keeper.ingest(call(0, 4))).duplicate


async def test_a_frozen_memory_answers_for_what_it_has_and_takes_no_more(options):
    async with opened(options) as keeper:
        await keeper.ingest(call(0, 2))
        async with keeper.roster.turn(ALICE) as resident:
            resident.frozen = True
        assert (await keeper.ingest(call(0, 2))).duplicate
        with pytest.raises(MemoryFrozen):
            await keeper.ingest(call(0, 3))


async def test_a_piece_that_is_too_long_is_refused_whole(options):
    async with opened(options) as keeper:
        with pytest.raises(ValueError, match=rf"{len(TOKENS)} tokens: at most {SEGMENT_TOKENS_MAX}"):
            await keeper.ingest(replace(call(0, 4), first=None))
        assert not keeper.roster.journal.users_pending()
