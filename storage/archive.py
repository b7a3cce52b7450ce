"""The ZIP archive of a `.titanmem` file, in one canonical form.

Any ZIP reader opens it. Our own reader accepts no other bytes around the members than those that our writer
makes: it rebuilds all of the archive's bookkeeping from the directory and compares. So every byte of a file
is either bookkeeping, which must match, or a member, which carries a CRC32; and none of the liberties of ZIP
(comments, gaps, overlapping members, prefixes, two directories that disagree) is open to a bad file.

Layout: local headers and members in order, one central directory, one end record; no ZIP64, no extra fields,
no comments, no encryption; all dates 1980-01-01; methods 0 (stored) and 8 (deflate).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from storage.errors import ChecksumMismatch, NotATitanmem, TooLarge, Truncated

MEMBERS_MAX = 16
MEMBER_NAME_CHARS_MAX = 40

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_ZIP_2_0 = 20
_DATE_1980 = 0x0021
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True, slots=True)
class Member:
    """One member to write: `fast` keeps to Huffman coding, far faster than matching, for float arrays."""

    name: str
    data: bytes
    fast: bool = False
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of an archive's directory; `start` is where the member's packed bytes begin."""

    name: str
    method: int
    crc: int
    packed_bytes: int
    bytes: int
    offset: int

    @property
    def start(self) -> int:
        return self.offset + _LOCAL.size + len(self.name)


