"""The measurements on a model of random weights: what they print is counted from what was answered."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.conversation_bench import FOLDER, ConversationOptions, read_rows, run_conversation_bench
from cluster.kvcache_bench import FullAttention, KvCacheOptions, run_kvcache_bench
from cluster.needle_bench import NEEDLES, NeedleOptions, choose, run_needle_bench
from tests.tiny_model import tiny_config, tiny_decoder, tiny_folder
from titanmem.needles import read_needles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("benches") / "model")


def test_needles_are_hidden_read_and_asked_for(folder: Path, tmp_path: Path) -> None:
    needles = tmp_path / "needles.jsonl"
    rows = [{"fact": f"Rex{n} is my dog.", "question": f"Who is {n}?", "answer": "nobody"} for n in range(4)]
    needles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    haystack = tmp_path / "text.txt"
    haystack.write_text("What is the name of my dog? " * 400)
    options = NeedleOptions(
        lengths=(600,), needles=needles, haystack=haystack, queries=4, runs=2, model=folder, mode="mag"
    )
    result = run_needle_bench(options)
    (row,) = result["lengths"]
    assert (row["tokens"], row["queries"], row["recall"]) == (600, 8, 0.0)
    assert row["written_share"] > 0
    assert result["mode"] == "mag"


def test_no_run_has_two_answers_to_one_question() -> None:
    needles = read_needles(NEEDLES)
    for seed in range(20):
        chosen = choose(needles, 40, random.Random(seed))
        assert len({needle.question for needle in chosen}) == 40
        assert {needle.family for needle in chosen} >= {"number", "word", "chat", "person"}
    assert sum(needle.family == "passkey" for needle in choose(needles, len(needles), random.Random(0))) == 1


def test_a_conversation_is_scored_by_what_stands_in_the_replies(folder: Path, tmp_path: Path) -> None:
    files = {
        "freeform": [{"fact": "f", "question": "q", "answer": answer, "family": "x"} for answer in ("", "\0")],
        "unseen": [{"fact": "f", "question": "q", "answer": answer, "family": "x"} for answer in ("", "", "\0")],
        "corrections": [{"fact": "f", "correction": "c", "question": "q", "answer": "\0", "old": ""}],
        "apart": [{"fact": "f", "other": "o", "question": "q", "other_question": "p", "answer": "",
                   "other_answer": "\0"}],
        "untold": [{"question": "q", "family": "x"}],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_conversation_bench(ConversationOptions(folder=tmp_path, model=folder, crowd=2))
    # The empty answer stands in every reply, the NUL in none.
    assert result["freeform"] == {"recall": 0.5, "questions": 2}
    assert result["unseen"] == {"recall": 2 / 3, "questions": 3}
    assert result["by_family"] == {"x": [1, 2]}
    assert result["corrections"] == {"new": 0.0, "old": 1.0, "questions": 1, "newer_wins": 0.0}
    assert result["apart"] == {"right": 0.5, "swapped": 0.5, "questions": 2, "kept_apart": 0.5}
    assert result["untold"] == {"false_recall": 1.0, "refused": 0.0, "questions": 1}
    assert result["strangers"] == {"false_recall": 0.5, "questions": 2}


@pytest.mark.parametrize(
    ("name", "count"),
    [("freeform", 200), ("corrections", 60), ("apart", 60), ("untold", 100), ("unseen", 83),
     ("development/freeform", 80), ("development/corrections", 80), ("development/apart", 80),
     ("development/untold", 80), ("development/unseen", 40)],
)  # fmt: skip
def test_what_people_said_is_what_it_claims(name: str, count: int) -> None:
    rows = read_rows(FOLDER / f"{name}.jsonl")
    assert len(rows) == count
    for row in rows:
        told = row.get("correction", row.get("fact", ""))
        assert row.get("answer", "").casefold() in told.casefold()
        assert row.get("other_answer", "").casefold() in row.get("other", "").casefold()


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "b"}\n[1]\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: fields must be text"):
        read_rows(tmp_path / "x.jsonl")


def test_full_attention_is_the_decoder_without_memory_or_window() -> None:
    decoder = tiny_decoder()
    ids = torch.randint(4, 300, (12,), generator=torch.Generator().manual_seed(0))
    side = FullAttention(decoder, 64)
    whole = side.read(ids)
    x, _ = decoder.lower_blocks(ids[None])
    out = decoder.upper_blocks(x, torch.zeros(1, 12, tiny_config().memory.value_dim), "mal")
    assert (whole - decoder.lm_head(out[0, -1])).abs().max() < 2e-5, "within one window both are the same"
    # What stands before is seen, however far back.
    side.fill(60)
    first = side.read(ids)
    side.cache[:, 1, ..., 0, :] += 5.0
    assert (side.read(ids) - first).abs().max() > 1e-4


def test_the_cache_beside_the_memory(folder: Path) -> None:
    small, large = (
        run_kvcache_bench(KvCacheOptions(tokens=tokens, measured_tokens=2048, threads=1, model=folder))
        for tokens in (1024, 8192)
    )
    assert large["kv"]["state_bytes"] == 8 * small["kv"]["state_bytes"]
    assert large["nltm"]["state_bytes"] == small["nltm"]["state_bytes"]
    assert large["model"]["extrapolated"]
    assert not small["model"]["extrapolated"]
    assert len(small["model"]["timed_at"]) == 5
    assert all(np.isfinite(value) and value > 0 for value in large["ratio"].values())
