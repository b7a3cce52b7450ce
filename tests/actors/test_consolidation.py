"""Consolidation in a whole shard: journalled, exactly once, the same bits whatever happens, and in nobody's way."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors import consolidation
from actors.keeper import MemoryKeeper, collect, open_keeper
from storage.errors import CorruptIndex, JournalFull
from storage.memory import Replay
from storage.names import UserKey
from storage.titanmem import decode, encode
from tests.actors.test_keeper import (
    ALICE,
    BOB,
    CAROL,
    chat,
    crash,
    opened,
    piece,
    same,
    state,
)
from titanmem.reservoir import Reservoir


def entries(keeper: MemoryKeeper, key: UserKey) -> bytes:
    """Every bit of a resident's reservoir."""
    resident = keeper.roster.slab.peek(key)
    assert resident is not None
    return b"".join(getattr(resident.reservoir, name).tobytes() for name in Reservoir.__slots__)


async def consolidated(keeper: MemoryKeeper, key: UserKey, passes: int = 2) -> tuple:
    """The user's state after a consolidation that changed it."""
    before = await state(keeper, key)
    assert await keeper.consolidator.consolidate(key, passes)
    after = await state(keeper, key)
    assert not torch.equal(after[0], before[0])
    assert after[1] == before[1], "a replay surprises nobody"
    assert after[2:4] == (before[2] + 1, before[3] + 1), "one version, one chunk"
    assert after[4:] == before[4:]
    return after


async def test_a_crash_after_a_consolidation_changes_no_bit(options, model):
    keeper = await open_keeper(options)
    await keeper.ingest(piece(ALICE, 1))
    await consolidated(keeper, ALICE)
    await keeper.ingest(piece(ALICE, 2))
    before, kept = await state(keeper, ALICE), entries(keeper, ALICE)
    roles = [segment.role for segment in keeper.roster.journal.pending(ALICE)]
    assert roles == ["document", "replay", "document"]
    await crash(keeper)
    async with opened(options, epoch=2) as again:
        assert same(await state(again, ALICE), before)
        assert entries(again, ALICE) == kept


async def test_what_is_journalled_and_not_yet_in_place_comes_once_with_the_replay(options, monkeypatch):
    keeper = await open_keeper(options)
    await keeper.ingest(piece(ALICE, 1))
    wanted = await consolidated(keeper, ALICE)
    await keeper.roster.flush()
    await keeper.ingest(piece(ALICE, 2))

    async def killed(*_):
        raise ConnectionAbortedError("killed between journal and slot")

    monkeypatch.setattr(keeper.roster, "settle", killed)
    with pytest.raises(ConnectionAbortedError):
        await keeper.consolidator.consolidate(ALICE, 2)
    await crash(keeper)
    async with opened(options, epoch=2) as again:
        first = await state(again, ALICE)
        assert first[2:4] == (wanted[2] + 2, wanted[3] + 5), "four chunks of the piece, and the replay"
        resident = again.roster.slab.get(ALICE)
        assert resident is not None
        assert resident.consolidated == resident.tokens_written
    async with opened(
        replace(options, store_url=options.store_url + "2", journal_dir=options.journal_dir + "2")
    ) as other:
        await other.ingest(piece(ALICE, 1))
        await other.consolidator.consolidate(ALICE, 2)
        await other.ingest(piece(ALICE, 2))
        await other.consolidator.consolidate(ALICE, 2)
        assert same(await state(other, ALICE), first), "as if nothing had happened"


async def test_eviction_and_return_change_no_bit(options):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        wanted = await consolidated(keeper, ALICE)
        kept = entries(keeper, ALICE)
        for user in (BOB, CAROL):  # two slots: alice has to go
            await keeper.ingest(piece(user, 9))
        assert keeper.roster.slab.peek(ALICE) is None
        assert same(await state(keeper, ALICE), wanted)
        assert entries(keeper, ALICE) == kept
        resident = keeper.roster.slab.get(ALICE)
        assert resident is not None
        assert resident.consolidated == resident.tokens_written > 0, "it is known to be consolidated"


