"""A tiny OpenTelemetry collector: takes spans over OTLP/HTTP and keeps them."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """One span: its name, its ids in hex, and who made it."""

    name: str
    trace: str
    span: str
    parent: str
    instance: str
    scope: str
    attributes: dict[str, str]


class Collector:
    """The spans that have arrived."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._spans: list[Received] = []
        self._lock = threading.Lock()

    def take(self, data: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(data)
        for resource in request.resource_spans:
            about = {a.key: a.value.string_value for a in resource.resource.attributes}
            spans = [
                Received(
                    name=span.name,
                    trace=span.trace_id.hex(),
                    span=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    instance=about.get("service.instance.id", ""),
                    scope=scope.scope.name,
                    attributes={a.key: a.value.string_value for a in span.attributes},
                )
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            with self._lock:
                self._spans += spans

    def wait(self, trace: str, root: str, names: set[str], timeout_s: float) -> list[Received]:
        """Our spans of one trace (not Ray's own) below the client's span `root`.

        They are waited for until all `names` are among them and no parent is missing, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                found = [span for span in self._spans if span.trace == trace and span.scope == "titanmem"]
            parents = {span.parent for span in found}
            whole = root in parents and parents <= {root, *(span.span for span in found)}
            if (whole and names <= {span.name for span in found}) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                collector.take(body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
