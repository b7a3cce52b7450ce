"""Traces: one from the client's HTTP request to the shard, GenAI names, no content unless asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from cluster.telemetry import configure
from tests.cluster.fake_backend import MODEL, QueueFull, eventually, leave, quick_client, serving
from titanmem.tracing import context_with, continued, inject, tracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
CHAT = {"model": MODEL, "user": "u1", "messages": [{"role": "user", "content": "A secret dog"}]}


@pytest.fixture(scope="module")
def exporter():
    exporter = InMemorySpanExporter()
    assert configure(exporter=exporter, env={}) is not None
    return exporter


@pytest.fixture
def spans(exporter):
    exporter.clear()

    def named(name):
        assert eventually(lambda: any(span.name == name for span in exporter.get_finished_spans()))
        return [span for span in exporter.get_finished_spans() if span.name == name]

    return named


@pytest.fixture(scope="module")
def served():
    with serving() as door:
        yield door


@pytest.fixture(scope="module")
def http():
    with quick_client() as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_one_span_that_goes_on_into_the_shard(served, http, spans, stream):
    served.backend.reset()
    body = {**CHAT, "stream": stream, "temperature": 0.5, "titan": {"conversation": "c1"}}
    http.post(f"{served.url}/v1/chat/completions", json=body, headers={"traceparent": PARENT})
    (span,) = spans("chat")
    assert span.kind is SpanKind.SERVER
    assert span.context.trace_id == TRACE_ID
    assert span.parent.span_id == 0xB7AD6B7169203331
    handed = served.backend.chats[-1].trace["traceparent"]
    assert handed == f"00-{TRACE_ID:032x}-{span.context.span_id:016x}-01"
    with continued(served.backend.chats[-1].trace, "search_memory") as inner:
        assert inner.get_span_context().trace_id == TRACE_ID
    (search,) = spans("search_memory")
    assert search.parent.span_id == span.context.span_id
    found = span.attributes
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == MODEL
    assert found["gen_ai.request.temperature"] == 0.5
    assert found["gen_ai.conversation.id"] == "c1"
    assert found["gen_ai.usage.output_tokens"] > 0
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.response.id"] == served.backend.chats[-1].request_id
    assert "secret" not in str(dict(found)), "content is off by default"


def test_content_is_in_the_trace_when_the_operator_says_so(http, spans):
    with serving(trace_content=True) as door:
        http.post(f"{door.url}/v1/chat/completions", json=CHAT)
    (span,) = spans("chat")
    assert "A secret dog" in span.attributes["gen_ai.input.messages"]
    assert "Noted: A secret dog" in span.attributes["gen_ai.output.messages"]


def test_writing_and_erasing_have_their_names(served, http, spans):
    served.backend.reset()
    http.post(f"{served.url}/v1/memories/u1/ingest", content=b"Rex", headers={"traceparent": PARENT})
    (update,) = spans("update_memory")
    assert update.context.trace_id == TRACE_ID
    assert served.backend.ingests[0].trace["traceparent"].split("-")[2] == f"{update.context.span_id:016x}"
    assert update.attributes["gen_ai.operation.name"] == "update_memory"
    http.delete(f"{served.url}/v1/memories/u1", headers={"traceparent": PARENT})
    (delete,) = spans("delete_memory")
    assert delete.context.trace_id == TRACE_ID


def test_a_failure_marks_the_span_without_its_message(served, http, spans):
    served.backend.reset()
    served.backend.failures.append(QueueFull("a secret queue"))
    http.post(f"{served.url}/v1/chat/completions", json=CHAT)
    (span,) = spans("chat")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "QueueFull"
    assert "secret" not in str(span.to_json())


def test_a_cancelled_request_ends_its_span(served, spans):
    served.backend.reset()
    served.backend.allowed = 0
    leave(served, CHAT)
    (span,) = spans("chat")
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("parent", ["garbage", "00-0-0-01", ""])
def test_a_malformed_parent_starts_a_new_trace(served, http, spans, parent):
    served.backend.reset()
    reply = http.post(f"{served.url}/v1/chat/completions", json=CHAT, headers={"traceparent": parent})
    assert reply.status_code == 200
    (span,) = spans("chat")
    assert span.parent is None


def test_a_carrier_takes_a_span_along(spans):
    with tracer().start_as_current_span("door") as door:
        carrier = inject()
        assert set(carrier) <= {"traceparent", "tracestate"}
        with continued({}, "below", gen_ai__system="x"):
            pass
    span = tracer().start_span("long")
    assert (
        inject(context_with(span))["traceparent"].split("-")[2] == f"{span.get_span_context().span_id:016x}"
    )
    span.end()
    with pytest.raises(KeyError), continued(carrier, "elsewhere"):
        raise KeyError("secret")
    (below,), (elsewhere,) = spans("below"), spans("elsewhere")
    assert below.parent.span_id == elsewhere.parent.span_id == door.get_span_context().span_id
    assert below.attributes == {"gen_ai.system": "x"}
    assert elsewhere.attributes == {"error.type": "KeyError"}
    assert trace.get_current_span() is trace.INVALID_SPAN


PROBE = """
import sys
from opentelemetry import trace
from cluster.telemetry import configure
from titanmem.tracing import inject, tracer
provider = configure({arguments})
with tracer().start_as_current_span("probe"):
    sys.stderr.write("carrier " + str(sorted(inject())) + "\\n")
if provider is not None:
    kinds = [type(p.span_exporter).__name__ for p in provider._active_span_processor._span_processors]
    sys.stderr.write(" ".join(kinds) + " " + str(getattr(
        provider._active_span_processor._span_processors[0].span_exporter, "_endpoint", "")) + "\\n")
    sys.stderr.flush()
"""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("env={}", ["carrier []"]),
        ("env={'OTEL_TRACES_EXPORTER': 'none'}, endpoint='http://127.0.0.1:9'", ["carrier []"]),
        ("env={'OTEL_TRACES_EXPORTER': 'console'}", ["carrier ['traceparent']", "ConsoleSpanExporter"]),
        (
            "env={}, endpoint='http://127.0.0.1:9/'",
            ["carrier ['traceparent']", "OTLPSpanExporter http://127.0.0.1:9/v1/traces"],
        ),
    ],
)
def test_nothing_is_sent_unless_somebody_says_where(arguments, wanted):
    # A process has one provider for good, so each setting needs a process of its own.
    script = PROBE.replace("{arguments}", arguments) + "import os; os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True
    )
    assert [line.strip() for line in done.stderr.splitlines()] == wanted, done.stderr
    assert ("probe" in done.stdout) == ("console" in arguments)
