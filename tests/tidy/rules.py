"""The house rules as functions: a folder in, a list of "file:line: what is wrong" out.

They read source with `ast` and import nothing of what they check: a second each, and no torch or Ray.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLOORS: dict[str, frozenset[str]] = {
    "kernels": frozenset(),
    "storage": frozenset(),
    "titanmem": frozenset({"kernels", "storage"}),
    "actors": frozenset({"titanmem", "kernels", "storage"}),
    "cluster": frozenset({"actors", "titanmem", "kernels", "storage"}),
}
"""Room → the rooms it may import from."""

FILE_LINES_MAX = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Ban:
    """Files whose path starts with one of `where` may not import `module`, but for the `except_` ones."""

    module: str
    where: tuple[str, ...]
    except_: tuple[str, ...] = ()
    why: str


BANS = (
    Ban(
        module="ray",
        where=("kernels/", "storage/", "titanmem/", "actors/"),
        except_=("actors/shard.py", "actors/process.py", "actors/snapshotter.py"),
        why="Ray is imported only in actors/shard.py, actors/process.py, actors/snapshotter.py and cluster/",
    ),
    Ban(
        module="ray",
        where=("cluster/shardmap.py", "cluster/scaling.py"),
        why="the plans of the cluster are pure, so that a simulator can run them",
    ),
    Ban(module="torch", where=("storage/",), why="a memory at rest is numpy and bytes"),
    Ban(module="torch", where=("titanmem/spec.py",), why="a spec is read where no torch is"),
)

# Written in two parts, since this file is under the rule as well.
OPEN_MARKS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
# A path on somebody's machine. /home/ray and /home/titanmem are homes inside images.
LOCAL_PATHS = re.compile(
    r"(?<![\w.:/-])/(?:" + "|".join((r"ro" + r"ot/", r"wor" + r"k/", r"Use" + r"rs/\w")) + r")"
    r"|(?<![\w.:/-])/home/(?!ray\b|titanmem\b)\w"
)
TEXT_SUFFIXES = frozenset({".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".html", ".js", ".css", ".txt", ""})
SKIPPED_FOLDERS = frozenset(
    {"node_modules", "__pycache__", "var", "build", "dist", "checkpoints", "examples"}
)
TEXT_BYTES_MAX = 1_000_000


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The rooms' own files, as (path relative to `root` with slashes, path)."""
    for room in FLOORS:
        for path in sorted((root / room).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def text_files(root: Path) -> Iterator[tuple[str, Path]]:
    """All texts that people wrote: sources, manifests, docs; not what tools made, nor the examples."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") and part not in {".ci", ".gitignore"} for part in parts)
        if hidden or SKIPPED_FOLDERS.intersection(parts) or any(part.endswith(".egg-info") for part in parts):
            continue
        if path.suffix in TEXT_SUFFIXES and path.is_file() and path.stat().st_size <= TEXT_BYTES_MAX:
            yield path.relative_to(root).as_posix(), path


def imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the file `name`, at any depth, relative ones resolved."""
    package = name.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from storage import names` names a module or a thing in one: both spellings are looked at.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def upward_imports(root: Path) -> list[str]:
    """Imports from a room that stands on the same or a higher floor."""
    found = []
    for name, tree in _trees(root):
        room = name.split("/")[0]
        for line, module in imports(name, tree):
            target = module.split(".")[0]
            if target in FLOORS and target != room and target not in FLOORS[room]:
                found.append(f"{name}:{line}: {room}/ may not import {module}")
    return found


def banned_imports(root: Path) -> list[str]:
    """Ray and torch where they may not be."""
    found = []
    for name, tree in _trees(root):
        bans = [ban for ban in BANS if name.startswith(ban.where) and name not in ban.except_]
        for line, module in imports(name, tree):
            found += [
                f"{name}:{line}: imports {module}: {ban.why}"
                for ban in bans
                if module.split(".")[0] == ban.module
            ]
    return found


def bare_prints(root: Path) -> list[str]:
    """Calls of the builtin `print`."""
    return [
        f"{name}:{node.lineno}: print: use logging, or rich's console in the command line"
        for name, tree in _trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def long_files(root: Path, lines_max: int = FILE_LINES_MAX) -> list[str]:
    """Files that hold more than one idea, going by their length."""
    counted = (
        (name, len(path.read_text(encoding="utf-8").splitlines())) for name, path in python_files(root)
    )
    return [f"{name}: {lines} lines, {lines_max} at most" for name, lines in counted if lines > lines_max]


def open_marks(root: Path) -> list[str]:
    """Notes of unfinished work."""
    return _lines_that_match(root, OPEN_MARKS, "unfinished work is an issue, not a comment")


def local_paths(root: Path) -> list[str]:
    """Absolute paths of one developer's machine."""
    return _lines_that_match(root, LOCAL_PATHS, "a path of somebody's own machine")


def import_cycles(root: Path) -> list[str]:
    """Modules that import each other in a circle when they are loaded (imports in functions do not count)."""
    graph = _load_graph(root)
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def _load_graph(root: Path) -> dict[str, set[str]]:
    """Module → the project's modules that it imports while it is loaded."""
    trees = {_module_of(name): (name, tree) for name, tree in _trees(root)}
    graph: dict[str, set[str]] = {}
    for module, (name, tree) in trees.items():
        top = ast.Module(body=list(_at_load(tree.body)), type_ignores=[])
        targets = set()
        for _, imported in imports(name, top):
            known = imported if imported in trees else imported.rpartition(".")[0]
            if known in trees and known != module:
                targets.add(known)
        graph[module] = targets
    return graph


def _at_load(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements that run when a module is loaded: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from _at_load(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _at_load(node.body + node.orelse + node.finalbody)


def _module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for name, path in python_files(root):
        yield name, ast.parse(path.read_text(encoding="utf-8"), filename=name)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _lines_that_match(root: Path, pattern: re.Pattern[str], why: str) -> list[str]:
    return [
        f"{name}:{number}: {why}: {line.strip()[:100]}"
        for name, path in text_files(root)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
