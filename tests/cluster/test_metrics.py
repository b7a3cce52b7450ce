"""`/metrics`: names of the contract, one family each, figures that are right."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import DoorMetrics, merge, parse, write
from tests.cluster.fake_backend import MODEL, eventually, quick_client, serving, tiny_tokenizer


def shard_text(shard, updates, writes_s=()):
    """What a shard's own registry writes."""
    registry = CollectorRegistry()
    made = {"labelnames": ("shard",), "registry": registry}
    Gauge("titan:resident_users", "Users in slots.", **made).labels(shard).set(3)
    counter = Counter(
        "titan:chunk_updates", 'With "quotes",\nlines and \\.', ["shard", "outcome"], registry=registry
    )
    counter.labels(shard, "written").inc(updates)
    lock = Histogram("titan:write_lock_seconds", "Lock.", buckets=(0.001, 0.01), **made).labels(shard)
    for value in writes_s:
        lock.observe(value)
    return generate_latest(registry)


def samples(page, name):
    """{labels: value} of one sample name; fails if a family stands twice or has no HELP and TYPE."""
    text = page.decode() if isinstance(page, bytes) else page
    heads = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(heads) == len(set(heads)), "a family stands twice"
    assert heads == [line.split()[2] for line in text.splitlines() if line.startswith("# HELP ")]
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                labels = tuple(sorted(sample.labels.items()))
                assert labels not in found, "a sample stands twice"
                found[labels] = sample.value
    return found


def test_texts_of_shards_become_one_with_every_sample_kept():
    page = write(
        merge(map(parse, [shard_text("shard-0", 5, [0.002]), shard_text("shard-1", 7, [0.5, 0.0005])]))
    )
    assert samples(page, "titan:chunk_updates_total") == {
        (("outcome", "written"), ("shard", "shard-0")): 5.0,
        (("outcome", "written"), ("shard", "shard-1")): 7.0,
    }
    buckets = samples(page, "titan:write_lock_seconds_bucket")
    assert buckets[("le", "0.001"), ("shard", "shard-1")] == 1.0
    assert buckets[("le", "+Inf"), ("shard", "shard-1")] == 2.0
    assert samples(page, "titan:write_lock_seconds_sum")[(("shard", "shard-0"),)] == pytest.approx(0.002)
    assert b"# TYPE titan:chunk_updates_total counter\n" in page
    assert b"# TYPE titan:write_lock_seconds histogram\n" in page
    assert rb'# HELP titan:chunk_updates_total With "quotes",\nlines and \\.' in page
    assert b"_created" not in page


def test_the_same_sample_of_two_shards_is_summed_or_the_larger():
    page = write(merge(map(parse, [shard_text("x", 5, [0.002]), shard_text("x", 7, [0.002])])))
    assert list(samples(page, "titan:chunk_updates_total").values()) == [12.0]
    assert list(samples(page, "titan:write_lock_seconds_count").values()) == [2.0]
    assert list(samples(page, "titan:resident_users").values()) == [3.0]


def test_odd_values_and_labels_survive():
    text = b'# TYPE a gauge\na{x="q\\"\\\\ \\n"} NaN\na{x="y"} -Inf\nb 1e300\n'
    page = write(parse(text))
    found = samples(page, "a")
    assert found[(("x", 'q"\\ \n'),)] != found[(("x", 'q"\\ \n'),)]
    assert found[(("x", "y"),)] == float("-inf")
    assert samples(page, "b") == {(): 1e300}
    assert b"# TYPE b untyped" in page


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"titan:x{ 1\n", b"titan:x one\n"])
def test_a_shards_text_that_cannot_be_read_takes_nothing_else_away(broken):
    metrics = DoorMetrics(MODEL)
    page = metrics.page([broken, shard_text("shard-1", 7)])
    assert list(samples(page, "titan:chunk_updates_total").values()) == [7.0]
    assert samples(metrics.page([]), "titan:shard_metrics_refused_total") == {(): 1.0}


@pytest.fixture
def served():
    with serving() as door:
        yield door


def test_the_page_counts_what_the_door_did(served):
    model = (("model_name", MODEL),)
    chat = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "Hi"}]}
    served.backend.texts = [shard_text("shard-0", 5)]
    with quick_client(base_url=served.url) as http:

        def value(name, labels=()):
            page = http.get("/metrics")
            assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            return samples(page.text, name).get(labels)

        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            assert value(name, model) == 0.0
        usages = []
        for stream in (False, True, False):
            reply = http.post("/v1/chat/completions", json={**chat, "stream": stream})
            usages.append(reply.status_code)
        spoken = len(tiny_tokenizer().encode("Noted: Hi"))
        prompt = len(tiny_tokenizer().encode("Hi")) + 3
        assert value("vllm:prompt_tokens_total", model) == 3 * prompt
        assert value("vllm:generation_tokens_total", model) == 3 * spoken
        assert value("vllm:time_to_first_token_seconds_count", model) == 3
        assert value("vllm:e2e_request_latency_seconds_count", model) == 3
        assert value("vllm:inter_token_latency_seconds_count", model) == 3 * (spoken - 1)
        assert value("vllm:request_success_total", (("finished_reason", "stop"), *model)) == 3
        assert value("titan:chunk_updates_total", (("outcome", "written"), ("shard", "shard-0"))) == 5
        http.post("/v1/memories/u1/ingest", content=b"My dog is Rex.")
        assert value("titan:ingested_tokens_total") == len(tiny_tokenizer().encode("My dog is Rex."))
        http.get("/v1/memories/somebody")
        missed = (("method", "GET"), ("route", "/v1/memories/{user}"), ("status", "404"))
        assert value("titan:http_requests_total", missed) == 1
        http.get("/nothing")
        unmatched = (("method", "GET"), ("route", "unmatched"), ("status", "404"))
        assert value("titan:http_requests_total", unmatched) == 1


def test_waiting_and_running_follow_a_request(served):
    model = (("model_name", MODEL),)
    served.backend.allowed, served.backend.reply = 0, "one two three four"
    chat = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    begun = threading.Event()

    def ask():
        with (
            quick_client() as http,
            http.stream("POST", f"{served.url}/v1/chat/completions", json=chat) as reply,
        ):
            next(reply.iter_lines())
            begun.set()

    with quick_client(base_url=served.url) as http:

        def both():
            page = http.get("/metrics").text
            return [samples(page, f"vllm:num_requests_{name}")[model] for name in ("waiting", "running")]

        thread = threading.Thread(target=ask)
        thread.start()
        assert eventually(lambda: both() == [1.0, 0.0])
        served.backend.allowed = 1
        assert begun.wait(20)
        thread.join()
        assert eventually(lambda: both() == [0.0, 0.0]), "a client that left is still counted"
        page = http.get("/metrics").text
        assert samples(page, "vllm:request_success_total")[(("finished_reason", "abort"), *model)] == 1
