"""Arrays as `.npy` members, and the coding of rising positions.

The writer makes the bytes of the `.npy` header itself, since numpy's padding is not promised to stay; the
reader knows only the plain dtypes of the format, so a pickled array is refused unread.
"""

from __future__ import annotations

import math
import re

import numpy as np

from storage.errors import CorruptIndex, NotATitanmem, ShapeMismatch

IDX_CODING = "delta-leb128"
"""Differences of neighbouring positions (the first one from 0), each as an unsigned LEB128 number."""
IDX_BYTES_MAX = 4
"""Longest LEB128 number: 28 bits, more than the largest θ_M has elements."""
NPY_HEADER_BYTES_MAX = 128

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64
_HEADER = re.compile(
    rb"\{'descr': ?'([<|=>]?[A-Za-z]\w*)', ?'fortran_order': ?(True|False), ?"
    rb"'shape': ?\(([0-9, ]{0,60})\),? ?\} *\n"
)


def to_npy(array: np.ndarray) -> bytes:
    """`array` as the bytes of a `.npy` file, version 1.0."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    text = f"{{'descr': '{plain.dtype.str}', 'fortran_order': False, 'shape': {plain.shape}, }}"
    used = len(_MAGIC) + 2 + len(text) + 1
    text += " " * (-used % _ALIGNMENT) + "\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text.encode("ascii") + plain.tobytes()


def from_npy(data: bytes, dtype: str, dimensions: int, member: str, file: str) -> np.ndarray:
    """The array of a `.npy` member, writable. Raises unless it has this dtype and number of dimensions."""
    rule = f"{member} is a plain .npy array"
    header_bytes = int.from_bytes(data[8:10], "little") + 10
    match = _HEADER.fullmatch(data[10:header_bytes]) if data[:8] == _MAGIC else None
    if header_bytes > NPY_HEADER_BYTES_MAX or match is None:
        raise NotATitanmem(file, rule, "a .npy header of version 1.0", data[:64])
    descr, fortran, dims = match.groups()
    if b"O" in descr:
        raise NotATitanmem(file, "pickled arrays are never read", dtype, descr.decode())
    if descr.decode() != dtype or fortran == b"True":
        raise NotATitanmem(file, rule, f"{dtype} in C order", descr.decode())
    shape = tuple(int(n) for n in re.findall(rb"\d+", dims))
    expected = header_bytes + math.prod(shape) * np.dtype(dtype).itemsize
    if len(shape) != dimensions or expected != len(data):
        raise ShapeMismatch(
            file, f"{member} has the size of its shape", f"{expected} bytes", f"{len(data)} {shape}"
        )
    return np.frombuffer(data, dtype, offset=header_bytes).reshape(shape).copy()


def encode_rising(index: np.ndarray) -> np.ndarray:
    """uint8[*] of rising positions int64[n], by `IDX_CODING`."""
    gaps = np.diff(index, prepend=0)
    if not len(gaps) or int(gaps.max()) < 0x80:
        return gaps.astype(np.uint8)
    lengths = np.ones(len(gaps), np.int64)
    for bits in range(7, 7 * IDX_BYTES_MAX, 7):
        lengths += gaps >= 1 << bits
    ends = np.cumsum(lengths)
    coded = np.empty(int(ends[-1]), np.uint8)
    starts = ends - lengths
    for position in range(IDX_BYTES_MAX):
        live = lengths > position
        group = (gaps[live] >> (7 * position)) & 0x7F
        more = (lengths[live] > position + 1) * np.int64(0x80)
        coded[starts[live] + position] = group | more
    return coded


def decode_rising(coded: np.ndarray, count: int, elements: int, file: str) -> np.ndarray:
    """int64[count] of what `encode_rising` made; `CorruptIndex` unless they rise and stay < `elements`."""
    is_last = coded < 0x80
    continued = np.flatnonzero(~is_last)
    found = len(coded) - len(continued)
    if found != count or (len(coded) and not is_last[-1]):
        raise CorruptIndex(file, "there is one position for each value", count, found)
    gaps = coded[is_last].astype(np.int64)
    if len(continued):
        # Nearly all gaps are one byte: only the others are put together. Each begins with a run of continued bytes.
        first = np.flatnonzero(np.diff(continued, prepend=-2) > 1)
        starts, lengths = continued[first], np.diff(first, append=len(continued)) + 1
        if int(lengths.max()) > IDX_BYTES_MAX:
            found = f"{lengths.max()} bytes"
            raise CorruptIndex(file, "positions are short numbers", f"{IDX_BYTES_MAX} bytes", found)
        whole = np.zeros(len(starts), np.int64)
        for position in range(IDX_BYTES_MAX):
            live = lengths > position
            whole[live] |= (coded[starts[live] + position].astype(np.int64) & 0x7F) << (7 * position)
        gaps[starts - first] = whole
    if count > 1 and int(gaps[1:].min()) < 1:
        at = int(np.flatnonzero(gaps[1:] < 1)[0]) + 1
        raise CorruptIndex(file, "positions rise strictly", "a step of 1 or more", f"0 at number {at}")
    index = np.cumsum(gaps)
    if count and int(index[-1]) >= elements:
        raise CorruptIndex(file, "positions lie inside θ_M", f"less than {elements}", int(index[-1]))
    return index
