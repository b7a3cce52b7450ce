"""`titanmem ingest`: documents of any length into one memory, and on with it after any interruption."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cluster.client_errors import ClientError, NoServer
from cluster.commands.documents import Document, Piece, check_document
from cluster.commands.retry import retrying
from cluster.commands.terminal import (
    DEFAULT_URL,
    CommandFailed,
    CommandStopped,
    JsonOption,
    KeyOption,
    UrlOption,
    UserOption,
    connect,
    emit,
    note,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from cluster.client import Client, IngestReply

app = typer.Typer(add_completion=False)
RETRY_FOR_S = 60.0


@app.command(epilog="Example: titanmem ingest --user alice book.txt notes.txt.xz")
def ingest(
    user: UserOption,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="UTF-8 text, also .xz and .gz; - for stdin.")
    ],
    retry_for: Annotated[
        float,
        typer.Option("--retry-for", min=0, help="Seconds to go on trying when the server is busy or gone."),
    ] = RETRY_FOR_S,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Stream documents into a memory. Run again after an interruption, it skips what was acknowledged."""
    if files.count("-") > 1:
        raise typer.BadParameter("stdin (-) can be read only once")
    with ExitStack() as stack:
        documents = [check_document(file) for file in files]
        for document in documents:
            stack.callback(document.close)
        if not any(document.text_bytes for document in documents):
            raise CommandFailed(f"no text in {', '.join(files)}")
        client, bar = stack.enter_context(connect(url, key)), stack.enter_context(_Bar(documents))
        run = _Ingest(client=client, user=user, retry_for_s=retry_for, bar=bar)
        for document in documents:
            run.send(document)
        bar.finish()
    summary = run.total.summary()
    if run.total.pieces_known:
        note(f"{run.total.pieces_known} of {run.total.pieces} pieces had been acknowledged before")
    if json:
        emit(summary)
    else:
        say(_summary_line(user, summary))


@dataclass(slots=True)
class Totals:
    """What the acknowledged pieces come to."""

    files: int = 0
    tokens: int = 0
    chunks: int = 0
    tokens_written: int = 0
    memory_version: int | None = None
    pieces: int = 0
    pieces_known: int = 0
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    def add(self, reply: IngestReply) -> None:
        self.tokens += reply.tokens
        self.chunks += reply.chunks
        self.tokens_written += reply.tokens_written
        self.pieces += 1
        self.pieces_known += reply.known
        self.memory_version = max(self.memory_version or 0, reply.memory_version)

    @property
    def seconds(self) -> float:
        return max((self.ended_s or time.monotonic()) - self.started_s, 1e-6)

    @property
    def written_share(self) -> float:
        return self.tokens_written / self.tokens if self.tokens else 0.0

    def summary(self) -> dict[str, Any]:
        self.ended_s = self.ended_s or time.monotonic()
        return {
            "files": self.files,
            "tokens": self.tokens,
            "chunks": self.chunks,
            "tokens_written": self.tokens_written,
            "written_share": round(self.written_share, 6),
            "memory_version": self.memory_version,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens / self.seconds, 1),
        }


class _Ingest:
    """Sends documents one after another, piece by piece; each piece until it is acknowledged."""

    def __init__(self, *, client: Client, user: str, retry_for_s: float, bar: _Bar) -> None:
        self._client = client
        self._user = user
        self._retry_for_s = retry_for_s
        self._bar = bar
        self.total = Totals()

    def send(self, document: Document) -> None:
        sent_bytes = 0
        try:
            for piece in document.pieces():
                reply = self._acknowledged(document, piece)
                self.total.add(reply)
                sent_bytes += len(piece.data)
                self._bar.advance(document, len(piece.data), self.total)
        except KeyboardInterrupt:
            raise CommandStopped("stopped: " + self._where(document, sent_bytes)) from None
        except ClientError as error:
            if sent_bytes or self.total.files:
                raise CommandFailed(f"{error}; {self._where(document, sent_bytes)}") from error
            raise
        self.total.files += 1

    def _acknowledged(self, document: Document, piece: Piece) -> IngestReply:
        def call() -> IngestReply:
            return self._client.ingest(
                self._user,
                piece.data,
                idempotency_key=document.piece_key(piece.index),
                conversation=document.conversation,
            )

        # A server that was never there is most likely not meant to be: say so at once.
        first = self.total.memory_version is None
        return retrying(
            call,
            for_s=self._retry_for_s,
            give_up_on=(NoServer,) if first else (),
            on_wait=self._bar.wait,
        )

    def _where(self, document: Document, sent_bytes: int) -> str:
        share = sent_bytes / document.text_bytes
        return (
            f"{share:.0%} of {document.name} is acknowledged and kept; "
            "the same command again goes on from there"
        )


class _Bar:
    """Progress of all documents on stderr: share, tokens a second, written share, time left."""

    def __init__(self, documents: list[Document]) -> None:
        self._bytes = sum(document.text_bytes for document in documents)
        self._done = 0
        self._progress: Progress = progress_bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._task = self._progress.add_task("sending", total=self._bytes, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, document: Document, count: int, total: Totals) -> None:
        assert self._task is not None, "a bar is entered before it moves"
        self._done += count
        left_s = total.seconds * (self._bytes - self._done) / self._done
        figures = (
            f"{total.tokens / total.seconds:,.0f} tokens/s  {total.written_share:.2%} written  "
            f"{_clock(left_s)} left"
        )
        self._progress.update(
            self._task, completed=self._done, figures=figures, description=_short(document.name)
        )

    def wait(self, error: ClientError, wait_s: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, figures=f"waiting {wait_s:.0f} s: {_short(str(error), 60)}")

    def finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=self._bytes)


def _short(text: str, chars_max: int = 24) -> str:
    text = text.replace("[", "(")  # never rich's markup
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _summary_line(user: str, summary: dict[str, Any]) -> str:
    return (
        f"{user}: {summary['files']} file{'s' * (summary['files'] != 1)}, {summary['tokens']:,} tokens in "
        f"{summary['chunks']:,} chunks, {summary['tokens_written']:,} written "
        f"({summary['written_share']:.2%}), version {summary['memory_version']}, "
        f"{summary['seconds']:.1f} s, {summary['tokens_per_s']:,.0f} tokens/s"
    )