async def test_an_exported_file_carries_the_reservoir_and_an_older_one_has_none(options):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        file = await keeper.export(ALICE)
        memory = decode(file)
        assert memory.replay is not None
        await keeper.import_(BOB, file)
        assert entries(keeper, BOB) == entries(keeper, ALICE)
        await keeper.import_(CAROL, encode(replace(memory, replay=None)))
        assert torch.equal((await state(keeper, CAROL))[0], (await state(keeper, ALICE))[0])
        resident = keeper.roster.slab.get(CAROL)
        assert resident is not None
        assert len(resident.reservoir) == 0
        assert not await keeper.consolidator.consolidate(CAROL, 2), "there is nothing to replay"


async def test_a_file_with_entries_that_nobody_wrote_is_refused(options):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        memory = decode(await keeper.export(ALICE))
        before = await state(keeper, ALICE)
        assert memory.replay is not None
        loud = Replay(
            columns=memory.replay.columns, values=memory.replay.values, tokens=memory.replay.tokens,
            gates=memory.replay.gates + np.float16(2),
        )  # fmt: skip
        with pytest.raises(CorruptIndex, match="gates"):
            await keeper.import_(ALICE, encode(replace(memory, replay=loud)))
        assert same(await state(keeper, ALICE), before)


async def test_forgetting_removes_it(options):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        await keeper.flush()
        await keeper.forget(ALICE)
        assert not await keeper.consolidator.consolidate(ALICE, 2)
        await keeper.ingest(piece(ALICE, 2, 1))
        resident = keeper.roster.slab.get(ALICE)
        assert resident is not None
        assert len(resident.reservoir) <= 1


async def test_no_reservoir_is_no_consolidation(options):
    overrides = {**options.spec_overrides, "reservoir": 0}
    async with opened(options, spec_overrides=overrides) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        assert decode(await keeper.export(ALICE)).replay is None
        assert not await keeper.consolidator.consolidate(ALICE, 2)
        without = (await keeper.describe(ALICE))["bytes"]
    async with opened(options, epoch=2) as keeper:
        # K = 8: 8 columns of 4 bytes, 8 values of 2, token and gate.
        assert (await keeper.describe(ALICE))["bytes"] == without + 4096 * (8 * 6 + 6)


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 what is waited for are plain fields of the shard
            await asyncio.sleep(0.01)


async def test_a_user_who_rests_is_consolidated_once_and_stored(options):
    async with opened(options, consolidate_after_s=0.2, idle_flush_s=0.3) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        resident = keeper.roster.slab.get(ALICE)
        assert resident is not None
        version = resident.memory_version
        assert resident.consolidated == 0
        await until(lambda: resident.consolidated == resident.tokens_written)
        await until(lambda: not resident.dirty)
        await asyncio.sleep(0.6)
        assert resident.memory_version == resident.stored_version == version + 1, "not again without news"
        assert b'titan:consolidations_total{outcome="done",shard="shard-0"} 1.0' in await keeper.metrics()
        await keeper.ingest(piece(ALICE, 2))
        await until(lambda: resident.memory_version == version + 3)


async def test_who_talks_or_switches_it_off_is_left_alone(options):
    async with opened(options, consolidate_after_s=0.4) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        for _ in range(12):  # well over 0.4 s, but never 0.4 s of silence
            await asyncio.sleep(0.05)
            async with keeper.roster.turn(ALICE):
                pass
        assert (await keeper.describe(ALICE))["memory_version"] == 1
    async with opened(options, epoch=2, consolidate_after_s=0.0) as keeper:
        await keeper.ingest(piece(ALICE, 2))
        await asyncio.sleep(0.3)
        assert (await keeper.describe(ALICE))["memory_version"] == 2


async def test_a_user_who_comes_in_between_does_not_wait_and_nothing_is_journalled(
    options, model, monkeypatch
):
    monkeypatch.setattr(consolidation, "SLICE_UPDATES", 1)
    async with opened(options) as undisturbed:
        await undisturbed.ingest(piece(ALICE, 1, 500))
        await undisturbed.ingest(piece(ALICE, 2))
        wanted = await state(undisturbed, ALICE)
    other = replace(options, store_url=options.store_url + "2", journal_dir=options.journal_dir + "2")
    async with opened(other) as keeper:
        await keeper.ingest(piece(ALICE, 1, 500))
        plain, slices = keeper.roster.in_fold_pool, []

        async def watched(work, *arguments):
            slices.append(work)
            return await plain(work, *arguments)

        monkeypatch.setattr(keeper.roster, "in_fold_pool", watched)
        working = asyncio.create_task(keeper.consolidator.consolidate(ALICE, 16))
        await until(lambda: len(slices) > 3)
        await keeper.ingest(piece(ALICE, 2))
        served = len(slices)
        assert await working is False
        assert working.done()
        assert len(slices) - served <= 2, "given up as soon as somebody spoke"
        assert same(await state(keeper, ALICE), wanted)
        assert b'titan:consolidations_total{outcome="abandoned"' in await keeper.metrics()
        roles = {segment.role for segment in keeper.roster.journal.pending(ALICE)}
        assert roles == {"document"}


