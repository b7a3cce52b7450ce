"""The `.titanmem` file: what goes in comes out, bytes are for ever, other readers can read it."""

from __future__ import annotations

import io
import json
import time
import zipfile
import zlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.errors import CorruptIndex, NonFinite, NotATitanmem, ShapeMismatch, TooLarge, WrongBase
from storage.memory import SEEN_MAX, Memory, Replay
from storage.npy import decode_rising, encode_rising
from storage.titanmem import decode, encode, read_header
from tests.storage.samples import ALICE, BASE, NOON, full_memory, make_memory, make_replay, same

GOLDEN = Path(__file__).parent / "golden" / "version-1.titanmem"
ENCODE_MS_MAX = 400
"""Generous: a loaded machine in a test run. Measured alone: `titanmem bench storage`."""


def golden_memory() -> Memory:
    """The memory in the golden file: every member, and numbers that anybody can repeat."""
    index = np.concatenate([np.arange(0, 600, 2), [700, 40_000, 70_000]]).astype(np.int64)
    return Memory(
        key=ALICE,
        memory_version=12,
        epoch=3,
        last_chunk_id=40,
        tokens_seen=10_000,
        base=BASE,
        rule="sparse",
        theta_shape=((256, 256), (64, 128)),
        written_layers=(0, 1),
        created_at=NOON,
        nonzero_idx=index,
        theta_val=(np.arange(1, len(index) + 1) / 1024).astype(np.float16),
        momentum=np.array([0.5, -0.25], np.float16),
        replay=Replay(
            columns=np.arange(24, dtype=np.int32).reshape(3, 8),
            values=(np.arange(24).reshape(3, 8) / 32).astype(np.float16),
            tokens=np.array([5, 6, 7], np.int32),
            gates=np.array([1, 0.5, 0.25], np.float16),
        ),
        tail=np.arange(100, 164, dtype=np.int32),
        seen=np.array([1, 2**63, 2**64 - 1], np.uint64),
        stats={"written": 303.0, "surprise_rate": 0.15},
    )


def unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_golden_bytes_are_read() -> None:
    assert same(decode(GOLDEN.read_bytes(), expect_base=BASE), golden_memory())


def test_golden_bytes_are_written() -> None:
    """A change here is version 2 of the format, and a reader for both."""
    data, golden = encode(golden_memory()), GOLDEN.read_bytes()
    assert unpacked(data) == unpacked(golden)
    # zlib-ng deflates to other bytes that unpack to the same; everywhere else the files are equal.
    if "zlib-ng" not in zlib.ZLIB_RUNTIME_VERSION:
        assert data == golden


def test_the_golden_file_has_all_there_is() -> None:
    with zipfile.ZipFile(GOLDEN) as archive:
        assert {info.compress_type for info in archive.infolist()} == {
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        }
        assert [info.filename for info in archive.infolist()] == [
            "header",
            *(f"{name}.npy" for name in ("nonzero_idx", "theta_val", "momentum")),
            *(f"replay_{name}.npy" for name in ("columns", "values", "tokens", "gates")),
            "tail.npy",
            "seen.npy",
        ]


def test_numpy_opens_it() -> None:
    memory = make_memory(nonzero=300)
    with np.load(io.BytesIO(encode(memory)), allow_pickle=False) as arrays:
        assert json.loads(arrays["header"])["version"] == 1
        np.testing.assert_array_equal(arrays["theta_val"], memory.theta_val)
        np.testing.assert_array_equal(arrays["tail"], memory.tail)
        assert memory.replay is not None
        np.testing.assert_array_equal(arrays["replay_columns"], memory.replay.columns)


def test_the_header_says_what_the_format_promises() -> None:
    data = encode(make_memory())
    header = json.loads(unpacked(data)["header"])
    promised = {
        "version", "theta_shape", "written_layers", "dtype", "last_chunk_id", "checksum", "base", "rule",
        "tenant", "user", "memory_version", "epoch", "created_at", "idx_coding", "header_checksum",
    }  # fmt: skip
    assert promised <= set(header)
    crc = 0
    for name, member in unpacked(data).items():
        crc = crc if name == "header" else zlib.crc32(member, crc)
    assert header["checksum"] == f"crc32:{crc:08x}"
    checked = read_header(data)
    assert (checked.key, checked.memory_version, checked.nonzero) == (ALICE, 3, 40)


KEYS = st.sampled_from([ALICE])
FLOATS = st.floats(-60_000, 60_000, width=16)


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    shapes = draw(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)
    )
    elements = sum(int(np.prod(shape)) for shape in shapes)
    index = np.array(sorted(draw(st.sets(st.integers(0, elements - 1)))), np.int64)
    momenta = draw(st.sampled_from([len(shapes), elements]))
    rows, places = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    return make_memory(
        theta_shape=tuple(shapes),
        nonzero=0,
        version=draw(st.integers(0, 10**12 - 1)),
        epoch=draw(st.integers(0, 10**8 - 1)),
        last_chunk_id=draw(st.integers(0, 2**53 - 1)),
        base=draw(st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable())),
        created_at=draw(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1))).replace(
            tzinfo=timezone(timedelta(hours=draw(st.integers(-11, 11))))
        ),
        nonzero_idx=index,
        theta_val=draw(hnp.arrays(np.float16, len(index), elements=FLOATS)),
        momentum=draw(hnp.arrays(np.float16, momenta, elements=FLOATS)),
        replay=draw(st.sampled_from([None, make_replay(rows, places, elements)])),
        tail=draw(hnp.arrays(np.int32, st.integers(0, 30), elements=st.integers(0, 2**31 - 1))),
        seen=draw(hnp.arrays(np.uint64, st.integers(0, 10), elements=st.integers(0, 2**64 - 1))),
        stats=draw(
            st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=3)
        ),
    )


