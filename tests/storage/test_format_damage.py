"""Bad files: each is refused by the class of the rule that it breaks, and by nothing else."""

from __future__ import annotations

import io
import json
import random
import re
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import archive
from storage.archive import Member
from storage.errors import (
    BadMemoryFile,
    ChecksumMismatch,
    CorruptIndex,
    NonFinite,
    NotATitanmem,
    ShapeMismatch,
    TooLarge,
    Truncated,
    UnsupportedVersion,
)
from storage.npy import to_npy
from storage.titanmem import decode, encode, read_header
from tests.storage.samples import make_memory, same

FLIPS = 4000
SMALL = make_memory(nonzero=12, tail=np.arange(3, dtype=np.int32))
DATA = encode(SMALL)
ORDER = ("nonzero_idx", "theta_val", "momentum", "tail", "seen")


def parts_of(data: bytes) -> tuple[dict[str, object], dict[str, bytes]]:
    """Header and members of a file."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        members = {name.removesuffix(".npy"): opened.read(name) for name in opened.namelist()}
    return json.loads(members.pop("header")), members


def forge(
    change_header: Callable[[dict], object] | None = None,
    change_members: Callable[[dict[str, bytes]], object] | None = None,
    suffix: str = ".npy",
) -> bytes:
    """A file made with intent: changed, with all its checksums right again."""
    header, members = parts_of(DATA)
    if change_members:
        change_members(members)
    crc = 0
    for member in members.values():
        crc = zlib.crc32(member, crc)
    header["checksum"] = f"crc32:{crc:08x}"
    if change_header:
        change_header(header)
    header.pop("header_checksum", None)
    body = json.dumps(header, separators=(",", ":")).encode()[:-1]
    raw = body + b',"header_checksum":"crc32:%08x"}' % zlib.crc32(body)
    packed = [Member(name + suffix, member) for name, member in members.items()]
    return archive.pack([Member("header", raw, stored=True), *packed])


def refuses(data: bytes, error: type[BadMemoryFile], *words: str) -> BadMemoryFile:
    with pytest.raises(BadMemoryFile) as caught:
        decode(data, name="alice.titanmem")
    assert type(caught.value) is error, caught.value
    assert str(caught.value).startswith("alice.titanmem: ")
    assert re.search(r": expected .*, found .*\. [A-Z]", str(caught.value), re.DOTALL)
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_forging_nothing_changes_nothing() -> None:
    assert same(decode(forge()), SMALL)


def test_a_file_cut_anywhere_is_refused() -> None:
    for length in range(len(DATA)):
        refuses(DATA[:length], Truncated)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 100, DATA])
def test_a_file_with_more_behind_it_is_refused(extra: bytes) -> None:
    with pytest.raises(BadMemoryFile):
        decode(DATA + extra)


@pytest.mark.parametrize("extra", [b"\0", b"#!/bin/sh\n", DATA])
def test_a_file_with_more_before_it_is_refused(extra: bytes) -> None:
    with pytest.raises(BadMemoryFile):
        decode(extra + DATA)


def changes_nothing_or_is_refused(data: bytes) -> bool:
    """True when refused. Any exception but `BadMemoryFile` fails the test by itself."""
    try:
        memory = decode(data)
    except BadMemoryFile:
        return True
    assert same(memory, SMALL)
    return False


def test_every_single_flipped_bit() -> None:
    refused = sum(
        changes_nothing_or_is_refused(DATA[:at] + bytes([DATA[at] ^ (1 << bit)]) + DATA[at + 1 :])
        for at in range(len(DATA))
        for bit in range(8)
    )
    # What is left are the padding bits behind the end of each deflate stream: at most 7 a member.
    assert refused >= 8 * len(DATA) - 7 * len(parts_of(DATA)[1])


def test_thousands_of_random_wounds() -> None:
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    for _ in range(FLIPS):
        wounded = bytearray(DATA)
        for _ in range(dice.randrange(1, 6)):
            at = dice.randrange(len(wounded))
            kind = dice.randrange(4)
            if kind == 0:
                wounded[at] ^= 1 << dice.randrange(8)
            elif kind == 1:
                wounded[at] = dice.randrange(256)
            elif kind == 2:
                del wounded[at : at + dice.randrange(1, 40)]
            else:
                wounded[at:at] = dice.randbytes(dice.randrange(1, 40))
        if bytes(wounded) != DATA:
            try:
                changes_nothing_or_is_refused(bytes(wounded))
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_any_bytes_at_all(data: bytes) -> None:
    for junk in (data, DATA[:4] + data, DATA[:-22] + data, data + DATA[-22:]):
        with pytest.raises(BadMemoryFile):
            decode(junk)
        with pytest.raises(BadMemoryFile):
            read_header(junk)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.lists(st.integers(-1, 2**40), max_size=3), max_size=3),
    st.dictionaries(st.text(), st.integers()),
)
FIELDS = st.sampled_from(sorted(parts_of(DATA)[0]))


@given(st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
@settings(max_examples=200)
def test_any_header_at_all(fields: dict[str, object]) -> None:
    try:
        memory = decode(forge(lambda header: header.update(fields)))
    except BadMemoryFile:
        return
    assert memory.key.tenant


def test_flipped_content_names_the_member() -> None:
    at = DATA.index(b"replay_tokens.npy") + len(b"replay_tokens.npy") + 20
    wounded = DATA[:at] + bytes([DATA[at] ^ 16]) + DATA[at + 1 :]
    refuses(wounded, ChecksumMismatch, "replay_tokens", "previous version")


@pytest.mark.parametrize(
    "data",
    [b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"%PDF-1.7", b"hello, world", b"\x93NUMPY" + b"\0" * 80],
    ids=["png", "pdf", "text", "npy"],
)
def test_foreign_files(data: bytes) -> None:
    refuses(data, NotATitanmem, "ZIP archive", "titanmem users export")


def test_foreign_archives() -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as opened:
            opened.writestr("word/document.xml", "<x/>" * 100)
        refuses(buffer.getvalue(), NotATitanmem)
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    refuses(buffer.getvalue(), NotATitanmem)
    refuses(archive.pack([]) or b"", NotATitanmem)


def test_an_empty_file() -> None:
    refuses(b"", Truncated, "0 bytes")


@pytest.mark.parametrize("version", [2, 3, 999, 0, -1])
def test_future_versions(version: int) -> None:
    error = refuses(forge(lambda h: h.update(version=version)), UnsupportedVersion, "version", str(version))
    assert "newer" in str(error)


def test_a_future_version_may_look_quite_different() -> None:
    header = json.dumps({"version": 2, "who": "knows"}).encode()
    refuses(archive.pack([Member("header", header), Member("blob.zst", b"...")]), UnsupportedVersion)


@pytest.mark.parametrize(("field", "value"), [("idx_coding", "elias-fano"), ("dtype", "float8")])
def test_unknown_codings(field: str, value: str) -> None:
    refuses(forge(lambda header: header.update({field: value})), UnsupportedVersion, field, value)


def test_header_fields_are_covered_too() -> None:
    """A header changed with the archive's own CRC32 put right: only its own checksum can tell."""
    header, members = parts_of(DATA)
    raw = (
        json.dumps(header, separators=(",", ":")).replace('"memory_version":3', '"memory_version":4').encode()
    )
    packed = [Member(f"{name}.npy", member) for name, member in members.items()]
    refuses(archive.pack([Member("header", raw, stored=True), *packed]), ChecksumMismatch, "header_checksum")


