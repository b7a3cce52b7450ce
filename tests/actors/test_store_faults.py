"""Every way in which a store fails, met by every kind of call of a shard; and a wall clock that is an hour off.

While the store fails, whoever is resident talks, reads and is read to as before; what needs the store ends with an
error that names it; the log has one line, `ping` (which is `/readyz`) and the metrics have the reason. When it is over,
nothing that was acknowledged is lost, nothing is there twice, and the memory has the bits of one that was never
disturbed. The cells that no shard is needed for stand beside their code: tests/storage.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from actors import shard as shard_module
from actors.options import KeeperOptions
from storage.errors import NoSuchMemory, NotReplicated, StoreError, StoreUnavailable
from tests.actors.shard_life import SAID, living, said, until
from tests.actors.store_faults import FAULTS, Fault
from tests.actors.test_keeper import ALICE, BOB, CAROL, chat, piece, same, state

HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.health.QUIET_S", 0.0)
    monkeypatch.setattr(shard_module, "LOOK_INTERVAL_S", 0.02)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
async def test_a_store_that_fails(
    options: KeeperOptions, model: Path, tmp_path: Path, fault: Fault, request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    url = options.store_url if fault.store == "file" else request.getfixturevalue(f"{fault.store}_url")
    # Upkeep runs all the time: what it meets must not fill the log.
    chosen = replace(options, store_url=url, idle_flush_s=0.05, persist_tokens=256, consolidate_after_s=0.0)
    async with living(chosen) as life:
        shard, epoch = life.shard, life.epoch
        await shard.ingest(piece(ALICE, 1), epoch)
        await shard.ingest(piece(BOB, 9), epoch)
        await shard.flush()
        assert (await shard.ping())["store"] == ""
        caplog.clear()
        before_bytes, errors = (
            await life.metric("titan:journal_bytes"),
            await life.metric("titan:store_errors_total"),
        )
        with fault.planted(tmp_path / "store"):
            done = await life.chat(chat(model, ALICE, SAID))
            assert done.memory == "read_write"
            assert (await shard.ingest(piece(ALICE, 2, 600), epoch)).tokens == 600
            asked = chat(model, ALICE, ("user", "What is it?"), update_id="q", memory="read_only")
            answer = await life.chat(asked)
            assert (await shard.describe(ALICE, epoch))["tokens_seen"] > 650
            with pytest.raises(StoreUnavailable):
                await shard.forget(BOB, epoch)
            with pytest.raises(StoreError):
                await shard.flush()
            with pytest.raises(StoreError):
                await life.snapshot(tmp_path)
            if not fault.reads:
                with pytest.raises(StoreUnavailable):
                    await life.chat(chat(model, CAROL, SAID, update_id="c"))
                assert life.keeper.roster.slab.peek(ALICE) is not None, (
                    "nobody goes for one who cannot come in"
                )
            await asyncio.sleep(0.3)  # upkeep tries again and again
            assert (await shard.ping())["store"]
            assert await life.metric("titan:store_away_seconds") > 0
            assert await life.metric("titan:store_errors_total") > errors
            assert await life.metric("titan:journal_bytes") >= before_bytes
            [line] = said(caplog)
            assert line.startswith(f"{life.keeper.roster.vault.store.url} fails; until it answers")
            told = await state(life.keeper, ALICE)
            assert (await life.chat(asked)).text == answer.text
        await shard.forget(BOB, epoch)
        assert (await shard.ingest(piece(ALICE, 2, 600), epoch)).duplicate
        await shard.flush()
        await until(lambda: not shard._about()["store"])
        assert await life.metric("titan:store_away_seconds") == 0
        assert same(await state(life.keeper, ALICE), told)
        assert len(said(caplog)) == 2
        assert said(caplog)[1].startswith(f"{life.keeper.roster.vault.store.url} answers again, after")
        await shard.ingest(piece(ALICE, 3), epoch)
        await shard.flush()
        told = await state(life.keeper, ALICE)
        assert len(life.keeper.roster.journal.pending(ALICE)) <= 1, (
            "what the two newest versions hold is trimmed"
        )
        assert (await life.snapshot(tmp_path))["users"] == 1
    async with living(chosen) as again:
        assert same(await state(again.keeper, ALICE), told)
        with pytest.raises(NoSuchMemory):
            await again.shard.describe(BOB, again.epoch)


async def test_under_sync_reads_go_on_while_writes_wait(
    options: KeeperOptions, model: Path, tmp_path: Path
) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "file EIO on fsync")
    chosen = replace(options, durability="sync", sync_timeout_s=1.5)
    async with living(chosen) as life:
        shard, epoch = life.shard, life.epoch
        await shard.ingest(piece(ALICE, 1), epoch)
        call = chat(model, ALICE, SAID)
        with fault.planted(tmp_path / "store"):
            for _ in range(2):
                with pytest.raises(NotReplicated, match="Input/output error"):
                    await life.chat(call)
                with pytest.raises(NotReplicated):
                    await shard.ingest(piece(ALICE, 2), epoch)
            told = await state(life.keeper, ALICE)
            for memory in ("read_only", "off"):
                asked = chat(model, ALICE, ("user", "What is it?"), update_id=memory, memory=memory)
                assert (await life.chat(asked)).text
            assert (await shard.describe(ALICE, epoch))["tokens_seen"] == told[4]
        await life.chat(call)
        assert (await shard.ingest(piece(ALICE, 2), epoch)).duplicate
        repeated = await state(life.keeper, ALICE)
        assert repeated[4] >= told[4]
    async with living(chosen) as again:
        assert same(await state(again.keeper, ALICE), repeated)


async def test_under_sync_a_store_that_is_away_stops_no_read(
    options: KeeperOptions, model: Path, redis_url: str
) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "redis away")
    chosen = replace(options, store_url=redis_url, durability="sync", sync_timeout_s=1.5)
    async with living(chosen) as life:
        await life.shard.ingest(piece(ALICE, 1), life.epoch)
        with fault.planted(Path()):
            with pytest.raises(StoreUnavailable):
                await life.chat(chat(model, ALICE, SAID))
            asked = chat(model, ALICE, ("user", "What is it?"), update_id="q", memory="read_only")
            assert (await life.chat(asked)).text


@pytest.mark.parametrize(
    "jumps", [(HOUR_S,), (-HOUR_S,), (HOUR_S, -HOUR_S)], ids=["ahead", "behind", "to and fro"]
)
@pytest.mark.parametrize("durability", ["local", "sync"])
async def test_a_wall_clock_that_jumps_by_an_hour(
    options: KeeperOptions, model: Path, tmp_path: Path, jumps: tuple[float, ...], durability: str
) -> None:
    chosen = replace(options, durability=durability, sync_timeout_s=60.0)
    async with living(chosen) as life:
        shard, epoch, off_s, turn = life.shard, life.epoch, [0.0], [0]
        clock = life.keeper.roster.vault.store.now
        journal_clock, wall = life.keeper.roster.journal._clock, clock._clock
        life.keeper.roster.journal._clock = lambda: journal_clock() + off_s[0]
        clock._clock = lambda: datetime.fromtimestamp(wall().timestamp() + off_s[0], UTC)

        def jump() -> None:
            off_s[0] = jumps[turn[0] % len(jumps)]
            turn[0] += 1

        await shard.ingest(piece(ALICE, 1), epoch)
        jump()
        await life.chat(chat(model, ALICE, SAID))
        await shard.flush()
        await shard.ingest(piece(BOB, 9), epoch)
        await shard.flush()
        await shard.forget(BOB, epoch)
        jump()
        assert (await shard.ingest(piece(ALICE, 1), epoch)).duplicate
        again = replace(piece(BOB, 9), update_id="anew")
        assert not (await shard.ingest(again, epoch)).duplicate, "an erased user begins anew"
        await shard.ingest(piece(ALICE, 2), epoch)
        jump()
        await shard.flush()
        assert (await life.snapshot(tmp_path))["users"] == 2
        told = await state(life.keeper, ALICE), await state(life.keeper, BOB)
    if durability == "sync":
        chosen = replace(chosen, journal_dir=f"{options.journal_dir}2")
    async with living(chosen) as later:
        for key, wanted in zip((ALICE, BOB), told, strict=True):
            assert same(await state(later.keeper, key), wanted)
        assert (await later.shard.ingest(piece(ALICE, 2), later.epoch)).duplicate
