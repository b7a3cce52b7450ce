"""Memories are damaged on purpose: they come back right, or are frozen, and a crash afterwards changes no bit."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from actors import guard
from actors.errors import MemoryFrozen
from actors.guard import FALLS_MAX, PROBES_LOST_MIN, Action, has_fallen, on_fall, on_fold
from actors.keeper import MemoryKeeper, collect, open_keeper
from actors.messages import DoneEvent
from actors.slab import Resident
from cluster.openai import titan
from cluster.problems import problem_of
from storage.names import UserKey
from tests.actors.test_keeper import ALICE, BOB, chat, crash, opened, piece, same, state
from titanmem import probes
from titanmem.fold import Fold

QUESTION = ("user", "What is the name of my dog?")


# -- decisions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answered", "fallen"),
    [(0, 0, False), (2, 0, False), (3, 0, True), (10, 8, False), (10, 7, True), (64, 61, False), (64, 60, True)],
)  # fmt: skip
def test_a_fall_is_more_than_chance_and_more_than_a_twentieth(asked, answered, fallen):
    assert has_fallen(asked, answered) is fallen
    assert PROBES_LOST_MIN == 3


def test_the_first_fall_is_rolled_back_and_the_second_freezes():
    assert on_fall(by_tokens=False, rested=False, falls=0) is Action.ROLL_BACK
    assert on_fall(by_tokens=True, rested=True, falls=0) is Action.ROLL_BACK
    assert on_fall(by_tokens=True, rested=True, falls=FALLS_MAX) is Action.FREEZE
    assert on_fall(by_tokens=False, rested=True, falls=FALLS_MAX) is Action.FREEZE


def test_what_a_consolidation_may_mend_is_waited_for():
    assert on_fall(by_tokens=True, rested=False, falls=0) is Action.WAIT
    assert on_fall(by_tokens=True, rested=False, falls=FALLS_MAX) is Action.WAIT


def test_what_the_bounds_did_is_named():
    quiet = Fold(chunks=1, updates=1, tokens_written=3, surprise=0.9, momentum=0.1, utilisation=0.8)
    assert list(on_fold(quiet)) == []
    assert list(on_fold(replace(quiet, passed_over=1))) == [Action.RAISE_THRESHOLD]
    assert list(on_fold(replace(quiet, utilisation=0.81))) == [Action.MORE_DECAY]


# -- memories ---------------------------------------------------------------------------------------------------


def resident(keeper: MemoryKeeper, key: UserKey) -> Resident:
    found = keeper.roster.slab.peek(key)
    assert found is not None
    return found


async def good(keeper: MemoryKeeper, key: UserKey) -> None:
    """A memory that knows something, consolidated and stored."""
    await keeper.ingest(piece(key, 1, 120))
    assert await keeper.consolidator.consolidate(key, 4)
    await keeper.flush()
    marked = resident(keeper, key).probes
    assert marked is not None
    assert len(marked.entries) > 2 * PROBES_LOST_MIN, "another seed, or this shows nothing"


def damage(keeper: MemoryKeeper, key: UserKey) -> None:
    """Noise over all columns of W₃ that hold anything."""
    slot = keeper.roster.slab.written_SHD[resident(keeper, key).slot]
    noise = torch.randn(slot.shape, generator=torch.Generator().manual_seed(7)).half()
    slot.copy_(torch.where(slot.any(-1, keepdim=True), noise, slot))


async def asked(keeper: MemoryKeeper, model, key: UserKey, memory: str = "read_only") -> DoneEvent:
    call = chat(model, key, QUESTION, update_id=f"ask-{memory}", memory=memory, max_tokens=6)
    return await collect(keeper.chat(call))


async def counted(keeper: MemoryKeeper, reason: str) -> bool:
    return (
        f'titan:rollbacks_total{{reason="{reason}",shard="shard-0"}} 1.0' in (await keeper.metrics()).decode()
    )


async def test_noise_is_rolled_back_once_and_the_second_time_the_memory_is_frozen(options, model, caplog):
    """Bob is told what Alice is told, and stays as he is: he is what she should be."""
    keeper = await open_keeper(options)
    for user in (ALICE, BOB):
        await good(keeper, user)
    right = (await asked(keeper, model, ALICE)).text
    damage(keeper, ALICE)
    assert (await asked(keeper, model, ALICE)).text != right, "another seed, or this shows nothing"
    with caplog.at_level(logging.WARNING):
        for user in (ALICE, BOB):
            await keeper.ingest(piece(user, 2, 7))
        await keeper.flush()
    assert sum("taken back to version" in record.message for record in caplog.records) == 1
    alice, bob = await state(keeper, ALICE), await state(keeper, BOB)
    assert torch.equal(alice[0], bob[0]), "nothing is lost: what was told since then was folded again"
    assert alice[4] == bob[4]
    assert (await asked(keeper, model, ALICE)).text == (await asked(keeper, model, BOB)).text
    assert await counted(keeper, "recall")
    assert (await keeper.describe(ALICE))["frozen"] is False
    await crash(keeper)

    keeper = await open_keeper(replace(options, epoch=2))
    assert same(await state(keeper, ALICE), alice)
    assert resident(keeper, ALICE).falls == 1, "a crash is not forgiven"
    damage(keeper, ALICE)
    for user in (ALICE, BOB):
        await keeper.ingest(piece(user, 3, 7))
    await keeper.flush()
    await _check_frozen(keeper, model)
    alice, bob = await state(keeper, ALICE), await state(keeper, BOB)
    assert torch.equal(alice[0], bob[0])
    await crash(keeper)

    async with opened(options, epoch=3) as keeper:
        assert same(await state(keeper, ALICE), alice)
        assert same(await state(keeper, BOB), bob)
        await _check_frozen(keeper, model, counts=False)
        newest = (await keeper.versions(ALICE))[0]["version"]
        await keeper.rollback(ALICE, newest)
        assert (await keeper.describe(ALICE))["frozen"] is False
        for user in (ALICE, BOB):
            await keeper.ingest(piece(user, 4, 7))
        assert torch.equal((await state(keeper, ALICE))[0], (await state(keeper, BOB))[0])
        assert b'titan:frozen_users{shard="shard-0"} 0.0' in await keeper.metrics()


async def _check_frozen(keeper: MemoryKeeper, model, *, counts: bool = True) -> None:
    """The plain decoder answers Alice, nothing is written, both are said; Bob is as ever."""
    plain = await asked(keeper, model, ALICE, "off")
    before = await state(keeper, ALICE)
    said = await asked(keeper, model, ALICE, "read_write")
    assert said.text == plain.text
    assert titan(said) == {
        "memory": "off", "memory_version": before[2], "tokens_written": 0, "surprise": 0.0, "frozen": True,
    }  # fmt: skip
    with pytest.raises(MemoryFrozen, match="alice") as refused:
        await keeper.ingest(piece(ALICE, 9))
    assert (problem_of(refused.value).status, problem_of(refused.value).code) == (409, "memory_frozen")
    assert not await keeper.consolidator.consolidate(ALICE, 2)
    assert same(await state(keeper, ALICE), before)
    assert (await keeper.describe(ALICE))["frozen"] is True
    assert b'titan:frozen_users{shard="shard-0"} 1.0' in await keeper.metrics()
    if counts:
        assert await counted(keeper, "frozen")
    bob = await asked(keeper, model, BOB)
    assert bob.text != plain.text
    assert not bob.frozen
    assert (await keeper.describe(BOB))["frozen"] is False


async def test_what_was_told_is_skipped_if_no_consolidation_mends_what_it_did(options, monkeypatch):
    monkeypatch.setattr(probes, "REWRITTEN_OVERLAP", 2.0)  # so that crowding counts as a loss
    monkeypatch.setattr(guard, "PROBES_LOST_MIN", 1)
    keeper = await open_keeper(options)
    await good(keeper, ALICE)
    stored = await state(keeper, ALICE)
    await keeper.ingest(piece(ALICE, 5, 600))
    assert await keeper.flush() == 0, "not before it is consolidated"
    assert resident(keeper, ALICE).crowded
    assert resident(keeper, ALICE).recall < 0.95
    crowded = await state(keeper, ALICE)
    await crash(keeper)

    keeper = await open_keeper(replace(options, epoch=2, consolidate_after_s=0.0))
    assert same(await state(keeper, ALICE), crowded), "it is in the journal"
    assert await keeper.flush() == 1
    assert await counted(keeper, "recall")
    back = await state(keeper, ALICE)
    assert torch.equal(back[0], stored[0])
    assert back[3] == crowded[3] + 1, "what is skipped is not replayed"
    assert (await keeper.ingest(piece(ALICE, 5, 600))).duplicate, "nor written when it is sent again"
    await keeper.ingest(piece(ALICE, 6, 7))
    after = await state(keeper, ALICE)
    await crash(keeper)
    async with opened(options, epoch=3) as keeper:
        assert same(await state(keeper, ALICE), after)


async def test_a_rollback_that_cannot_be_stored_changes_nothing(options, monkeypatch):
    async with opened(options) as keeper:
        await good(keeper, ALICE)
        await keeper.ingest(piece(ALICE, 2, 7))
        damage(keeper, ALICE)
        before = await state(keeper, ALICE)

        def full(_):
            raise ConnectionAbortedError("the store is gone")

        with monkeypatch.context() as patch:
            patch.setattr(keeper.roster.vault, "put", full)
            with pytest.raises(ConnectionAbortedError):
                await keeper.flush()
        assert same(await state(keeper, ALICE), before)
        assert not await counted(keeper, "recall")
        await keeper.flush()
        assert not torch.equal((await state(keeper, ALICE))[0], before[0])
        assert await counted(keeper, "recall")


async def test_noise_is_not_consolidated(options):
    """A replay over noise would hide it from the probes."""
    async with opened(options) as keeper:
        for user in (ALICE, BOB):
            await good(keeper, user)
            await keeper.ingest(piece(user, 2, 7))
        damage(keeper, ALICE)
        assert not await keeper.consolidator.consolidate(ALICE, 2)
        assert torch.equal((await state(keeper, ALICE))[0], (await state(keeper, BOB))[0])


async def test_spam_and_a_full_memory_are_bounded_said_and_replayed_to_the_same_bits(options, caplog):
    tight = replace(options, spec_overrides={**options.spec_overrides, "max_norm": 2.0})
    keeper = await open_keeper(tight)
    with caplog.at_level(logging.WARNING):
        outcome = await keeper.ingest(piece(ALICE, 1, 400))
        await keeper.ingest(piece(ALICE, 2, 100))
    assert 0 < outcome.tokens_written <= 0.2 * outcome.tokens
    said = [record.message for record in caplog.records]
    assert any("threshold of surprise was raised" in line for line in said)
    assert any("more is forgotten" in line for line in said)
    before = await state(keeper, ALICE)
    await crash(keeper)
    async with opened(tight, epoch=2) as again:
        assert same(await state(again, ALICE), before)
