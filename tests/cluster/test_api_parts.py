"""Parts of the door alone: stop strings, cut documents, UTF-8 in pieces, names in paths, settings."""

from __future__ import annotations

import asyncio
import random
import tracemalloc

import numpy as np
import pytest
from starlette.requests import Request

from actors.messages import ChatCall, RenderedMessage
from cluster.api import build_api
from cluster.bodies import Utf8Stream, read_body
from cluster.config import Config
from cluster.door import DoorSettings
from cluster.errors import BodyTooLarge
from cluster.guard import check_path
from cluster.ingest import CALL_TOKENS, DocumentCutter
from cluster.reply import Reply, StopCutter
from storage.errors import InvalidName
from storage.names import UserKey
from tests.cluster.fake_backend import FakeBackend, tiny_tokenizer


@pytest.mark.parametrize("stops", [("END",), ("ab", "abc", "b"), ("aa",), ("\n\n", "User:"), ()])
def test_stop_strings_are_found_however_the_text_is_cut(stops):
    dice = random.Random(3)
    for seed in range(300):
        text = "".join(dice.choices(["a", "b", "c", "EN", "END", "\n", "User", ":", "x"], k=12))
        ends = [text.find(stop) for stop in stops if stop in text]
        wanted = text[: min(ends)] if ends else text
        cutter, given, rest = StopCutter(stops), "", text
        while rest:
            size = dice.randint(1, 4)
            given += cutter.feed(rest[:size])
            assert wanted.startswith(given), f"seed {seed}: given too much of {text!r}"
            rest = rest[size:]
        assert given + cutter.flush() == wanted, f"seed {seed}: {text!r}"
        assert cutter.stopped == bool(ends)


def test_text_that_can_be_no_stop_string_is_not_held_back():
    cutter = StopCutter(("END",))
    assert cutter.feed("the E") == "the "
    assert cutter.feed("x") == "Ex"


def test_a_cut_document_holds_little_and_loses_nothing():
    words = "".join(random.Random(5).choices(["dog ", "Rex, ", "中文", "\n\n", "a" * 300, "1 2 3 "], k=3000))

    async def cut(size):
        cutter, pieces = DocumentCutter(tiny_tokenizer()), []
        for at in range(0, len(words), size):
            pieces += [piece async for piece in cutter.feed(words[at : at + size])]
            assert len(cutter._text) <= 16384 + size
            assert len(cutter._ids) <= CALL_TOKENS
        return pieces + await cutter.finish()

    cuts = [asyncio.run(cut(size)) for size in (100, 5000, 10**7)]
    for pieces in cuts:
        assert [len(piece) for piece in pieces[:-1]] == [CALL_TOKENS] * (len(pieces) - 1)
        assert 0 < len(pieces[-1]) <= CALL_TOKENS
        assert np.array_equal(np.concatenate(pieces), tiny_tokenizer().encode(words))


@pytest.mark.parametrize(
    ("data", "text", "offset"),
    [
        ("naïve 中文 🐕".encode(), "naïve 中文 🐕", None),
        (b"\xef\xbb\xbfab\xef\xbb\xbf", "ab\ufeff", None),
        (b"ab\xffcd", "ab", 2),
        (b"ab\xe4\xb8", "ab", 2),
        (b"\xe4\xb8ab", "", 0),
        ("中".encode() + b"\xc0\x80", "中", 3),
    ],
)
def test_utf8_in_pieces(data, text, offset):
    for size in range(1, len(data) + 1):
        stream, given = Utf8Stream(), ""
        for at in range(0, len(data), size):
            if stream.wrong is None:
                given += stream.feed(data[at : at + size])
        if stream.wrong is None:
            given += stream.feed(b"", last=True)
        assert given == text
        assert (f"offset {offset} " in str(stream.wrong)) if offset is not None else stream.wrong is None


async def test_closing_a_reply_between_two_pieces_ends_the_call_before_it_returns():
    backend = FakeBackend()
    backend.reply = "one two three"
    door = build_api(backend, tiny_tokenizer(), DoorSettings(model="m")).state.door
    message = RenderedMessage(role="user", tokens=tiny_tokenizer().encode("Hi"), prefix_hash=1)
    call = ChatCall(
        key=UserKey("local", "u1"),
        request_id="r1",
        update_id="w1",
        messages=(message,),
        generation_prompt=np.empty(0, np.int32),
    )
    pieces = Reply(door, call, 0.0).pieces()
    assert "one".startswith(await anext(pieces))
    assert backend.running == {"r1"}
    await pieces.aclose()
    assert (backend.running, backend.cancelled) == (set(), ["r1"])


async def test_a_body_over_the_limit_is_not_kept():
    async def receive():
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            await read_body(request, 4 << 20, 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20, "ten times the limit came, and was thrown away"


def scope(path, raw=None, root=""):
    raw = path.encode() if raw is None else raw
    return {"type": "http", "path": path, "raw_path": raw, "root_path": root}


@pytest.mark.parametrize(
    "bad",
    [
        scope("/v1/memories/../x", b"/v1/memories/%2e%2e%2fx"),
        scope("/v1/memories/a/b/export", b"/v1/memories/a%2Fb/export"),
        scope("/v1/memories/" + "u" * 129),
        scope("/v1/memories/"),
        scope("/door/v1/memories/..", root="/door"),
        {"type": "http", "path": "/v1/memories/a b"},
    ],
)
def test_paths_with_names_that_cannot_be(bad):
    with pytest.raises(InvalidName):
        check_path(bad)


@pytest.mark.parametrize(
    "good",
    [
        scope("/v1/memories/a@b", b"/v1/memories/a%40b?x=../.."),
        scope("/v1/memories/u1/export"),
        scope("/v1/memories"),
        scope("/door/v1/memories/u1", root="/door"),
        scope("/elsewhere/.."),
    ],
)
def test_paths_that_may_pass(good):
    check_path(good)


def test_settings_come_from_the_configuration_and_are_checked():
    config = Config(api_keys={"acme": "key-of-acme"}, admin_key="key-of-admin", body_bytes_max=5000)
    settings = DoorSettings.of(config, model="m")
    assert (settings.api_keys, settings.admin_key) == ({"acme": "key-of-acme"}, "key-of-admin")
    assert (settings.body_bytes_max, settings.modes, settings.model) == (5000, ("mac", "mag", "mal"), "m")
    assert "key-of" not in repr(settings)
    for wrong in ({"model": ""}, {"body_bytes_max": 1}, {"body_idle_s_max": 0}, {"max_tokens_max": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DoorSettings(**{"model": "m", **wrong})


def test_two_doors_in_one_process_do_not_share_figures():
    first, second = (build_api(FakeBackend(), tiny_tokenizer(), DoorSettings(model="m")) for _ in range(2))
    first.state.door.metrics.prompt_tokens.inc(5)
    assert b'prompt_tokens_total{model_name="m"} 5.0' in first.state.door.metrics.page([])
    assert b'prompt_tokens_total{model_name="m"} 0.0' in second.state.door.metrics.page([])
