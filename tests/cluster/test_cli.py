"""The `titanmem` command without a server: its use, its failures, its start."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster import cli
from cluster.commands import checks, ending, ingest
from cluster.commands.bench_tables import wilson
from cluster.commands.checks import Finding
from cluster.commands.terminal import CommandFailed, figure, printable
from cluster.config import Config
from storage.errors import NoSuchMemory
from tests.tiny_model import tiny_folder

COMMANDS = [
    "serve",
    "chat",
    "ingest",
    "users list",
    "users show",
    "users versions",
    "users rollback",
    "users pin",
    "users export",
    "users import",
    "users forget",
    "shards list",
    "shards scale",
    "shards drain",
    "snapshot create",
    "snapshot list",
    "snapshot verify",
    "snapshot restore",
    "snapshot prune",
    "bench conversation",
    "bench kvcache",
    "bench memory",
    "bench needle",
    "train",
    "doctor",
]
APP = cli.build_app()
START = "from cluster.cli import main; main()"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("TITANMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def run(*args: str, stdin: str | None = None) -> Result:
    before = signal.getsignal(signal.SIGINT)
    try:
        return CliRunner().invoke(APP, args, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"})
    finally:
        signal.signal(signal.SIGINT, before)


def start(*args: str, **options: object) -> subprocess.Popen[str]:
    root = Path(cli.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", START, *args],
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_read(pipe: int) -> None:
    """Returns when the other side has taken what was written: it has started, and waits for more."""
    for _ in range(2000):
        if not int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder):
            return
        time.sleep(0.01)
    raise TimeoutError("nobody reads the pipe")


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """SIGINT, again if nothing happens: one just before a read begins does not end that read (CPython)."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            continue
    raise TimeoutError("Ctrl-C does not end it")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: titanmem {command}" in result.stdout


def test_the_list_above_is_all_there_is() -> None:
    from typer.main import get_command

    root = get_command(APP)
    found = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [f"{name} {sub}" for sub in inner] if inner else [name]
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["chat"],
        ["chat", "--user", "../x", "-m", "hi"],
        ["chat", "--user", "u" * 10_000, "-m", "hi"],
        ["chat", "--user", "u1", "-m", "hi", "--url", "ftp://x"],
        ["chat", "--user", "u1", "-m", "hi", "--memory", "maybe"],
        ["chat", "--user", "u1", "-m", "hi", "--key", "clé"],
        ["ingest", "--user", "u1"],
        ["ingest", "--user", "u1", "-", "-"],
        ["users", "rollback", "u1", "--to", "x"],
        ["users", "export", "u1", "-", "--json"],
        ["shards", "scale", "0"],
        ["snapshot", "restore"],
        ["snapshot", "restore", "--store", "file:///s"],
        ["snapshot", "restore", "a", "--at", "2026-01-01", "--store", "file:///s"],
        ["snapshot", "restore", "--at", "yesterday", "--store", "file:///s"],
        ["snapshot", "list", "--target", "ftp://x"],
        ["snapshot", "prune", "--daily", "0", "--weekly", "0", "--monthly", "0"],
        ["bench", "needle", "--lengths", "many"],
        ["bench", "needle", "--lengths", "0"],
        ["bench", "needle", "--lengths", ","],
        ["bench", "needle", "--haystack", "nowhere.txt"],
        ["serve", "--port", "70000"],
        ["serve", "--mode", "max"],
        ["serve", "--store", "ftp://x"],
        ["serve", "--host", "0.0.0.0"],
        ["doctor", "--config", "nowhere.toml"],
    ],
    ids=lambda args: " ".join(args)[:40],
)
def test_wrong_use_is_2_and_says_what(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr or result.stdout, "help or the reason"
    assert len(result.output) < 8000, "a long name is not repeated"
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "args",
    [
        ["chat", "--user", "u1", "-m", "hi"],
        ["users", "list", "--json"],
        ["users", "forget", "u1", "--yes"],
        ["shards", "list"],
        ["snapshot", "create"],
    ],
    ids=lambda args: " ".join(args),
)
def test_no_server_is_one_line_and_1(args: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = run(*args, "--url", url)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"no server at {url} : start one with `make serve`\n"


def test_an_ingest_without_a_server_does_not_wait(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A whale.\n", encoding="utf-8")
    started = time.monotonic()
    result = run("ingest", "--user", "u1", str(book), "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert result.stderr.startswith("no server at")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.txt", b"abc\xff", "bad.txt: not valid UTF-8 at byte 3"),
        ("cut.gz", b"\x1f\x8b\x08\x00", "cut.gz: the packed file is damaged"),
        ("empty.txt", b"", "no text in"),
    ],
)
def test_a_bad_file_is_named_before_anything_is_sent(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    """With a good file before it: a server that is not there would be the error if anything were sent."""
    (tmp_path / "good.txt").write_bytes(b"text" if name != "empty.txt" else b"")
    (tmp_path / name).write_bytes(content)
    files = [str(tmp_path / "good.txt"), str(tmp_path / name)]
    result = run("ingest", "--user", "u1", *files, "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_file_is_one_line() -> None:
    result = run("ingest", "--user", "u1", "nowhere.txt")
    assert (result.exit_code, result.stderr) == (1, "nowhere.txt: No such file or directory\n")


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANMEM_DEBUG", "1")
    result = run("ingest", "--user", "u1", "nowhere.txt")
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CommandFailed("two\nlines  of\ttext"), "two lines of text"),
        (NoSuchMemory("alice has no memory"), "alice has no memory"),
        (ValueError("port: 0 is outside 1 to 65535"), "port: 0 is outside 1 to 65535"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (KeyError("x"), "unexpected KeyError: 'x' (TITANMEM_DEBUG=1 shows where)"),
        (ValueError(), "unexpected ValueError (TITANMEM_DEBUG=1 shows where)"),
        (CommandFailed("x" * 5000), "x" * 999 + "…"),
    ],
)
def test_every_error_is_one_line(error: Exception, line: str) -> None:
    assert ending.one_line(error) == line