def test_a_header_field_twice() -> None:
    refuses(archive.pack([Member("header", b'{"version":1,"version":2}')]), NotATitanmem, "twice")


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"{", b"\xff", b"[" * 60_000, b'{"version":"1"}', b'{"version":true}', b"NaN"],
)
def test_headers_that_are_none(raw: bytes) -> None:
    refuses(archive.pack([Member("header", raw)]), NotATitanmem)


def test_a_header_that_is_too_large() -> None:
    refuses(archive.pack([Member("header", b" " * 70_000)]), TooLarge, "header", "65536")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("theta_shape", [], ShapeMismatch),
        ("theta_shape", [[0]], ShapeMismatch),
        ("theta_shape", [[-1, -1]], ShapeMismatch),
        ("theta_shape", [[16.0, 32]], ShapeMismatch),
        ("theta_shape", [[1, 1, 1, 1, 1]], ShapeMismatch),
        ("theta_shape", [[1]] * 65, ShapeMismatch),
        ("theta_shape", [[2**40, 2**40]], TooLarge),
        ("theta_shape", [[2]], ShapeMismatch),
        ("written_layers", [1, 1], ShapeMismatch),
        ("written_layers", "all", ShapeMismatch),
        ("tenant", "../../etc", NotATitanmem),
        ("user", "a/b", NotATitanmem),
        ("user", None, NotATitanmem),
        ("last_chunk_id", -1, NotATitanmem),
        ("last_chunk_id", 2**60, NotATitanmem),
        ("epoch", True, NotATitanmem),
        ("created_at", "yesterday", NotATitanmem),
        ("created_at", "2026-01-01T00:00:00", NotATitanmem),
        ("stats", {"a": "b"}, NotATitanmem),
        ("stats", {"a": True}, NotATitanmem),
        ("stats", [], NotATitanmem),
        ("nonzero", 11, ShapeMismatch),
        ("nonzero", 2**26, ShapeMismatch),
    ],
)
def test_headers_with_wrong_fields(field: str, value: object, error: type[BadMemoryFile]) -> None:
    refuses(
        forge(lambda header: header.update({field: value})), error, field if error is NotATitanmem else ""
    )


