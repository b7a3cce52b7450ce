"""An update is written once, however late its retry comes, and wherever the user has gone meanwhile."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.handover import hand_over
from actors.keeper import collect, open_keeper
from actors.options import journal_path
from storage.journal import Journal
from storage.memory import SEEN_MAX
from tests.actors.test_keeper import ALICE, BOB, chat, crash, live, opened, piece, same, state

SAID = ("user", "my dog's name is Rex7. " * 30)
"""More than a chunk: two segments of what the user says."""


async def stored_and_trimmed(options, model) -> tuple:
    """Alice is told something in a turn and by a document, and no journal has a segment of it any more."""
    async with opened(options) as keeper:
        await collect(keeper.chat(chat(model, ALICE, SAID)))
        await keeper.ingest(piece(ALICE, 1))
        await keeper.flush()
        await keeper.ingest(piece(ALICE, 2))
        await keeper.flush()
        told = await state(keeper, ALICE)
    journal = Journal(options.journal)
    assert len(journal.pending(ALICE)) == 1, "the last piece; the newest version but one holds the rest"
    journal.close()
    return told


async def told_again(options, model, **changes) -> tuple:
    async with opened(options, epoch=2, **changes) as keeper:
        await collect(keeper.chat(chat(model, ALICE, SAID)))
        assert (await keeper.ingest(piece(ALICE, 1))).duplicate
        return await state(keeper, ALICE)


@pytest.mark.parametrize("where", ["this shard", "without its journal", "another shard"])
async def test_a_retry_after_the_segment_was_trimmed(options, model, where):
    told = await stored_and_trimmed(options, model)
    changes = {}
    if where == "without its journal":
        shutil.rmtree(options.journal_dir)
    elif where == "another shard":
        changes["shard"] = "shard-1"
        hand_over(Path(options.journal_dir), lambda key: "shard-1", Journal)
    assert same(await told_again(options, model, **changes), told)


async def test_a_retry_on_another_shard_is_told_what_the_first_try_was(options):
    async with opened(options) as keeper:
        first = await keeper.ingest(piece(ALICE, 1))
        for seed in (2, 3):
            await keeper.flush()
            await keeper.ingest(piece(ALICE, seed))
    hand_over(Path(options.journal_dir), lambda key: "shard-1", Journal)
    async with opened(options, shard="shard-1", epoch=2) as keeper:
        assert await keeper.ingest(piece(ALICE, 1)) == replace(first, duplicates=1)


async def test_a_crash_in_a_turn_and_a_retry_elsewhere(options, model):
    """What the user said is journalled in two segments; only the first one is there."""
    async with opened(options, durability="sync") as undisturbed:
        await collect(undisturbed.chat(chat(model, BOB, SAID)))
        wanted = await state(undisturbed, BOB)
    keeper = await open_keeper(replace(options, durability="sync", shard="shard-2"))
    append, left = keeper.roster.append, [1]

    async def fails(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionAbortedError("the node is lost")
        return await append(*arguments)

    keeper.roster.append = fails  # type: ignore[method-assign]
    with pytest.raises(ConnectionAbortedError):
        await collect(keeper.chat(chat(model, ALICE, SAID)))
    await keeper.roster.replicator.durable(ALICE)
    await keeper.flush()
    await crash(keeper)
    shutil.rmtree(options.journal_dir)
    async with opened(options, epoch=2, durability="sync") as keeper:
        await collect(keeper.chat(chat(model, ALICE, SAID)))
        assert torch.equal((await state(keeper, ALICE))[0], wanted[0])


async def test_what_an_old_journal_alone_has_is_void_and_may_be_told_again(options, tmp_path):
    """Written here, lost to the owner after us on another disk, who stored more chunks than we had."""
    other = replace(options, journal_dir=f"{tmp_path}/elsewhere")
    keeper = await open_keeper(options)
    await keeper.ingest(piece(ALICE, 1))
    await keeper.flush()
    await keeper.ingest(piece(ALICE, 2))
    await crash(keeper)
    async with opened(other, epoch=2) as keeper:
        for seed in (3, 4):
            await keeper.ingest(piece(ALICE, seed))
        told = await state(keeper, ALICE)
    async with opened(options, epoch=3) as keeper:
        assert same(await state(keeper, ALICE), told)
        outcome = await keeper.ingest(piece(ALICE, 2))
        assert not outcome.duplicate, "it is in no memory"
        assert (await keeper.ingest(piece(ALICE, 3))).duplicate
        assert (await state(keeper, ALICE))[3] == told[3] + outcome.chunks


async def test_an_old_journals_hashes_do_not_push_out_newer_ones(options, model, tmp_path):
    async with opened(options) as keeper:
        await live(keeper, model)
        told = await state(keeper, ALICE)
    old = replace(options, journal_dir=f"{tmp_path}/old", epoch=2)
    journal = Journal(journal_path(old.journal_dir, old.shard))
    journal.replace(ALICE, [], held=[], seen=range(SEEN_MAX)).result(10)
    journal.close()
    async with opened(old) as keeper:
        assert (await keeper.ingest(piece(ALICE, 1))).duplicate
        assert same(await state(keeper, ALICE), told)
