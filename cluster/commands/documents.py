"""Documents on their way into a memory: read as UTF-8 of any length, checked first, cut into pieces.

A document is read twice: to check it and name its content, then to send it. It is never held in memory.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from cluster.commands.terminal import CommandFailed

PIECE_BYTES = 512 * 1024
"""Text of one request; a part of every piece's name, since another cut makes other pieces. Between two requests
the shard waits: with 128 KiB, for a quarter of the time."""
PIECE_BYTES_MIN = PIECE_BYTES // 4
"""A paragraph that would end a piece earlier than this is cut at whitespace instead."""
READ_BYTES = 256 * 1024
SPOOL_BYTES_MAX = 16 * 1024 * 1024
XZ_MAGIC = b"\xfd7zXZ\x00"
GZIP_MAGIC = b"\x1f\x8b"

assert PIECE_BYTES_MIN > 4, "a cut never falls inside the first character"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One request's text: `index` counts from 0, `data` is valid UTF-8."""

    index: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document that was read to its end once and is valid UTF-8."""

    name: str
    source: Path | IO[bytes]
    """A file to open again, or what stdin was copied into."""
    digest: str
    """SHA-256 of the text, unpacked, as hex."""
    text_bytes: int

    @property
    def conversation(self) -> str:
        """Names this document to the server: its pieces follow each other in one context, with no other's."""
        return "doc-" + hashlib.sha256(f"{self.name}\n{self.digest}".encode()).hexdigest()[:24]

    def piece_key(self, index: int) -> str:
        """Names one piece for good: the same content cut in the same way gives the same names."""
        return f"ingest-{self.digest[:32]}-{PIECE_BYTES}-{index}"

    def close(self) -> None:
        """Lets go of what stdin was copied into."""
        if not isinstance(self.source, Path):
            self.source.close()

    def pieces(self) -> Iterator[Piece]:
        """The text, cut; raises `CommandFailed` when it is not what was checked."""
        digest = hashlib.sha256()
        with _opened(self.source) as stream:
            for index, data in enumerate(cut(_blocks(self.name, stream, digest))):
                if index == 0:
                    data = data.removeprefix(codecs.BOM_UTF8)
                if data.strip():
                    yield Piece(index=index, data=data)
        if digest.hexdigest() != self.digest:
            raise CommandFailed(f"{self.name}: it changed while it was being sent; send it again")


def check_document(argument: str) -> Document:
    """The document behind one argument (`-` is stdin); `CommandFailed` says why it cannot be sent."""
    shown = "stdin" if argument == "-" else argument
    source = _source(argument)
    try:
        digest, text_bytes = _checked(shown, source)
    except BaseException:
        if not isinstance(source, Path):
            source.close()
        raise
    return Document(name=Path(shown).name, source=source, digest=digest, text_bytes=text_bytes)


def _checked(shown: str, source: Path | IO[bytes]) -> tuple[str, int]:
    """Digest and length of the text; `CommandFailed` names the first byte that is no UTF-8."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    text_bytes = 0
    with _opened(source) as stream:
        for block in _blocks(shown, stream, digest):
            _decode(shown, decoder, block, text_bytes)
            text_bytes += len(block)
    _decode(shown, decoder, b"", text_bytes, final=True)
    return digest.hexdigest(), text_bytes


def cut(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks of any size as pieces of at most `PIECE_BYTES`: cut after a paragraph, else after whitespace."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) > PIECE_BYTES:
            end = cut_point(held)
            yield bytes(held[:end])
            del held[:end]
    if held:
        yield bytes(held)


def cut_point(text: bytes | bytearray) -> int:
    """Where the first piece of `text`, which is longer than `PIECE_BYTES`, ends."""
    window = text[:PIECE_BYTES]
    for ends in ((b"\n\n", b"\n\r\n"), (b"\n",), (b" ", b"\t")):
        found = max(at + len(end) if (at := window.rfind(end)) >= 0 else 0 for end in ends)
        if found >= PIECE_BYTES_MIN:
            return found
    end = PIECE_BYTES
    while text[end] & 0xC0 == 0x80:  # not inside a character
        end -= 1
    return end


def _decode(
    name: str, decoder: codecs.IncrementalDecoder, block: bytes, before: int, final: bool = False
) -> None:
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        offset = before - pending + error.start
        raise CommandFailed(
            f"{name}: not valid UTF-8 at byte {offset} ({error.reason}); nothing was sent"
        ) from error


def _source(argument: str) -> Path | IO[bytes]:
    """What can be read twice: a file, or a copy of what comes through stdin or a pipe."""
    path = Path(argument)
    if argument == "-":
        return _copied(sys.stdin.buffer)
    if path.is_dir():
        raise CommandFailed(f"{argument}: is a directory; give its files")
    if path.exists() and not path.is_file():
        with path.open("rb") as pipe:
            return _copied(pipe)
    return path


def _copied(stream: IO[bytes]) -> IO[bytes]:
    spool = cast(IO[bytes], tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES_MAX))  # noqa: SIM115 - outlives us
    shutil.copyfileobj(stream, spool)
    return spool


def _opened(source: Path | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """The source at its beginning; what stdin was copied into stays open for the next time."""
    if not isinstance(source, Path):
        source.seek(0)
        return nullcontext(source)
    return source.open("rb")


def _blocks(name: str, stream: IO[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """The text of `stream`, unpacked if it is packed; `digest` hears all of it."""
    magic = stream.read(len(XZ_MAGIC))
    stream.seek(0)
    if magic == XZ_MAGIC:
        stream = cast(IO[bytes], lzma.LZMAFile(stream))  # noqa: SIM115 - its stream is closed by our caller
    elif magic.startswith(GZIP_MAGIC):
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    try:
        while block := stream.read(READ_BYTES):
            digest.update(block)
            yield block
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CommandFailed(f"{name}: the packed file is damaged or cut short: {error}") from error