@pytest.mark.parametrize("name", ["nonzero_idx", "theta_val", "momentum", "replay_gates"])
def test_a_missing_member(name: str) -> None:
    refuses(forge(change_members=lambda members: members.pop(name)), NotATitanmem, "members")


def test_members_that_do_not_belong() -> None:
    refuses(forge(change_members=lambda m: m.update(extra=to_npy(np.zeros(1)))), NotATitanmem, "extra")
    refuses(forge(change_members=lambda m: m.update(momentum=m.pop("momentum"))), NotATitanmem, "in order")
    refuses(forge(suffix=""), NotATitanmem, ".npy")


def test_a_member_twice() -> None:
    header, members = parts_of(DATA)
    packed = [Member(f"{name}.npy", member) for name, member in members.items()]
    raw = json.dumps(header).encode()
    refuses(archive.pack([Member("header", raw), *packed, packed[0]]), NotATitanmem, "nonzero_idx.npy twice")


def test_too_many_members() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for number in range(1000):
            opened.writestr(f"member{number}", b"")
    refuses(buffer.getvalue(), NotATitanmem, "few members", "1000")


def test_pickled_arrays_are_never_read() -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("the pickle was run",)

    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    # It fits neither the size that 12 values have nor, made to fit, the dtype.
    for array in (buffer.getvalue(), buffer.getvalue()[:128].ljust(152, b"\0")):
        with pytest.raises((NotATitanmem, ShapeMismatch)) as caught:
            decode(forge(change_members=lambda members, array=array: members.update(theta_val=array)))
    assert isinstance(caught.value, NotATitanmem)
    assert "pickled arrays are never read" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "error"),
    [
        ("theta_val", np.ones(12, np.float32), NotATitanmem),
        ("theta_val", np.ones((3, 4), np.float16), ShapeMismatch),
        ("theta_val", np.ones(11, np.float16), ShapeMismatch),
        ("theta_val", np.full(12, np.nan, np.float16), NonFinite),
        ("theta_val", np.full(12, -np.inf, np.float16), NonFinite),
        ("momentum", np.ones(7, np.float16), ShapeMismatch),
        ("momentum", np.array([np.inf, 0], np.float16), NonFinite),
        ("replay_values", np.full((3, 4), np.nan, np.float16), NonFinite),
        ("replay_columns", np.full((3, 4), 640, np.int32), CorruptIndex),
        ("replay_columns", np.full((3, 4), -1, np.int32), CorruptIndex),
        ("replay_columns", np.zeros((2, 4), np.int32), ShapeMismatch),
        ("replay_tokens", np.full(3, -1, np.int32), CorruptIndex),
        ("tail", np.full(3, -5, np.int32), CorruptIndex),
        ("tail", np.zeros(3, np.int64), NotATitanmem),
        ("seen", np.zeros(1025, np.uint64), ShapeMismatch),
        ("nonzero_idx", np.zeros(12, np.uint8), CorruptIndex),
        ("nonzero_idx", np.array([1] * 5 + [0] + [1] * 6, np.uint8), CorruptIndex),
        ("nonzero_idx", np.ones(11, np.uint8), CorruptIndex),
        ("nonzero_idx", np.array([1] * 11 + [129], np.uint8), CorruptIndex),
        ("nonzero_idx", np.array([127] * 12, np.uint8), CorruptIndex),
        ("nonzero_idx", np.array([1] * 11 + [255, 255, 255, 255, 1], np.uint8), CorruptIndex),
        ("nonzero_idx", np.arange(12), NotATitanmem),
    ],
)
def test_members_that_break_a_rule(name: str, array: np.ndarray, error: type[BadMemoryFile]) -> None:
    forged = forge(change_members=lambda members: members.update({name: to_npy(array)}))
    with pytest.raises(BadMemoryFile) as caught:
        decode(forged)
    # Sizes are compared before dtypes are looked at: an array of the wrong dtype may fail by its size.
    assert isinstance(caught.value, (error, ShapeMismatch) if error is NotATitanmem else error)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f2', 'fortran_order': True, 'shape': (12,), }",
        b"{'descr': '>f2', 'fortran_order': False, 'shape': (12,), }",
        b"{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (12,), }",
        b"{'descr': '<f2', 'fortran_order': False, 'shape': (99999999999999999999,), }",
        b"__import__('os').system('true')",
    ],
)
def test_npy_headers_that_are_not_plain(header: bytes) -> None:
    padded = header.ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"\0" * 24
    with pytest.raises((NotATitanmem, ShapeMismatch)):
        decode(forge(change_members=lambda members: members.update(theta_val=array)))


