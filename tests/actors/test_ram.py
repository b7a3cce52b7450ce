"""A slot that is damaged in RAM is noticed before it is read or stored, and costs nothing that was told."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from actors.errors import MemoryDamaged
from actors.keeper import MemoryKeeper, collect, open_keeper
from cluster.problems import problem_of
from tests.actors.test_keeper import ALICE, BOB, CAROL, chat, opened, piece, state

BAD = [float("nan"), float("inf"), float("-inf")]
QUESTION = ("user", "What is the name of my dog?")


def damage(keeper: MemoryKeeper, value: float) -> None:
    """One number of Alice's slot, somewhere in the middle."""
    resident = keeper.roster.slab.peek(ALICE)
    assert resident is not None
    slot = keeper.roster.slab.written_SHD[resident.slot]
    row = int(slot.any(-1).nonzero()[0, 0])
    slot[row, 3] = value


async def told(options) -> MemoryKeeper:
    """Alice and Bob are told the same; some of it is stored, the newest of it is in the journal alone."""
    keeper = await open_keeper(options)
    for user in (ALICE, BOB):
        await keeper.ingest(piece(user, 1, 120))
    await keeper.flush()
    for user in (ALICE, BOB):
        await keeper.ingest(piece(user, 2))
    return keeper


async def same_as_bob(keeper: MemoryKeeper) -> bool:
    alice, bob = await state(keeper, ALICE), await state(keeper, BOB)
    return torch.equal(alice[0], bob[0]) and alice[1:] == bob[1:]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("then", ["ask", "tell", "store", "consolidate", "evict"])
async def test_damage_in_ram_is_neither_served_nor_stored(options, model, caplog, value, then):
    keeper = await told(options)
    asked = chat(model, ALICE, QUESTION, memory="read_only")
    right = (await collect(keeper.chat(replace(asked, key=BOB)))).text
    damage(keeper, value)
    with caplog.at_level(logging.ERROR):
        if then == "ask":
            assert (await collect(keeper.chat(asked))).text == right
        elif then == "tell":
            for user in (ALICE, BOB):
                await keeper.ingest(piece(user, 3))
        elif then == "store":
            assert await keeper.flush() == 2
        elif then == "consolidate":
            for user in (ALICE, BOB):
                assert await keeper.consolidator.consolidate(user, 2)
        else:
            await keeper.ingest(piece(BOB, 3, 0))
            await keeper.ingest(piece(CAROL, 9))
            assert keeper.roster.slab.peek(ALICE) is None
            await keeper.forget(CAROL)
    assert await same_as_bob(keeper)
    assert sum("in RAM was damaged" in record.message for record in caplog.records) == 1
    assert b'titan:rollbacks_total{reason="ram",shard="shard-0"} 1.0' in await keeper.metrics()
    assert not (await keeper.describe(ALICE))["frozen"], "it is no fall of recall"
    await keeper.close()
    async with opened(options, epoch=2) as again:
        assert await same_as_bob(again)


async def test_damage_while_a_reply_is_made_ends_that_turn_and_no_other(options, model):
    """The user is not told that all is well; the same request again finds what was told, and writes it once."""
    keeper = await told(options)
    call = chat(model, ALICE, ("user", "my dog's name is Rex7."), max_tokens=6)
    fold, done = keeper.roster.writer.fold, []

    def damaged(resident, segment):
        if not done and resident.key == ALICE:
            done.append(segment)
            damage(keeper, float("nan"))
            keeper.roster.slab.written_SHD[resident.slot].fill_(float("nan"))
        return fold(resident, segment)

    keeper.roster.writer.fold = damaged  # type: ignore[method-assign]
    with pytest.raises(MemoryDamaged, match="alice") as caught:
        await collect(keeper.chat(call))
    assert (problem_of(caught.value).status, problem_of(caught.value).code) == (503, "memory_damaged")
    await collect(keeper.chat(call))
    await collect(keeper.chat(replace(call, key=BOB)))
    assert await same_as_bob(keeper)
    await keeper.close()


async def test_a_fold_that_fails_leaves_no_hole(options, monkeypatch):
    """What is in the journal and not in the slot comes into the slot before anything later does."""
    keeper = await told(options)
    with monkeypatch.context() as patch:

        def broken(resident, segment):
            raise RuntimeError("out of memory")

        patch.setattr(keeper.roster.writer, "fold", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            await keeper.ingest(piece(ALICE, 3))
    for user in (ALICE, BOB):
        outcome = await keeper.ingest(piece(user, 3))
        assert outcome.duplicate is (user == ALICE)
        await keeper.ingest(piece(user, 4))
    assert await same_as_bob(keeper)
    await keeper.close()
