"""The commands against the real routes, served by uvicorn over a backend in this process."""

from __future__ import annotations

import http.server
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner, Result

from cluster import cli
from cluster.api import build_api
from cluster.door import DoorSettings
from cluster.errors import NotReady
from storage.errors import JournalFull
from storage.names import UserKey
from tests.cluster.fake_backend import (
    MODEL,
    FakeBackend,
    QueueFull,
    Served,
    eventually,
    serving,
    tiny_tokenizer,
)

APP = cli.build_app()
ROOT = Path(cli.__file__).parents[1]
START = "from cluster.cli import main; main()"
PARAGRAPH = "my dog is called Rex and the key is under the mat " * 10 + "\n\n"
U1 = UserKey("local", "u1")


@pytest.fixture(scope="module")
def door() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def served(door: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
    """A server with a fresh cluster behind it, named by the environment as a user would."""
    for name in [name for name in os.environ if name.startswith("TITANMEM_")]:
        monkeypatch.delenv(name)
    door.backend.__init__()
    monkeypatch.setenv("TITANMEM_URL", door.url)
    monkeypatch.chdir(tmp_path)
    return door


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(PARAGRAPH * 3200, encoding="utf-8")  # some 1.6 MB: four pieces, of several calls each
    return path


def run(*args: str, stdin: str | bytes | None = None) -> Result:
    before = signal.getsignal(signal.SIGINT)
    try:
        return CliRunner().invoke(APP, args, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"})
    finally:
        signal.signal(signal.SIGINT, before)


def document(*args: str, stdin: str | None = None) -> dict[str, Any]:
    """The one JSON document of a command that must succeed."""
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def start(*args: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    } | options
    return subprocess.Popen([sys.executable, "-c", START, *args], env=env, text=True, **pipes)


# chat


def test_messages_are_one_conversation_and_a_new_one_remembers(served: Served) -> None:
    told = run("chat", "--user", "u1", "-m", "My brother is called Anton.", "-m", "He is old.")
    assert told.exit_code == 0
    assert told.stdout.startswith("Noted: My brother is called Anton.")
    first, second = served.backend.chats
    assert [len(call.messages) for call in (first, second)] == [1, 3]
    assert second.messages[0].prefix_hash == first.messages[0].prefix_hash
    assert first.conversation == second.conversation != ""
    asked = document("chat", "--user", "u1", "-m", "What is my brother called?")
    assert "Anton" in asked["replies"][0]["reply"]
    assert served.backend.chats[2].conversation != first.conversation
    other = document("chat", "--user", "u2", "-m", "What is my brother called?")
    assert other["replies"][0]["reply"] == "I do not know."


def test_the_json_of_a_chat_has_its_figures(served: Served) -> None:
    talk = document("chat", "--user", "u1", "-m", "The key is under the mat.", "--conversation", "c1")
    (reply,) = talk["replies"]
    assert (talk["user"], talk["model"], reply["conversation"]) == ("u1", MODEL, "c1")
    assert reply["titan"]["memory_version"] == 1
    assert reply["usage"]["completion_tokens"] > 0
    assert reply["finish_reason"] == "stop"


def test_a_pipe_is_one_message_a_line_with_commands(served: Served) -> None:
    lines = "My dog is called Rex.\n\n/memory\n/new\nWhat is my dog called?\n/fly\n/help\n/quit\nunheard\n"
    result = run("chat", "--user", "u1", stdin=lines)
    assert result.exit_code == 0
    assert len(served.backend.chats) == 2
    assert [len(call.messages) for call in served.backend.chats] == [1, 1]
    assert served.backend.chats[0].conversation != served.backend.chats[1].conversation
    assert "Rex" in result.stdout.splitlines()[-1]
    for words in ("memory_version 1", "a new conversation", "no command /fly", "/quit ends"):
        assert words in result.stderr


def test_options_of_a_chat_arrive(served: Served) -> None:
    run("chat", "-u", "u1", "-m", "hi", "--memory", "off", "--max-tokens", "2", "--temperature", "0.5")
    (call,) = served.backend.chats
    assert (call.memory, call.max_tokens, call.temperature) == ("off", 2, 0.5)


def test_memory_of_a_stranger_is_said_not_failed(served: Served) -> None:
    result = run("chat", "--user", "nobody", stdin="/memory\n")
    assert (result.exit_code, result.stderr) == (0, "nothing is remembered of nobody yet\n")


def test_what_a_reply_would_do_to_a_terminal_is_left_out(served: Served) -> None:
    served.backend.reply = "a\x1b[2Jb\x07c"
    assert run("chat", "--user", "u1", "-m", "hi").stdout == "a[2Jbc\n"


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["-m", "hi", "--model", "gpt-9"], None, "gpt-9"),
        ([], b"good\n\xff\xfe\n", "stdin: line 2 is not valid UTF-8 at byte 0"),
        (["-m", "x" * 5_000_000], None, "too large"),
    ],
)
def test_a_chat_that_cannot_be_is_one_line(
    served: Served, args: list[str], stdin: bytes | None, words: str
) -> None:
    result = run("chat", "--user", "u1", *args, stdin=stdin)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_reply_that_breaks_off_is_a_failure(served: Served) -> None:
    served.backend.break_after = 3
    result = run("chat", "--user", "u1", "-m", "My dog is called Rex.")
    assert result.exit_code == 1
    assert "secret" not in result.output
    assert result.stderr.count("\n") == 1