@pytest.mark.parametrize("erased", [False, True], ids=["spoke", "erased"])
async def test_a_copy_that_is_out_of_date_is_thrown_away(options, monkeypatch, erased):
    """The user has come and gone while a few updates ran: nobody waits any more, but the copy is old."""
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1, 500))
        plain, slices = keeper.roster.in_fold_pool, []

        async def meanwhile(work, *arguments):
            if work is consolidation._advance:
                slices.append(work)
                if len(slices) == 2:
                    await (keeper.forget(ALICE) if erased else keeper.ingest(piece(ALICE, 2)))
            return await plain(work, *arguments)

        monkeypatch.setattr(keeper.roster, "in_fold_pool", meanwhile)
        before = keeper.roster.slab.peek(ALICE)
        assert await keeper.consolidator.consolidate(ALICE, 2) is False
        assert len(slices) == 2
        assert keeper.roster.slab.peek(ALICE) is (None if erased else before)
        pending = [segment.role for segment in keeper.roster.journal.pending(ALICE)]
        assert pending == ([] if erased else ["document", "document"])


async def test_upkeep_is_no_sign_of_life(options):
    """Neither storing nor consolidating makes a resting user look busy, or last to be evicted."""
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        await keeper.ingest(piece(BOB, 2))
        resident = keeper.roster.slab.peek(ALICE)
        assert resident is not None
        used_at_s = resident.used_at_s
        await keeper.flush()
        assert await keeper.consolidator.consolidate(ALICE, 1)
        assert resident.used_at_s == used_at_s
        assert [r.key for r in keeper.roster.slab.residents()] == [ALICE, BOB]


async def test_closing_in_the_middle_loses_nothing(options, monkeypatch):
    keeper = await open_keeper(replace(options, consolidate_after_s=0.1))
    await keeper.ingest(piece(ALICE, 1))
    put, begun = keeper.roster.writer.put_replayed, threading.Event()

    def slowly(*arguments):
        done = put(*arguments)
        begun.set()
        time.sleep(0.3)  # the slot has it, and the resident does not know yet
        return done

    monkeypatch.setattr(keeper.roster.writer, "put_replayed", slowly)
    await until(begun.is_set)
    await keeper.close()
    async with opened(options, epoch=2) as again:
        resident_state = await state(again, ALICE)
    other = replace(options, store_url=options.store_url + "2", journal_dir=options.journal_dir + "2")
    async with opened(other) as undisturbed:
        await undisturbed.ingest(piece(ALICE, 1))
        await undisturbed.consolidator.consolidate(ALICE)
        assert same(await state(undisturbed, ALICE), resident_state)


async def test_a_full_journal_changes_nothing(options, monkeypatch):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        before = await state(keeper, ALICE)

        async def full(*_):
            raise JournalFull("full")

        monkeypatch.setattr(keeper.roster, "append", full)
        with pytest.raises(JournalFull):
            await keeper.consolidator.consolidate(ALICE, 2)
        assert same(await state(keeper, ALICE), before)


async def test_a_conversation_goes_on_after_a_consolidation(options, model):
    async with opened(options) as keeper:
        first = ("user", "my dog's name is Rex7.")
        done = await collect(keeper.chat(chat(model, ALICE, first)))
        assert await keeper.consolidator.consolidate(ALICE, 2)
        more = [first, ("assistant", done.text), ("user", "What is the name of my dog?")]
        again = await collect(keeper.chat(chat(model, ALICE, *more, update_id="u2")))
        assert again.memory_version == done.memory_version + 1 + 2
        assert len(keeper.roster.journal.pending(ALICE)) == 5
