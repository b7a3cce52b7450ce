"""`titanmem bench needle` and `titanmem train` without the model's work: flags, figures, how they end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cluster.conversation_bench
import cluster.needle_bench
import titanmem.train
from cluster import cli
from cluster.conversation_bench import ConversationOptions
from cluster.needle_bench import NeedleOptions
from titanmem.train import TrainConfig

APP = cli.build_app()
ROW = {
    "tokens": 65536,
    "facts": 20,
    "queries": 20,
    "recall": 0.75,
    "ttft_ms": 12.3,
    "state_bytes": 2_097_152,
    "ingest_tokens_per_s": 84_000.0,
    "written_share": 0.0003,
}
RESULT = {"mode": "mac", "rule": "sparse", "chunk_size": 256, "window": 256, "lengths": [ROW]}
FIGURES = {"loss": 3.25, "step": 25.0, "spent_s": 30.0, "tokens": 102_400.0}


def run(*args: str) -> Result:
    before = signal.getsignal(signal.SIGINT)
    try:
        return CliRunner().invoke(APP, args, env={"COLUMNS": "200", "NO_COLOR": "1"})
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[NeedleOptions]:
    """What the benchmark was asked for; it answers `RESULT`."""
    seen: list[NeedleOptions] = []

    def bench(options: NeedleOptions, report: Callable[[str, float], None]) -> dict[str, Any]:
        seen.append(options)
        report("65,536 tokens: reading", 0.5)
        return RESULT

    monkeypatch.setattr(cluster.needle_bench, "run_needle_bench", bench)
    return seen


def test_a_bench_is_told_what_the_flags_say(asked: list[NeedleOptions], tmp_path: Path) -> None:
    needles, haystack = tmp_path / "needles.jsonl", tmp_path / "book.txt"
    needles.touch()
    haystack.touch()
    flags = (
        f"--lengths 65536,131072 --needles {needles} --haystack {haystack} --mode mac "
        f"--rule titans --depths 5 --queries 7 --facts 7,70 --runs 3 --seed 4 --memory off --consolidate 2 "
        f"--spec code_active=32 --spec top_k_ratio=0.04 "
        f"--model {tmp_path}"
    )
    result = run("bench", "needle", *flags.split(), "--json")
    assert json.loads(result.stdout) == RESULT
    assert asked == [
        NeedleOptions(
            lengths=(65536, 131072),
            needles=needles,
            haystack=haystack,
            rule="titans",
            depths=5,
            queries=7,
            facts=(7, 70),
            spec={"code_active": 32, "top_k_ratio": 0.04},
            runs=3,
            seed=4,
            memory="off",
            consolidate=2,
            model=tmp_path,
        )
    ]


def test_a_bench_without_flags_measures_the_contracts_lengths(asked: list[NeedleOptions]) -> None:
    result = run("bench", "needle")
    assert result.exit_code == 0
    assert asked == [NeedleOptions(lengths=(65536, 262144, 1048576, 2097152))]
    for words in ("65,536", "75.0%", "53.1% to 88.8%", "12 ms", "2.1 MB", "84,000", "0.030%", "window 256"):
        assert words in result.stdout


def test_a_conversation_bench_is_told_what_the_flags_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[ConversationOptions] = []

    def bench(options: ConversationOptions, report: Callable[[str, float], None]) -> dict[str, Any]:
        seen.append(options)
        return {"right": 1.0}

    monkeypatch.setattr(cluster.conversation_bench, "run_conversation_bench", bench)
    flags = (
        f"--needles {tmp_path} --crowd 7 --mode mag --consolidate 2 --spec read_floor=0.2 --model {tmp_path}"
    )
    result = run("bench", "conversation", *flags.split(), "--json")
    assert json.loads(result.stdout) == {"right": 1.0}
    knobs = {"read_floor": 0.2}
    assert seen == [
        ConversationOptions(folder=tmp_path, crowd=7, mode="mag", consolidate=2, spec=knobs, model=tmp_path)
    ]
    refused = run("bench", "conversation", "--spec", "nobodys_knob=1")
    assert refused.exit_code == 2
    assert "nobodys_knob" in refused.stderr


def train(monkeypatch: pytest.MonkeyPatch, does: Callable[[TrainConfig], Path]) -> None:
    def trained(config: TrainConfig, progress: Callable[[dict[str, float]], None]) -> Path:
        progress(FIGURES)
        progress({"skim_step": 25.0, "skim_loss": 0.5})
        return does(config)

    monkeypatch.setattr(titanmem.train, "run", trained)


def test_a_training_is_told_what_the_flags_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[TrainConfig] = []

    def does(config: TrainConfig) -> Path:
        seen.append(config)
        return config.out

    train(monkeypatch, does)
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.touch()
    two.touch()
    flags = f"--out {tmp_path}/m --data {one} --data {two} --minutes 2.5 --seed 3 --threads 1 --resume"
    result = run("train", *flags.split(), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "out": f"{tmp_path}/m",
        **FIGURES,
        "skim_step": 25.0,
        "skim_loss": 0.5,
    }
    assert "step 25" in result.stderr
    expected = {"minutes": 2.5, "seed": 3, "threads": 1, "resume": True}
    assert seen == [TrainConfig(out=tmp_path / "m", data=(one, two), **expected)]
    plain = run("train", "--out", str(tmp_path / "m"), "--data", str(one))
    assert "trained 25 steps in 0.5 min" in plain.stdout
    more = f"--out {tmp_path}/m --data {one} --teacher {tmp_path} --lessons {two} --phrases {tmp_path}"
    assert run("train", *more.split()).exit_code == 0
    learned = {"teacher": tmp_path, "lessons": (two,), "phrases": tmp_path}
    assert seen[-1] == TrainConfig(out=tmp_path / "m", data=(one,), **learned)


def test_a_memory_is_trained_into_the_checkpoints_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[TrainConfig] = []
    train(monkeypatch, lambda config: seen.append(config) or config.out)
    data = tmp_path / "one.txt"
    data.touch()
    assert run("train", "--model", str(tmp_path), "--data", str(data)).exit_code == 0
    assert seen == [TrainConfig(out=tmp_path, model=tmp_path, data=(data,))]
    for flags in ([], ["--model", str(tmp_path), "--out", str(tmp_path / "m")]):
        result = run("train", "--data", str(data), *flags)
        assert result.exit_code == 2
        assert "--out FOLDER" in result.stderr


@pytest.mark.parametrize("checkpoint", [True, False])
def test_ctrl_c_in_a_training_says_what_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: bool
) -> None:
    def does(config: TrainConfig) -> Path:
        raise KeyboardInterrupt

    train(monkeypatch, does)
    data = tmp_path / "one.txt"
    data.touch()
    if checkpoint:
        (tmp_path / "checkpoint.pt").touch()
    result = run("train", "--out", str(tmp_path), "--data", str(data))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("stopped: ")
    assert ("--resume goes on" in result.stderr) is checkpoint


def test_a_training_on_nothing_is_one_line(tmp_path: Path) -> None:
    result = run("train", "--out", str(tmp_path), "--data", str(tmp_path / "none.txt"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"train.data: {tmp_path}/none.txt is not a file"
