"""Ray's control service dies and is started again on its rocksdb storage: requests go on, and all else too."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.cluster.freezes import Drill, drill_config
from tests.cluster.nodes import nodes
from tests.tiny_model import tiny_folder

AWAY_S = 3.0


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_requests_go_on_while_the_control_service_is_away(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    config = drill_config(tmp_path, model, shards=1, durability="sync")
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    with nodes(config, tmp_path, 1, **storage) as cluster:
        drill = Drill(config=config, nodes=cluster, users=6, seed=0)
        await drill.start()
        pid = (await drill.settled())["shards"][0]["pid"]
        before = drill.acknowledged
        await asyncio.to_thread(cluster.restart_gcs, AWAY_S)
        assert drill.acknowledged > before + 6, "answers came while it was away"
        status = await drill.settled()
        assert [shard["pid"] for shard in status["shards"]] == [pid], "nothing was started again"
        os.kill(pid, signal.SIGKILL)
        await drill.succeeded("shard-0", status["shards"][0]["epoch"])
        status = await drill.settled()
        assert status["shards"][0]["pid"] != pid
        report = await drill.report(tmp_path)
    assert report["errors_seen_by_writers"] == {}
    assert [report[name] for name in ("old_epoch", "lost", "doubled", "unequal")] == [0, [], [], []]
