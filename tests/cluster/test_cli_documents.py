"""Documents: checked to the last byte before anything is sent, cut the same way every time."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands import documents
from cluster.commands.documents import PIECE_BYTES, PIECE_BYTES_MIN, check_document, cut
from cluster.commands.terminal import CommandFailed

PARAGRAPH = "Das Gedächtnis behält, was überrascht. " * 20 + "\n\n"
BOOK = PARAGRAPH * 700


def whole(path: Path) -> str:
    document = check_document(str(path))
    try:
        return b"".join(piece.data for piece in document.pieces()).decode()
    finally:
        document.close()


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return path


def test_pieces_are_paragraphs_and_make_the_whole(book: Path) -> None:
    pieces = list(check_document(str(book)).pieces())
    assert b"".join(piece.data for piece in pieces).decode() == BOOK
    assert len(pieces) == -(-len(BOOK.encode()) // PIECE_BYTES)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    for piece in pieces:
        assert len(piece.data) <= PIECE_BYTES
        assert piece.data.endswith(b"\n\n")


@given(
    st.lists(st.sampled_from(["é", "€", "𝄞", "a", " ", "\n", "\n\n", "\r\n\r\n"]), max_size=60),
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
)
def test_every_cut_is_lossless_and_inside_no_character(parts: list[str], sizes: list[int]) -> None:
    """At a piece size of 16 bytes, with blocks that break anywhere."""
    text = "".join(parts).encode()
    blocks, at = [], 0
    while at < len(text):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(text[at : at + size])
        at += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 16)
        patch.setattr(documents, "PIECE_BYTES_MIN", 5)
        pieces = list(cut(iter(blocks)))
    assert b"".join(pieces) == text
    for piece in pieces:
        piece.decode("utf-8")
        assert 0 < len(piece) <= 16


def test_text_without_any_whitespace_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "one-word.txt"
    path.write_text("𝄞" * PIECE_BYTES, encoding="utf-8")
    pieces = list(check_document(str(path)).pieces())
    assert len(pieces) == 4
    assert all(set(piece.data.decode()) == {"𝄞"} for piece in pieces)


def test_an_early_paragraph_is_no_place_to_cut(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x\n\n" + "word " * PIECE_BYTES, encoding="utf-8")
    first = next(check_document(str(path)).pieces())
    assert len(first.data) > PIECE_BYTES_MIN
    assert first.data.endswith(b" ")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bytes], ids=["gz", "xz", "plain"])
def test_packed_files_are_known_by_content(tmp_path: Path, pack: object) -> None:
    path = tmp_path / "book"
    path.write_bytes(pack(BOOK.encode()))  # type: ignore[operator]
    plain = tmp_path / "other" / "book"
    plain.parent.mkdir()
    plain.write_text(BOOK, encoding="utf-8")
    assert whole(path) == BOOK
    assert check_document(str(path)).digest == check_document(str(plain)).digest


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
@pytest.mark.parametrize("damage", [lambda d: d[:-20], lambda d: d[:60] + b"\0" * 50 + d[110:]])
def test_a_damaged_packed_file_is_one_clear_error(tmp_path: Path, pack: object, damage: object) -> None:
    path = tmp_path / "book.packed"
    data = pack(os.urandom(300).hex().encode() * 50)  # type: ignore[operator]
    path.write_bytes(damage(data))  # type: ignore[operator]
    with pytest.raises(CommandFailed, match=r"book\.packed.*damaged"):
        check_document(str(path))


@pytest.mark.parametrize("offset", [0, 1, 777, documents.READ_BYTES - 1, documents.READ_BYTES + 1])
def test_invalid_utf8_names_file_and_byte(tmp_path: Path, offset: int) -> None:
    data = bytearray(b"a" * (documents.READ_BYTES + 500))
    data[offset] = 0xFF
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(
        CommandFailed, match=rf"bad\.txt: not valid UTF-8 at byte {offset} .*nothing was sent"
    ):
        check_document(str(path))


def test_a_character_cut_at_a_block_or_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "edge.txt"
    path.write_bytes(b"a" * (documents.READ_BYTES - 1) + "é".encode() + b"b")
    assert whole(path).endswith("aéb")
    path.write_bytes(b"ab\xe2\x82")
    with pytest.raises(CommandFailed, match="at byte 2 "):
        check_document(str(path))
    path.write_bytes(b"a" * (documents.READ_BYTES - 1) + b"\xe2(")
    with pytest.raises(CommandFailed, match=f"at byte {documents.READ_BYTES - 1} "):
        check_document(str(path))


def test_a_byte_order_mark_and_blank_text_are_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert whole(path) == "hello"
    path.write_bytes(b"\xef\xbb\xbf \n\n ")
    assert whole(path) == ""


def test_names_of_pieces_depend_on_content_and_place_alone(book: Path, tmp_path: Path) -> None:
    first, again = check_document(str(book)), check_document(str(book))
    assert first.piece_key(0) == again.piece_key(0) != first.piece_key(1)
    assert first.conversation == again.conversation
    other = tmp_path / "other.txt"
    other.write_text(BOOK + "x", encoding="utf-8")
    assert check_document(str(other)).piece_key(0) != first.piece_key(0)
    assert check_document(str(other)).conversation != first.conversation
    assert first.piece_key(10**6).isascii()
    assert len(first.piece_key(10**6)) < 64


def test_a_file_that_changes_while_it_is_sent_is_noticed(book: Path) -> None:
    document = check_document(str(book))
    book.write_text(BOOK + "more", encoding="utf-8")
    with pytest.raises(CommandFailed, match="changed while"):
        list(document.pieces())


def test_stdin_and_pipes_are_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lzma.compress(BOOK.encode()))))
    document = check_document("-")
    assert document.name == "stdin"
    assert b"".join(piece.data for piece in document.pieces()).decode() == BOOK
    document.close()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(BOOK, encoding="utf-8"))
    writer.start()
    assert whole(pipe) == BOOK
    writer.join()


def test_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="directory"):
        check_document(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        check_document(str(tmp_path / "nowhere.txt"))