def test_a_terminal_talks_goes_on_after_an_error_and_ends(served: Served) -> None:
    """A real terminal: prompts, a reply, a refused message, Ctrl-D."""
    served.backend.failures = []
    ours, theirs = pty.openpty()
    process = start("chat", "--user", "u1", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = Screen(ours)
    screen.wait_for("you> ")
    screen.type("My cat is Tom.\n")
    screen.wait_for("Noted: My cat is Tom.")
    screen.wait_for("you> ")
    served.backend.failures = [QueueFull("the queue of shard-0", 1.0)]
    screen.type("Hello\n")
    screen.wait_for("! the queue of shard-0 is full")
    screen.wait_for("you> ")
    screen.type("And again.\n")
    screen.wait_for("Noted: And again.")
    screen.wait_for("you> ")
    assert len(served.backend.chats[-1].messages) == 3, "the refused message is not part of the talk"
    screen.type("\x04")
    assert process.wait(timeout=20) == 0
    os.close(ours)


class Screen:
    """What a process writes to a terminal that we hold the other end of."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, words: str, on_silence: Callable[[], None] = lambda: None) -> str:
        """Reads on until `words` are there; what was read up to them. `on_silence`: every two seconds."""
        while words not in self._seen:
            if not select.select([self._terminal], [], [], 2.0)[0]:
                on_silence()
                continue
            try:
                data = os.read(self._terminal, 4096)
            except OSError:
                data = b""
            assert data, f"the terminal closed before {words!r}: {self._seen!r}"
            self._seen += data.decode(errors="replace")
        found, _, self._seen = self._seen.partition(words)
        return found


# ingest


def test_a_book_goes_in_piece_by_piece(served: Served, book: Path) -> None:
    summary = document("ingest", "--user", "u1", str(book))
    assert list(summary) == [
        "files",
        "tokens",
        "chunks",
        "tokens_written",
        "written_share",
        "memory_version",
        "seconds",
        "tokens_per_s",
    ]
    calls = served.backend.ingests
    assert summary["files"] == 1
    assert summary["tokens"] == sum(len(call.tokens) for call in calls)
    assert summary["written_share"] == pytest.approx(0.25, abs=0.01)
    assert summary["memory_version"] == sum(len(call.pieces()) for call in calls)
    assert {call.conversation for call in calls} == {calls[0].conversation}
    told = served.backend.memories[U1].told
    assert "".join(told) == book.read_text(encoding="utf-8")


def test_the_same_again_writes_nothing(served: Served, book: Path) -> None:
    first = document("ingest", "--user", "u1", str(book))
    again = run("ingest", "--user", "u1", str(book))
    assert again.exit_code == 0
    assert "4 of 4 pieces had been acknowledged before" in again.stderr
    assert f"version {first['memory_version']}" in again.stdout
    assert served.backend.memories[U1].version == first["memory_version"]


def test_stdin_and_several_files(served: Served, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A lighthouse keeper.", encoding="utf-8")
    summary = document("ingest", "--user", "u1", str(tmp_path / "a.txt"), "-", stdin="A violin maker.")
    assert summary["files"] == 2
    assert served.backend.memories[U1].told == ["A lighthouse keeper.", "A violin maker."]
    conversations = [call.conversation for call in served.backend.ingests]
    assert conversations[0] != conversations[1], "documents do not run into each other"


@pytest.mark.parametrize("error", [QueueFull("the queue", 1.0), NotReady("starting", 1.0)])
def test_a_busy_server_is_waited_for(served: Served, book: Path, error: Exception) -> None:
    served.backend.failures = [error]
    assert document("ingest", "--user", "u1", str(book))["files"] == 1
    assert "".join(served.backend.memories[U1].told) == book.read_text(encoding="utf-8")


def test_retry_for_0_gives_up_at_once(served: Served, book: Path) -> None:
    served.backend.failures = [QueueFull("the queue of shard-0", 5.0)]
    result = run("ingest", "--user", "u1", str(book), "--retry-for", "0")
    assert result.exit_code == 1
    assert "the queue of shard-0 is full" in result.stderr


def test_a_failure_half_way_says_what_is_kept(served: Served, book: Path) -> None:
    def fail_later(call: Any) -> Any:
        if len(served.backend.ingests) >= 12:
            raise JournalFull("the journal is full")
        return original(call)

    original = served.backend.ingest
    served.backend.ingest = fail_later  # type: ignore[method-assign]
    try:
        result = run("ingest", "--user", "u1", str(book), "--retry-for", "0")
    finally:
        del served.backend.ingest
    assert result.exit_code == 1
    assert re.search(r"\d+% of book\.txt is acknowledged and kept; the same command again", result.stderr)
    assert run("ingest", "--user", "u1", str(book)).exit_code == 0
    assert "".join(served.backend.memories[U1].told) == book.read_text(encoding="utf-8")


def test_ctrl_c_in_the_middle_of_a_book(served: Served, book: Path) -> None:
    """A real process and a real signal; then the same command again, and every word is there once."""
    served.backend.pace_s = 0.05
    process = start("ingest", "--user", "u1", str(book))
    assert eventually(lambda: len(served.backend.ingests) >= 4, within_s=30)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (130, "")
    assert re.fullmatch(r"stopped: \d+% of book\.txt is acknowledged and kept; .*\n", stderr), stderr
    served.backend.pace_s = 0.0
    summary = document("ingest", "--user", "u1", str(book))
    assert "".join(served.backend.memories[U1].told) == book.read_text(encoding="utf-8")
    assert summary["memory_version"] == served.backend.memories[U1].version


@contextmanager
def killed_at_the_end(backend: FakeBackend, port: int) -> Iterator[None]:
    """A server that does not wait for its requests when it ends, as none does after kill -9."""
    app = build_api(backend, tiny_tokenizer(), DoorSettings(model=MODEL))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def test_a_server_that_is_killed_half_way_is_found_again(book: Path) -> None:
    """The connection breaks, nobody listens for a while, then the same store is served again."""
    backend = FakeBackend()
    backend.pace_s = 0.05
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with killed_at_the_end(backend, port):
        process = start("ingest", "--user", "u1", str(book), "--url", f"http://127.0.0.1:{port}", "--json")
        assert eventually(lambda: len(backend.ingests) >= 4, within_s=30)
    time.sleep(0.5)
    backend.pace_s = 0.0
    with killed_at_the_end(backend, port):
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["files"] == 1
    assert "".join(backend.memories[U1].told) == book.read_text(encoding="utf-8")


def test_a_terminal_sees_a_progress_bar(served: Served, book: Path) -> None:
    served.backend.pace_s = 0.02
    ours, theirs = pty.openpty()
    env = {"COLUMNS": "140", "TERM": "xterm-256color"}
    os.environ.update(env)
    process = start("ingest", "--user", "u1", str(book), stderr=theirs)
    os.close(theirs)
    screen = Screen(ours)
    seen = screen.wait_for("left")
    assert "tokens/s" in seen
    assert "% written" in seen
    stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert stdout.startswith("u1: 1 file, ")


# users


def test_the_life_of_a_memory(served: Served, tmp_path: Path) -> None:
    assert run("users", "list").stderr == "no user has a memory yet\n"
    for text in ("One.", "Two.", "Three."):
        run("chat", "--user", "u1", "-m", text)
    assert document("users", "list") == {"users": [{"user": "u1", "memory_version": 3}]}
    assert document("users", "show", "u1")["memory_version"] == 3
    versions = document("users", "versions", "u1")["versions"]
    assert [row["version"] for row in versions] == [3, 2, 1]
    assert document("users", "pin", "u1")["pinned"] is True
    assert document("users", "rollback", "u1", "--to", "1")["memory_version"] == 4
    assert document("users", "rollback", "u1")["memory_version"] == 5
    assert document("users", "export", "u1", "u1.titanmem")["bytes"] > 10
    assert document("users", "import", "u2", "u1.titanmem")["memory_version"] == 1
    receipt = document("users", "forget", "u1")
    assert receipt["erased"] == ["HEAD"]
    gone = run("users", "show", "u1")
    assert gone.exit_code == 1
    assert "erased" in gone.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["u1.titanmem"], "and nothing half written"


@pytest.mark.parametrize(
    "what", ["list", "show u1", "versions u1", "pin u1", "rollback u1", "forget u1 --yes"]
)
def test_people_get_tables(served: Served, what: str) -> None:
    for text in ("One.", "Two."):
        run("chat", "--user", "u1", "-m", text)
    result = run("users", *what.split())
    assert result.exit_code == 0
    assert "u1" in result.stdout or "version" in result.stdout
    assert "{" not in result.stdout


def test_an_export_that_fails_leaves_the_file_as_it_was(served: Served, tmp_path: Path) -> None:
    before = tmp_path / "u1.titanmem"
    before.write_bytes(b"precious")
    result = run("users", "export", "u1", str(before))
    assert result.exit_code == 1
    assert "no memory" in result.stderr
    assert before.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [before]


def test_an_export_to_stdout_is_the_file_and_nothing_else(served: Served) -> None:
    run("chat", "--user", "u1", "-m", "One.")
    assert run("users", "export", "u1", "-").stdout_bytes == b'fake .titanmem ["One."]'


def test_a_broken_import_names_what_is_wrong(served: Served, tmp_path: Path) -> None:
    (tmp_path / "cut.titanmem").write_bytes(b"fake .titanmem [")
    result = run("users", "import", "u1", "cut.titanmem")
    assert result.exit_code == 1
    assert "length" in result.stderr
    assert (
        run("users", "import", "u1", "none.titanmem").stderr == "none.titanmem: No such file or directory\n"
    )
    assert run("users", "export", "u1", "nowhere/u1.titanmem").stderr == "nowhere: no such directory\n"


def test_forgetting_at_a_terminal_asks_first(served: Served) -> None:
    run("chat", "--user", "u1", "-m", "One.")
    for answer, code, left in (("n\n", 1, 1), ("\x03", 130, 1), ("y\n", 0, 0)):
        ours, theirs = pty.openpty()
        process = start(
            "users", "forget", "u1", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        screen = Screen(ours)
        screen.wait_for("[y/N]")
        if answer == "\x03":
            # Again if nothing happens: a signal just before a read begins does not end that read (CPython).
            process.send_signal(signal.SIGINT)
            screen.wait_for("stopped", partial(process.send_signal, signal.SIGINT))
        else:
            screen.type(answer)
            screen.wait_for("nothing was erased" if code else "receipt")
        assert process.wait(timeout=20) == code
        os.close(ours)
        assert len(served.backend.memories) == left


# shards, snapshots, keys


def test_shards_and_snapshots_call_the_admin_routes(served: Served, tmp_path: Path) -> None:
    assert document("shards", "list")["shards"][0]["shard"] == "shard-0"
    assert "serving" in run("shards", "list").stdout
    assert document("shards", "scale", "3") == {"shards": 3}
    assert served.backend.scaled == [3]
    assert document("shards", "drain", "shard-0")["shard"] == "shard-0"
    assert document("snapshot", "create")["target"] is None
    made = document("snapshot", "create", "--target", "file://./backups")
    assert made["target"] == f"file://{tmp_path}/backups", "relative to where the command runs"
    assert "20260101T000000Z-abcdef" in run("snapshot", "create").stdout


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(api_keys={"acme": "acme-key-1"}, admin_key="admin-key-1") as served:
        url = ["--url", served.url]
        assert run("users", "list", *url).exit_code == 1
        monkeypatch.setenv("TITANMEM_API_KEY", "acme-key-1")
        assert run("users", "list", *url).exit_code == 0
        refused = run("shards", "list", *url)
        assert refused.exit_code == 1
        assert refused.stderr.count("\n") == 1
        assert run("shards", "list", *url, "--key", "admin-key-1").exit_code == 0
        assert "acme-key-1" not in run("users", "--help").output + run("users", "list", "--help").output


def test_a_port_where_something_else_listens(tmp_path: Path) -> None:
    """An HTTP server that is not ours, and one that is not even HTTP."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            """Silent."""

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as page:
        thread = threading.Thread(target=page.serve_forever)
        thread.start()
        result = run("users", "list", "--url", f"http://127.0.0.1:{page.server_port}")
        page.shutdown()
        thread.join()
    assert result.exit_code == 1
    assert "is that a titanmem server?" in result.stderr
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]

        def hang_up() -> None:
            connection, _ = mute.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=hang_up)
        thread.start()
        result = run("users", "list", "--url", f"http://127.0.0.1:{port}")
        thread.join()
    assert result.exit_code == 1
    assert result.stderr.startswith("lost the connection")
    assert result.stderr.count("\n") == 1
