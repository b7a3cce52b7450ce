"""Whether the write-ahead log beside a journal is whole, asked before SQLite opens it.

SQLite reads a log up to its first bad frame and drops the rest without a word. For a write that a crash cut off that
is right: it was acknowledged to nobody. For damage further in it would lose what was acknowledged. Groups are flushed
one by one, so a good group behind the bad frame shows that what is bad was on the disk before.

Layout (sqlite.org/fileformat2.html, "The WAL File Format"): a header of 32 bytes, then frames of 24 bytes and a page.
A running checksum goes through header and frames; each frame holds its value there and the two salts of the header.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from storage.errors import JournalCorrupt

HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
FRAMES_READ = 512
_WORD_ORDER = {0x377F0682: "<u4", 0x377F0683: ">u4"}
_log = logging.getLogger(__name__)


class _Frames(NamedTuple):
    """Of each frame: whether it fits the one before it, its two salts, and whether it ends a group."""

    fits: np.ndarray
    salts: np.ndarray
    ends: np.ndarray


def check_wal(path: Path, advice: str) -> None:
    """Raises `JournalCorrupt` when the log of the journal `path` is damaged before its last group.

    A last group that is not whole is logged: a crash leaves one, and nobody can tell whether damage did.
    """
    log = Path(f"{path}-wal")
    if not log.exists() or log.stat().st_size == 0:
        return
    if not path.exists():
        raise JournalCorrupt(
            f"{path}: the journal is gone, and {log.name} is there. {advice}", path=str(path)
        )
    with open(path, "rb") as file:
        page_bytes = int.from_bytes(file.read(18)[16:], "big")
    page_bytes = 65_536 if page_bytes == 1 else page_bytes
    if page_bytes < 512 or page_bytes & (page_bytes - 1):
        return  # the database itself is damaged, and SQLite says so
    header_fits, header, frames = _read(log, page_bytes)
    if not len(frames.fits):
        return
    salts = np.frombuffer(header[16:24], ">u4") if header_fits else frames.salts[0]
    live = (frames.salts == salts).all(axis=1)
    good = frames.fits & live
    bad = int(np.argmin(good)) if not good.all() else len(good)
    if header_fits and (bad == len(good) or not live[bad:].any()):
        return
    ends = np.flatnonzero(frames.ends[bad:])
    group_end = bad + int(ends[0]) if len(ends) else len(good)
    first = group_end + 1 if header_fits else 0  # SQLite flushes the header before the first group
    if (good & frames.ends)[first:].any():
        what = f"frame {bad + 1} of {len(good)}" if header_fits else "the header"
        raise JournalCorrupt(f"{path}: {log.name} is damaged: {what}. {advice}", path=str(path))
    _log.error(
        "%s: the last group in %s is not whole: a crash cut it off, unacknowledged, or the disk has damaged it",
        path,
        log.name,
    )


def _read(log: Path, page_bytes: int) -> tuple[bool, bytes, _Frames]:
    """Whether the log's header is whole, the header, and what is to be known of the frames, a few at a time."""
    frame_bytes = FRAME_HEADER_BYTES + page_bytes
    weights, carried = _weights(2 + page_bytes // 4)
    parts: list[_Frames] = []
    with open(log, "rb") as file:
        header = file.read(HEADER_BYTES)
        order = _word_order(header, page_bytes)
        words = (
            order or np.dtype(np.uint32).str
        )  # without a header: this machine's order, which SQLite writes
        before = np.frombuffer(header[24:].ljust(8, b"\0"), ">u4")[None]
        while block := file.read(FRAMES_READ * frame_bytes):
            count = len(block) // frame_bytes
            if not count:
                break  # a frame that was cut off
            frames = np.frombuffer(block[: count * frame_bytes], np.uint8).reshape(count, frame_bytes)
            fields = np.ascontiguousarray(frames[:, :FRAME_HEADER_BYTES]).view(">u4")
            summed = np.concatenate([frames[:, :8], frames[:, FRAME_HEADER_BYTES:]], axis=1).view(words)
            start = np.concatenate([before, fields[:-1, 4:]]).astype(np.uint32)
            sums = np.stack(
                [_sum(summed, weights[:, n]) + _sum(start, carried[:, n]) for n in (0, 1)], axis=1
            )
            parts.append(_Frames((sums == fields[:, 4:]).all(axis=1), fields[:, 2:4], fields[:, 1] != 0))
            before = fields[-1:, 4:]
    if not parts:
        return (
            order is not None,
            header,
            _Frames(np.zeros(0, bool), np.zeros((0, 2), ">u4"), np.zeros(0, bool)),
        )
    return (
        order is not None,
        header,
        _Frames(*(np.concatenate(column) for column in zip(*parts, strict=True))),
    )


def _word_order(header: bytes, page_bytes: int) -> str | None:
    """dtype of the words that checksums are made of, None for a damaged header."""
    order = _WORD_ORDER.get(int.from_bytes(header[:4], "big"))
    if order is None or len(header) < HEADER_BYTES or int.from_bytes(header[8:12], "big") != page_bytes:
        return None
    words = np.frombuffer(header[:24], order)[None]
    weights, _ = _weights(6)
    sums = [int(_sum(words, weights[:, n])[0]) for n in (0, 1)]
    return order if sums == np.frombuffer(header[24:], ">u4").tolist() else None


def _sum(words: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint32 [rows] of words [rows, n] by weights [n], modulo 2**32."""
    return (words.astype(np.uint32) * weights).sum(axis=1, dtype=np.uint32)


def _weights(words: int) -> tuple[np.ndarray, np.ndarray]:
    """What each of `words` words adds to the two sums, uint32 [words, 2], and each sum carried in, [2, 2].

    The checksum goes over pairs: s0 += x[i] + s1, then s1 += x[i + 1] + s0, modulo 2**32. It is linear, and a pair
    takes sums (a, b) to (a + b, a + 2b): what a word adds at the end follows from what the pair behind it does.
    """
    weights = np.empty((words, 2), np.uint32)
    even, odd = (1, 1), (0, 1)
    for pair in range(words // 2 - 1, -1, -1):
        weights[2 * pair], weights[2 * pair + 1] = even, odd
        even, odd = (((a + b) % 2**32, (a + 2 * b) % 2**32) for a, b in (even, odd))
    return weights, np.array([weights[0], odd], np.uint32)
