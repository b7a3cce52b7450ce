"""`benchmarks/gpu.py --toy`: the whole script at tiny sizes, in a process of its own as on a GPU machine."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=110, check=False
    )


def test_the_toy_form_checks_everything_and_claims_nothing(tmp_path):
    done = run(SCRIPT, "--toy", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "figures.json").read_text())
    assert document["toy"] is True
    assert document["correct"] is True
    assert document["hardware"]
    assert document["torch"]
    assert document["triton"]
    assert datetime.fromisoformat(document["date"]).utcoffset() is not None
    assert (document["copy_tb_s"], document["matmul_bf16_tflop_s"]) == (None, None)
    assert [figure["gates"] for figure in document["ingest"]] == ["by token", "pooled"]
    shape = {"users", "chunk", "gates"}
    for figure in document["ingest"] + document["decode"] + document["sparse"]:
        assert shape & figure.keys()
        claims = {name: value for name, value in figure.items() if name not in shape}
        assert claims
        assert set(claims.values()) == {None}, "a toy claims no figure"


def test_a_wrong_kernel_gets_no_figure(tmp_path):
    """The script on a copy of the kernels in which reading forgets the residual."""
    for folder, names in (("benchmarks", ["gpu.py"]), ("kernels", [])):
        source = SCRIPT.parents[1] / folder
        (tmp_path / folder).mkdir()
        for path in [source / name for name in names] or source.glob("*.py"):
            (tmp_path / folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    broken = tmp_path / "kernels" / "read.py"
    text = broken.read_text(encoding="utf-8")
    assert "RESIDUAL=residual" in text
    broken.write_text(text.replace("RESIDUAL=residual", "RESIDUAL=False"), encoding="utf-8")
    done = run(tmp_path / "benchmarks" / "gpu.py", "--toy")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "dense_read" in done.stderr
    assert "sparse_read" not in done.stderr
