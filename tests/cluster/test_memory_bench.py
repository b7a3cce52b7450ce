"""`titanmem bench memory`: its document, and that a memory that is not right is never timed."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cluster import memory_bench
from cluster.cli import build_app
from cluster.memory_bench import MemoryBenchOptions, run_memory_bench
from cluster.memory_bench_check import mistakes
from kernels import dense, sparse

TOY = MemoryBenchOptions(
    width=64, tokens=128, users=8, loop_users=4, code_width=1024, peer=False, seconds=0.01
)


@pytest.fixture(autouse=True)
def kept_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_document_has_what_the_contract_names():
    document = run_memory_bench(TOY)
    assert document["correct"] is True
    assert document["hardware"]
    assert document["date"]
    assert document["ratios"]["titans_pytorch_e4_b1"] is None, "without the peer there is no ratio"
    for name in ("loop_4_users", "sparse_vs_dense_8_users"):
        assert document["ratios"][name] > 0
    assert document["tokens_per_s"]["ours_e1_b8"] > 0
    assert document["lock_p99_ms"] > 0
    assert document["state_bytes"]["4096"] == document["state_bytes"]["1000000"] > 0
    json.dumps(document)


def test_a_right_memory_has_no_mistakes():
    assert mistakes() == []


def test_a_wrong_gradient_is_noticed(monkeypatch):
    monkeypatch.setattr(dense, "silu_slope", torch.sigmoid)
    assert [line.partition(":")[0] for line in mistakes()] == ["titans, expansion 1", "titans, expansion 4"]


def test_a_wrong_sparse_write_is_noticed(monkeypatch):
    right = sparse.sparse_step

    def wrong(*arguments):
        rows, new = right(*arguments)
        return rows, 1.001 * new

    monkeypatch.setattr(sparse, "sparse_step", wrong)
    assert [line.partition(":")[0] for line in mistakes()] == ["sparse codes"]


def test_what_is_not_right_is_not_timed(monkeypatch):
    monkeypatch.setattr(memory_bench, "mistakes", lambda: ["sparse codes: off by 3.0e-01"])
    document = run_memory_bench(TOY)
    assert document.keys() == {"hardware", "date", "correct", "mistakes"}
    result = CliRunner().invoke(build_app(), ["bench", "memory", "--no-peer", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["correct"] is False
    assert "nothing was timed: sparse codes: off by 3.0e-01" in str(result.exception) + result.stderr


def test_a_missing_peer_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(build_app(), ["bench", "memory"])
    assert result.exit_code == 1
    assert "pip install 'titanmem[bench]', or say --no-peer" in str(result.exception) + result.stderr