def peak_bytes(data: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(BadMemoryFile):
            decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = to_npy(np.zeros(20_000_000, np.float16))
    forged = forge(change_members=lambda members: members.update(theta_val=bomb))
    assert len(forged) < 1_000_000
    assert peak_bytes(forged) < 2_000_000
    refuses(forged, ShapeMismatch, "theta_val fits theta_shape")


def test_a_bomb_that_lies_about_its_size() -> None:
    """Declared small, unpacks to much: no more than the declared size is ever made."""
    forged = bytearray(forge(change_members=lambda m: m.update(seen=to_npy(np.zeros(1000, np.uint64)))))
    size = (8128).to_bytes(4, "little")
    assert forged.count(size) == 2
    forged = forged.replace(size, (168).to_bytes(4, "little"))
    assert peak_bytes(bytes(forged)) < 2_000_000
    refuses(bytes(forged), TooLarge, "declared size")


def test_members_that_together_are_too_much() -> None:
    def blow_up(members: dict[str, bytes]) -> None:
        members.update(momentum=to_npy(np.zeros(30_000_000, np.float16)))

    def shape(header: dict) -> None:
        header.update(theta_shape=[[30_000_000]])

    with pytest.raises(TooLarge, match="members unpack to a bounded size"):
        decode(forge(shape, blow_up), bytes_max=50_000_000)


def test_encrypted_members() -> None:
    forged = bytearray(DATA)
    at = forged.index(b"PK\x01\x02")
    forged[at + 8] |= 1
    refuses(bytes(forged), NotATitanmem, "encrypted")


def test_an_archive_packed_anew_is_refused() -> None:
    """Other tools' archives may differ between directory and local headers: none of that is let in."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(DATA)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    refuses(buffer.getvalue(), ChecksumMismatch, "bound together")