def _deflate(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def _pack_member(member: Member) -> tuple[int, bytes]:
    """Method and packed bytes: the smallest of stored and deflated, the first on a tie."""
    best = (_STORED, member.data)
    if member.stored:
        return best
    strategies = [zlib.Z_HUFFMAN_ONLY] if member.fast else [zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY]
    for strategy in strategies:
        packed = _deflate(member.data, strategy)
        if len(packed) < len(best[1]):
            best = (_DEFLATED, packed)
    return best


def _local_header(entry: Entry) -> bytes:
    name = entry.name.encode("ascii")
    sizes = (entry.crc, entry.packed_bytes, entry.bytes)
    return _LOCAL.pack(_LOCAL_MAGIC, _ZIP_2_0, 0, entry.method, 0, _DATE_1980, *sizes, len(name), 0) + name


def _directory(entries: Iterable[Entry], offset: int) -> bytes:
    """The central directory and the end record of an archive whose members end at `offset`."""
    lines = []
    for entry in entries:
        name = entry.name.encode("ascii")
        sizes = (entry.crc, entry.packed_bytes, entry.bytes)
        what = (_CENTRAL_MAGIC, _ZIP_2_0, _ZIP_2_0, 0, entry.method, 0, _DATE_1980)
        lines.append(_CENTRAL.pack(*what, *sizes, len(name), 0, 0, 0, 0, 0, entry.offset) + name)
    body = b"".join(lines)
    return body + _END.pack(_END_MAGIC, 0, 0, len(lines), len(lines), len(body), offset, 0)


def pack(members: Iterable[Member]) -> bytes:
    """The archive of these members; the same members give the same bytes."""
    parts: list[bytes] = []
    entries: list[Entry] = []
    offset = 0
    for member in members:
        method, packed = _pack_member(member)
        entry = Entry(member.name, method, zlib.crc32(member.data), len(packed), len(member.data), offset)
        header = _local_header(entry)
        entries.append(entry)
        parts += [header, packed]
        offset += len(header) + len(packed)
    assert len(entries) <= MEMBERS_MAX, "the reader must accept what the writer writes"
    return b"".join([*parts, _directory(entries, offset)])


def repack(data: bytes, entries: list[Entry], first: Member) -> bytes:
    """The archive `data`, of directory `entries`, with another first member, stored; the others are not unpacked."""
    parts: list[bytes] = []
    moved: list[Entry] = []
    offset = 0
    for number, entry in enumerate(entries):
        if number:
            packed = data[entry.start : entry.start + entry.packed_bytes]
            entry = replace(entry, offset=offset)
        else:
            packed, size = first.data, len(first.data)
            entry = Entry(first.name, _STORED, zlib.crc32(packed), size, size, offset)
        header = _local_header(entry)
        moved.append(entry)
        parts += [header, packed]
        offset += len(header) + len(packed)
    return b"".join([*parts, _directory(moved, offset)])


def _end_record(data: bytes, file: str) -> tuple[int, int]:
    """Number of members and offset of the directory; refuses what is no archive or has lost its end."""
    head = data[:4]
    if head != _LOCAL_MAGIC:
        if _LOCAL_MAGIC.startswith(head):
            raise Truncated(
                file, "a file begins with a ZIP archive", "4 bytes PK\\3\\4", f"{len(data)} bytes"
            )
        raise NotATitanmem(file, "a file begins with a ZIP archive", "the bytes PK\\3\\4", head)
    if data[-_END.size :][:4] != _END_MAGIC:
        found = data.rfind(_END_MAGIC)
        if not 0 <= found <= len(data) - _END.size:
            raise Truncated(file, "a file ends with the ZIP end record", "PK\\5\\6 and 18 bytes", data[-4:])
        raise NotATitanmem(file, "nothing follows the ZIP end record", "its 22 bytes last", "more bytes")
    _, disk, disk_cd, count_here, count, size, offset, comment = _END.unpack_from(data, len(data) - _END.size)
    if count > MEMBERS_MAX or comment:
        raise NotATitanmem(file, "a file has few members", f"at most {MEMBERS_MAX}, no comment", count)
    if (disk, disk_cd) != (0, 0) or count_here != count or offset + size + _END.size != len(data):
        raise ChecksumMismatch(
            file, "the ZIP end record describes the file", len(data), offset + size + _END.size
        )
    return count, offset


def read_directory(data: bytes, file: str) -> list[Entry]:
    """The directory as the file has it, in next to no memory; `check_bookkeeping` still has to confirm it."""
    count, offset = _end_record(data, file)
    end_of_members, position = offset, offset
    entries: list[Entry] = []
    rule = "the ZIP directory lists the members"
    for number in range(count):
        if position + _CENTRAL.size > len(data) - _END.size:
            raise ChecksumMismatch(file, rule, f"{count} members", f"{number} members")
        fields = _CENTRAL.unpack_from(data, position)
        magic, flags, method, crc, packed, size, name_chars, extra, comment, at = (
            fields[0], fields[3], fields[4], *fields[7:13], fields[16],
        )  # fmt: skip
        if magic != _CENTRAL_MAGIC:
            raise ChecksumMismatch(file, rule, _CENTRAL_MAGIC, magic)
        position += _CENTRAL.size
        raw_name = data[position : position + name_chars]
        position += name_chars
        if flags & 1:
            raise NotATitanmem(file, "members are not encrypted", "no encryption", f"flags {flags:#x}")
        if method not in (_STORED, _DEFLATED) or extra or comment or not raw_name.isascii():
            raise NotATitanmem(file, "members are stored or deflated, plainly named", "method 0 or 8", method)
        if not 0 < name_chars <= MEMBER_NAME_CHARS_MAX:
            raise NotATitanmem(file, "members have short names", f"1 to {MEMBER_NAME_CHARS_MAX}", name_chars)
        entry = Entry(raw_name.decode("ascii"), method, crc, packed, size, at)
        if entry.start + packed > end_of_members:
            raise ChecksumMismatch(
                file, "members lie before the directory", end_of_members, entry.start + packed
            )
        if any(entry.name == other.name for other in entries):
            raise NotATitanmem(file, "each member is there once", "different names", f"{entry.name} twice")
        entries.append(entry)
    return entries


def check_bookkeeping(data: bytes, entries: list[Entry], file: str) -> None:
    """Refuses any archive whose bytes between the members are not exactly those of `pack`."""
    rule = "the archive is bound together as titanmem does it"
    position = 0
    for entry in entries:
        header = _local_header(entry)
        if entry.offset != position or data[position : position + len(header)] != header:
            raise ChecksumMismatch(file, rule, "its own ZIP records", f"others before {entry.name}")
        position += len(header) + entry.packed_bytes
    if data[position:] != _directory(entries, position):
        raise ChecksumMismatch(file, rule, "its own ZIP directory", "another one")


def extract(data: bytes, entry: Entry, bytes_max: int, file: str) -> bytes:
    """One member, unpacked: never more than its declared size, which may be `bytes_max` at most."""
    if entry.bytes > bytes_max:
        raise TooLarge(file, f"{entry.name} is not too large", f"at most {bytes_max} bytes", entry.bytes)
    packed = memoryview(data)[entry.start : entry.start + entry.packed_bytes]
    if entry.method == _STORED:
        plain = bytes(packed)
    else:
        coder = zlib.decompressobj(-15)
        try:
            plain = coder.decompress(packed, entry.bytes + 1)
        except zlib.error as error:
            raise ChecksumMismatch(file, f"{entry.name} unpacks", "a deflate stream", str(error)) from None
        if len(plain) > entry.bytes:
            raise TooLarge(file, f"{entry.name} has its declared size", f"{entry.bytes} bytes", "more")
        if not coder.eof or coder.unused_data:
            raise ChecksumMismatch(file, f"{entry.name} unpacks", "one whole stream", "a broken one")
    if len(plain) != entry.bytes:
        raise ChecksumMismatch(file, f"{entry.name} has its declared size", entry.bytes, len(plain))
    crc = zlib.crc32(plain)
    if crc != entry.crc:
        raise ChecksumMismatch(file, f"CRC32 of {entry.name}", f"{entry.crc:08x}", f"{crc:08x}")
    return plain
