"""docs/operations.md names only what exists: commands, variables and their defaults, metrics, files."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator

import yaml

from cluster.config import Config
from tests.k8s import cli
from tests.k8s.render import K8S, REPO, load

TEXT = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")
ROOMS = ("actors", "cluster", "storage", "titanmem")
COUNTED = ("_total", "_bucket", "_sum", "_count")


def code() -> Iterator[str]:
    """Every piece of code of the document: lines of blocks, and what stands between backticks."""
    for block in re.findall(r"^ *```\n(.*?)^ *```$", TEXT, re.MULTILINE | re.DOTALL):
        yield from (line.split(" #")[0].strip() for line in block.splitlines())
    yield from re.findall(
        r"`([^`\n]+)`", re.sub(r"^ *```\n.*?^ *```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    )


def commands() -> list[list[str]]:
    found = (re.search(r"(?:^|-- )(titanmem [a-z].*)", text) for text in code())
    return [shlex.split(match.group(1)) for match in found if match]


def test_every_command_exists() -> None:
    assert len(commands()) > 12
    for words in commands():
        cli.check(words)


def test_every_variable_is_a_field_and_every_field_is_there() -> None:
    rows = dict(re.findall(r"^\| `(TITANMEM_\w+)` \| (.+?) \|", TEXT, re.MULTILINE))
    fields = {f"TITANMEM_{field.name.upper()}": field for field in dataclasses.fields(Config)}
    assert set(rows) == set(fields) - {"TITANMEM_SPEC"}
    for name, shown in rows.items():
        default = fields[name].default
        if default in (None, dataclasses.MISSING):
            assert shown in ("none", "what ships")
        else:
            assert type(default)(shown.strip("`")) == default, name
    mentioned = {
        name for name in re.findall(r"TITANMEM_[A-Z_]+", TEXT) if not name.startswith("TITANMEM_SPEC_")
    }
    assert mentioned <= set(fields) | {"TITANMEM_API_KEY"}, "the last is the command's own"


def test_every_metric_is_made_somewhere() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8") for room in ROOMS for path in (REPO / room).rglob("*.py")
    )
    names = set(re.findall(r"\b(?:titan|vllm):\w+", TEXT))
    assert len(names) > 8
    for name in names:
        base = next((name.removesuffix(end) for end in COUNTED if name.endswith(end)), name)
        assert re.search(rf'"{base}(?:_total)?"|# TYPE {base}(?:_total)? ', source), f"nothing makes {name}"


def test_every_file_and_schedule_is_there() -> None:
    for name in set(re.findall(r"\bk8s/[\w/.-]*\w", TEXT)):
        assert (REPO / name).exists(), name
    for name, hour in re.findall(r"`(titanmem-(?:snapshot|prune))`[^.]*? at (\d\d:\d\d)", TEXT):
        job = next(m for m in load(K8S / "base" / "snapshot.yaml") if m["metadata"]["name"] == name)
        minute, at = job["spec"]["schedule"].split()[:2]
        assert f"{int(at):02d}:{int(minute):02d}" == hour
    assert len(re.findall(r" at \d\d:\d\d", TEXT)) == 2


def test_names_of_the_cluster_are_right() -> None:
    files = [path for path in sorted(K8S.rglob("*.yaml")) if "overlays" not in path.parts]
    documents = [d for path in files for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d]
    named = {d["metadata"]["name"] for d in documents if "metadata" in d} | {"titanmem-head-svc"}
    kinds = "service|rayservice|cronjob|job|pvc"
    for name in re.findall(rf"(?:{kinds})[/ ](titanmem[\w-]*)", TEXT):
        assert name in named, name
    for name in ("titanmem-config", "titanmem-secrets", "titanmem-operator", "titanmem-toolbox"):
        assert name in TEXT
        assert name in named