def test_the_start_is_light() -> None:
    """No torch, no Ray, no httpx for --help: what it would cost is seconds of a user's life."""
    code = (
        "import sys; from cluster.cli import build_app; build_app()(['--help'], standalone_mode=False);"
        "print([m for m in ('torch', 'ray', 'numpy', 'httpx', 'fastapi', 'boto3') if m in sys.modules])"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_ctrl_c_while_stdin_is_read_is_one_line() -> None:
    """Real signals to a real process that waits for its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, "ingest", "--user", "u1", "-"],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write("a word")
    process.stdin.flush()
    wait_until_read(process.stdin.fileno())
    stdout, stderr = interrupt(process)
    assert (process.returncode, stdout, stderr) == (130, "", "stopped\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    process = start("--help")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=20) in (0, 1)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("titanmem")


def test_what_a_terminal_obeys_is_not_shown() -> None:
    assert printable("a\x1b[31mb\x07\r\n\tc\x9b") == "a[31mb\n\tc"
    assert figure({"a": "\x1b"}) == '{"a": "\\u001b"}'
    assert [figure(v) for v in (None, True, 0.123456, 9999, 1234567, "x")] == [
        "-",
        "yes",
        "0.1235",
        "9999",
        "1,234,567",
        "x",
    ]


def test_time_left_is_a_clock() -> None:
    assert [ingest._clock(s) for s in (0.4, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (15, 20, 0.5313, 0.8881), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_against_known_intervals(hits: int, trials: int, low: float, high: float) -> None:
    """Values of R's binom::binom.wilson."""
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("hits", "trials"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_share(hits: int, trials: int) -> None:
    with pytest.raises(ValueError, match="hits"):
        wilson(hits, trials)


# doctor


def finding(check: checks.Check, **config: object) -> Finding:
    return check(Config(**config))  # type: ignore[arg-type]


def test_the_machine_checks_answer_here() -> None:
    for check in (checks.python, checks.cpu, checks.memory, checks.shared_memory, checks.open_files):
        assert finding(check).status in ("ok", "warning")
    assert finding(checks.package_names).status == "ok"


def test_a_foreign_kernels_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's package beside ours: first only installed, then the one that is imported."""
    (tmp_path / "kernels-0.9.0.dist-info").mkdir()
    (tmp_path / "kernels-0.9.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert finding(checks.package_names).status == "warning"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    clash = finding(checks.package_names)
    assert clash.status == "broken"
    assert "uninstall" in clash.advice


def test_a_taken_port_is_broken_and_a_free_one_is_not() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        taken = holder.getsockname()[1]
        assert finding(checks.port, port=taken).status == "broken"
    assert finding(checks.port, port=free_port()).status == "ok"


def test_a_model_folder_is_looked_into(tmp_path: Path) -> None:
    assert "does not exist" in finding(checks.model, model=str(tmp_path / "none")).found
    (tmp_path / "config.json").write_text("{}")
    assert "model_type = None" in finding(checks.model, model=str(tmp_path)).found
    whole = tiny_folder(tmp_path / "model")
    assert finding(checks.model, model=str(whole)).status == "ok"
    (whole / "model.safetensors").write_bytes(b"12345678")
    assert "not a safetensors file" in finding(checks.model, model=str(whole)).found
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (whole / name).unlink()
        assert f"{name} is missing" in finding(checks.model, model=str(whole)).found


def test_a_store_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert finding(checks.store, store=f"file://{tmp_path}/file/store").status == "broken"
    assert finding(checks.store, store=f"file://{tmp_path}/store").status == "ok"


def test_doctor_fails_with_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (checks.python, checks.model))
    result = run("doctor", "--json", "--model", str(tmp_path / "none"))
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ok"]) == (1, False)
    assert [check["name"] for check in document["checks"]] == ["Python", "model"]
    assert result.stderr == "broken: model\n"
    table = run("doctor", "--model", str(tmp_path / "none"))
    assert "does not exist" in table.stdout
    monkeypatch.setattr(checks, "CHECKS", (checks.python,))
    assert run("doctor").exit_code == 0


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_check(_: Config) -> Finding:
        raise RuntimeError("no such driver")

    monkeypatch.setattr(checks, "CHECKS", (own_check,))
    (only,) = checks.all_findings(Config())
    assert (only.name, only.status, only.found) == ("own check", "broken", "RuntimeError: no such driver")


def test_packages_are_held_against_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "ray": "2.60.0", "rich": "15.0.0"}
    pins = ["torch==2.13.0", "ray[serve]==2.60.0", 'pytest==1.0; extra == "dev"', "rich==15.0.0"]

    def version(name: str) -> str:
        if name not in versions:
            raise checks.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda _: pins)
    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    assert finding(checks.packages).status == "ok"
    versions["rich"] = "14.0.0"
    assert finding(checks.packages).status == "warning"
    assert "rich 14.0.0 (pinned 15.0.0)" in finding(checks.packages).found
    del versions["rich"]
    assert (finding(checks.packages).status, finding(checks.packages).found) == ("broken", "missing: rich")
