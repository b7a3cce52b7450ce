"""The tree keeps the house rules, and each rule catches a planted violation, or it would prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tidy import rules

ROOT = Path(__file__).resolve().parents[2]
Rule = Callable[[Path], list[str]]
ALL_RULES: tuple[Rule, ...] = (
    rules.upward_imports,
    rules.banned_imports,
    rules.bare_prints,
    rules.long_files,
    rules.open_marks,
    rules.local_paths,
    rules.import_cycles,
)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    assert not (found := rule(ROOT)), "\n" + "\n".join(found)


def test_the_rules_see_the_rooms() -> None:
    rooms = {name.split("/")[0] for name, _ in rules.python_files(ROOT)}
    assert rooms == set(rules.FLOORS)
    names = {name for name, _ in rules.text_files(ROOT)}
    assert {"Makefile", "pyproject.toml", "tests/tidy/rules.py", ".ci/run"} <= names


MARK = "TO" + "DO"
HOME = "/ro" + "ot/"
OTHER_HOME = "/ho" + "me/jane/"
PLANTED: list[tuple[Rule, str, str]] = [
    (rules.upward_imports, "storage/store.py", "import actors.keeper\n"),
    (rules.upward_imports, "kernels/ops.py", "from storage import names\n"),
    (rules.upward_imports, "storage/store.py", "from kernels.ops import read\n"),
    (rules.upward_imports, "titanmem/memory.py", "def f():\n    from cluster import app\n"),
    (rules.upward_imports, "actors/keeper.py", "import importlib\nimportlib.import_module('cluster.app')\n"),
    (rules.upward_imports, "actors/deep/keeper.py", "from ...cluster import app\n"),
    (rules.banned_imports, "actors/keeper.py", "import ray\n"),
    (rules.banned_imports, "titanmem/train.py", "from ray.train import report\n"),
    (rules.banned_imports, "cluster/shardmap.py", "import ray.serve\n"),
    (rules.banned_imports, "storage/titanmem.py", "from torch import Tensor\n"),
    (rules.banned_imports, "titanmem/spec.py", "import torch.nn as nn\n"),
    (rules.bare_prints, "cluster/app.py", "def f():\n    print('here')\n"),
    (rules.long_files, "kernels/ops.py", "x = 1\n" * (rules.FILE_LINES_MAX + 1)),
    (rules.open_marks, "k8s/base/rayservice.yaml", f"# {MARK} later\n"),
    (rules.open_marks, "kernels/ops.py", f"x = 1  # {MARK}: faster\n"),
    (rules.local_paths, "docs/operations.md", f"cd {HOME}titanmem\n"),
    (rules.local_paths, "cluster/config.py", f"MODEL = '{OTHER_HOME}model'\n"),
    (rules.import_cycles, "storage/a.py", "import storage.b\n"),
]


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_planted_violation_is_caught(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, {"storage/b.py": "from storage import a\n", name: text})
    found = rule(tmp_path)
    assert len(found) == 1, found
    assert name in found[0] or rule is rules.import_cycles


ALLOWED: list[tuple[str, str]] = [
    ("cluster/app.py", "import ray\nfrom actors.shard import MemoryShard\n"),
    (
        "actors/shard.py",
        "import ray\nimport torch\nfrom titanmem import spec\nfrom storage.names import UserKey\n",
    ),
    ("actors/snapshotter.py", "import ray\n"),
    ("storage/store.py", "import torchless\nfrom storage import names\nfrom . import errors\n"),
    ("cluster/cli.py", "from rich.console import Console\nConsole().print('said')\n"),
    ("cluster/api.py", "URL = 'http://example.com/work/x'\nHOME = '/home/ray/store'\n"),
    ("kernels/ops.py", "x = 1\n" * rules.FILE_LINES_MAX),
    ("titanmem/memory.py", "def f():\n    import titanmem.memory\n"),
]


@pytest.mark.parametrize(("name", "text"), ALLOWED)
def test_what_is_allowed_passes(name: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, {name: text})
    assert [found for rule in ALL_RULES for found in rule(tmp_path)] == []