@given(memories())
@settings(max_examples=60)
def test_what_goes_in_comes_out(memory: Memory) -> None:
    data = encode(memory)
    assert same(decode(data), memory)
    assert encode(decode(data)) == data


@given(st.sets(st.integers(0, 2**26 - 1), max_size=50).map(sorted))
def test_positions_survive_their_coding(positions: list[int]) -> None:
    index = np.array(positions, np.int64)
    coded = encode_rising(index)
    np.testing.assert_array_equal(decode_rising(coded, len(index), 2**26, ""), index)


@pytest.mark.parametrize("first", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 2**26 - 2])
def test_positions_at_the_borders_of_their_coding(first: int) -> None:
    index = np.array([first, first + 1], np.int64)
    np.testing.assert_array_equal(decode_rising(encode_rising(index), 2, 2**26, ""), index)


def test_a_large_memory_is_coded_quickly_and_small() -> None:
    memory = full_memory()
    start = time.perf_counter()
    data = encode(memory)
    middle = time.perf_counter()
    again = decode(data, expect_base=BASE, expect_shape=memory.theta_shape)
    end = time.perf_counter()
    assert same(again, memory)
    assert len(data) < 1_000_000
    assert (middle - start) * 1e3 < ENCODE_MS_MAX
    assert (end - middle) * 1e3 < ENCODE_MS_MAX


def test_arrays_can_be_written_to_after_reading() -> None:
    memory = decode(encode(make_memory()))
    memory.theta_val[0] = 1
    memory.tail[0] = 1
    assert memory.replay is not None
    memory.replay.tokens[0] = 1


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"nonzero_idx": np.array([3, 3], np.int64), "theta_val": np.ones(2, np.float16)}, CorruptIndex),
        ({"nonzero_idx": np.array([4, 3], np.int64), "theta_val": np.ones(2, np.float16)}, CorruptIndex),
        ({"nonzero_idx": np.array([-1, 3], np.int64), "theta_val": np.ones(2, np.float16)}, CorruptIndex),
        ({"nonzero_idx": np.array([640], np.int64), "theta_val": np.ones(1, np.float16)}, CorruptIndex),
        ({"nonzero_idx": np.array([1], np.int64)}, ShapeMismatch),
        ({"momentum": np.zeros(3, np.float16)}, ShapeMismatch),
        ({"momentum": np.array([np.nan, 0], np.float16)}, NonFinite),
        ({"theta_val": np.full(40, np.inf, np.float16)}, NonFinite),
        ({"tail": np.array([-1], np.int32)}, CorruptIndex),
        ({"replay": replace(make_replay(1, 2, 9), columns=np.array([[640, 0]], np.int32))}, CorruptIndex),
        ({"replay": replace(make_replay(1, 2, 9), gates=np.array([np.nan], np.float16))}, NonFinite),
        ({"theta_shape": ((0, 4),), "nonzero": 0, "replay": None}, ShapeMismatch),
        ({"memory_version": -1}, NotATitanmem),
        ({"memory_version": 10**12}, NotATitanmem),
        ({"epoch": 10**8}, NotATitanmem),
        ({"base": ""}, NotATitanmem),
        ({"written_layers": (2, 1)}, ShapeMismatch),
        ({"stats": {str(n): 0.0 for n in range(65)}}, NotATitanmem),
        ({"stats": {"norm": float("nan")}}, NonFinite),
    ],
)
def test_nothing_is_written_that_could_not_be_read(
    changes: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        encode(make_memory(**changes))  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    memory = make_memory(memory_version=np.int64(7), epoch=np.uint32(2), stats={"norm": np.float32(0.5)})
    again = decode(encode(memory))
    assert (again.memory_version, again.epoch, again.stats) == (7, 2, {"norm": 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta_val": np.zeros(40, np.float32)}, "theta_val: float32"),
        ({"nonzero_idx": [1, 2]}, "nonzero_idx: list"),
        ({"tail": np.zeros((2, 2), np.int32)}, "tail: int32"),
        ({"seen": np.zeros(SEEN_MAX + 1, np.uint64)}, "seen: 1025 entries: expected at most 1024"),
        ({"created_at": datetime(2026, 1, 1)}, "created_at"),
    ],
)
def test_a_record_of_wrong_types_is_not_made(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_memory(**changes)  # type: ignore[arg-type]


def test_a_memory_of_another_model_is_refused() -> None:
    data = encode(make_memory())
    with pytest.raises(WrongBase, match="expected another, found 0123456789abcdef"):
        decode(data, expect_base="another")
    with pytest.raises(ShapeMismatch, match="theta_shape is that of the model"):
        decode(data, expect_shape=((16, 32),))


def test_limits_on_size() -> None:
    with pytest.raises(TooLarge):
        encode(make_memory(), bytes_max=1000)
    with pytest.raises(TooLarge):
        decode(encode(make_memory()), bytes_max=1000)
