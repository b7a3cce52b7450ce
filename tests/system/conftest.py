"""The stages of the story, each a fixture built on the one before: so that five starts are enough for all tests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.documents import cut
from cluster.config import laptop
from tests.servers import S3Server, ministack
from tests.system.collector import collecting
from tests.system.facts import FACTS, HIDDEN, Said, Talk
from tests.system.server import TITANMEM, Server, environment
from tests.system.world import Backups, Crash, World, succeeded
from titanmem.tokenizer import ChatTokenizer

SEGMENT_TOKENS = 4096
CRASH_WITHIN_S = 400.0
OTHERS = ("u3", "u4", "u5", "u6")


def first_piece_tokens(file: str) -> int:
    """Tokens that the first request of `titanmem ingest` carries."""
    piece = next(cut(iter([Path(file).read_bytes()])))
    return len(ChatTokenizer(laptop().model_folder).encode(piece.decode()))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ministack(tmp_path_factory.mktemp("ministack")) as server:
        server.make_bucket("backups")
        yield server


@pytest.fixture(scope="module", params=[1, 2], ids=["one-shard", "two-shards"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, s3: S3Server
) -> Iterator[World]:
    folder, shards = tmp_path_factory.mktemp("system"), request.param
    told = {"u1": FACTS} | {user: FACTS[n :: len(OTHERS)] for n, user in enumerate(OTHERS) if shards > 1}
    with collecting() as collector:
        env = {"TITANMEM_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        server = Server(folder, shards=shards, **env)
        try:
            yield World(shards=shards, folder=folder, server=server, collector=collector, s3=s3, told=told)
        finally:
            server.close()


@pytest.fixture(scope="module")
def told(world: World) -> dict[str, list[Said]]:
    """Users have told their facts to a server; its answers."""
    world.server.start()
    with Talk(world.server.url) as talk:
        return talk.tell(world.told)


@pytest.fixture(scope="module")
def read(world: World, told: object) -> dict[str, Any]:
    """u1 has read a document of 60,000 characters and a note; what `titanmem ingest` says of the document."""
    summary = succeeded(*world.ingest(world.document("first.txt")))
    assert world.ingest_note()["duplicates"] == 0
    return summary


@pytest.fixture(scope="module")
def crash(world: World, read: object) -> Crash:
    """Every process of the server has been killed in the middle of an ingest."""
    file, before = world.document("second.txt"), world.tokens_seen()
    enough = before["u1"] + first_piece_tokens(file) + 2 * SEGMENT_TOKENS
    client = subprocess.Popen(
        [TITANMEM, *world.ingest(file, "--retry-for", "0")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + CRASH_WITHIN_S
        while (during := world.memory("u1")["tokens_seen"]) < enough:
            assert client.poll() is None, f"it ended before the crash: {client.communicate()}"
            assert time.monotonic() < deadline, f"u1 has seen {during} tokens, not {enough}"
            time.sleep(0.1)
        killed = world.server.kill()
        out, err = client.communicate(timeout=60)
    finally:
        client.kill()
        client.communicate()
    return Crash(before=before, during=during, killed=killed, code=client.returncode, said=out + err)


@pytest.fixture(scope="module")
def returned(world: World, crash: Crash) -> dict[str, int]:
    """A new server runs on the same store and journals; tokens_seen of each user there."""
    world.server.start()
    return world.tokens_seen()


@pytest.fixture(scope="module")
def asked(world: World, returned: object) -> dict[str, list[Said]]:
    """Everybody has asked, in new conversations, for what they told; u2, who told nothing, asks it all.
    u1 asks for what stood in the document, too."""
    with Talk(world.server.url) as talk:
        return talk.ask({**world.told, "u1": FACTS + HIDDEN, "u2": FACTS + HIDDEN})


@pytest.fixture(scope="module")
def backups(world: World, asked: object) -> Backups:
    """Snapshots in a folder and in S3."""
    memory, s3_url = world.rested(), world.s3.url("backups", "titanmem")
    urls = [f"file://{world.folder}/elsewhere", s3_url]
    made = {
        url: succeeded("snapshot", "create", "--target", url, "--json", "--url", world.server.url)
        for url in urls
    }
    return Backups(memory=memory, tokens_seen=world.tokens_seen()["u1"], snapshots=made, s3_url=s3_url)


@pytest.fixture(scope="module")
def stopped(world: World, asked: object) -> int:
    """The server was ended by Ctrl-C; its exit code. All tests that need it come before."""
    return world.server.stop()


@pytest.fixture(scope="module")
def restored(world: World, backups: Backups, stopped: int) -> dict[str, Any]:
    """Store and journals were lost, the snapshot in S3 was brought back, a server runs on it. The restore's report."""
    world.server.wipe()
    id_ = backups.snapshots[backups.s3_url]["id"]
    where = ["--target", backups.s3_url, "--store", f"file://{world.server.store}"]
    report = succeeded("snapshot", "restore", id_, *where, "--json")
    world.server.start()
    return report
