"""`titanmem chat`: a conversation in the terminal, from arguments, or from a pipe."""

from __future__ import annotations

import importlib
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.client_errors import ConnectionLost, NoServer, Refused
from cluster.commands.terminal import (
    DEFAULT_URL,
    CommandFailed,
    JsonOption,
    KeyOption,
    UrlOption,
    UserOption,
    connect,
    emit,
    figure,
    note,
    printable,
)

if TYPE_CHECKING:
    from cluster.client import Client

app = typer.Typer(add_completion=False)
PROMPT = "you> "
HELP = "/new starts a new conversation, /memory shows the memory's figures, /quit ends"


class Access(StrEnum):
    """What a reply may do with the memory."""

    read_write = "read_write"
    read_only = "read_only"
    off = "off"


@app.command(epilog="Example: titanmem chat --user alice --message 'What is my brother called?'")
def chat(
    user: UserOption,
    message: Annotated[
        list[str] | None,
        typer.Option("--message", "-m", help="Say this and end; may be repeated. Else: stdin, a line each."),
    ] = None,
    conversation: Annotated[
        str, typer.Option("--conversation", help="Name of the conversation; default: a new one.")
    ] = "",
    memory: Annotated[Access, typer.Option("--memory", help="What a reply may do with it.")] = (
        Access.read_write
    ),
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest reply.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, max=2, help="0 always takes the likeliest token.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Default: the one that the server serves.")] = "",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Talk with a model that remembers you. /new, /memory and /quit are commands, also in a pipe."""
    interactive = not message and sys.stdin.isatty()
    if interactive and json:
        raise typer.BadParameter("--json needs --message, or messages through a pipe")
    with connect(url, key) as client:
        talk = Talk(
            client=client,
            user=user,
            model=model or _served(client),
            conversation=conversation or secrets.token_hex(8),
            options={"memory": memory.value, "max_tokens": max_tokens, "temperature": temperature},
            show=(lambda text: None) if json else _show,
        )
        if interactive:
            note(f"{talk.model} remembers for {user}. {HELP}.")
            _talk_at_terminal(talk)
            return
        for line in message or _lines_of_stdin():
            if not talk.hear(line):
                break
        if json:
            emit({"user": user, "model": talk.model, "replies": talk.replies})


@dataclass(slots=True)
class Talk:
    """One conversation with the server: what was said so far, and what the next line does."""

    client: Client
    user: str
    model: str
    conversation: str
    options: dict[str, Any]
    show: Callable[[str], None]
    messages: list[dict[str, str]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, line: str) -> bool:
        """Answers one line or obeys its command; False when the talk is over."""
        word = line.strip()
        if not word:
            return True
        if word == "/quit":
            return False
        if word == "/new":
            self.conversation, self.messages = secrets.token_hex(8), []
            note("a new conversation; the memory stays")
        elif word == "/memory":
            self._show_memory()
        elif word == "/help":
            note(HELP)
        elif word.startswith("/") and word[1:].isalpha():
            note(f"no command {word}: {HELP}")
        else:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        request = {"user": self.user, "model": self.model, "conversation": self.conversation}
        with self.client.chat(asked, **request, **self.options) as stream:
            try:
                for piece in stream:
                    self.show(piece)
            finally:
                self.show("\n")
        # Sent again word for word, so that the server recognises what it has already written.
        self.messages = [*asked, {"role": "assistant", "content": stream.text}]
        self.replies.append(
            {
                "message": line,
                "reply": stream.text,
                "conversation": self.conversation,
                "finish_reason": stream.finish_reason,
                "titan": stream.titan,
                "usage": stream.usage,
            }
        )

    def _show_memory(self) -> None:
        try:
            record = self.client.memory(self.user)
        except Refused as error:
            if error.status != 404:
                raise
            note(f"nothing is remembered of {self.user} yet")
            return
        note("  ".join(f"{name} {figure(value)}" for name, value in record.items()))


def _talk_at_terminal(talk: Talk) -> None:
    """Reads lines until /quit or Ctrl-D; a failed answer is said and the talk goes on."""
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and a history
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            note("")
            return
        try:
            if not talk.hear(line):
                return
        except (NoServer, ConnectionLost, Refused) as error:
            note(f"! {' '.join(str(error).split())}")


def _served(client: Client) -> str:
    names = client.models()
    if not names:
        raise CommandFailed(f"{client.url} serves no model")
    return names[0]


def _lines_of_stdin() -> Iterator[str]:
    """Messages of a pipe, one a line; bytes that are no UTF-8 end it with a line that says which."""
    lines: Iterable[bytes] = sys.stdin.buffer
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CommandFailed(f"stdin: line {number} is not valid UTF-8 at byte {error.start}") from error


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()
