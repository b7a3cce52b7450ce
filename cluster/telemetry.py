"""Who collects spans: an OpenTelemetry collector over HTTP when one is configured, nobody by default.

Every process that makes spans calls `configure` once when it starts: the door, and each shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SimpleSpanProcessor,
    SpanExporter,
)

SERVICE = "titanmem"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""The standard's own names; either switches traces on."""
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
"""`console` writes spans to standard output, `none` switches them off whatever else is said."""


def configure(
    *,
    endpoint: str | None = None,
    exporter: SpanExporter | None = None,
    instance: str = "",
    env: Mapping[str, str] | None = None,
) -> TracerProvider | None:
    """Sets up the traces of this process; None if nobody collects them, and then nothing is set up.

    `endpoint` is a collector's address, such as `http://127.0.0.1:4318`; without one the environment says
    (`OTEL_EXPORTER_OTLP_ENDPOINT`). `exporter` (tests) is used instead, and gets each span as it ends. Called
    again, it adds to what is there, since a process has one provider. `instance` names it: `shard-0`.
    """
    env = os.environ if env is None else env
    found = exporter or _exporter(endpoint, env)
    if found is None:
        return None
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        resource = {"service.name": env.get("OTEL_SERVICE_NAME", SERVICE)}
        if instance:
            resource["service.instance.id"] = instance
        provider = TracerProvider(resource=Resource.create(resource))
        trace.set_tracer_provider(provider)
    at_once = exporter is not None or isinstance(found, ConsoleSpanExporter)
    provider.add_span_processor(SimpleSpanProcessor(found) if at_once else BatchSpanProcessor(found))
    return provider


def _exporter(endpoint: str | None, env: Mapping[str, str]) -> SpanExporter | None:
    kind = env.get(EXPORTER_VARIABLE, "")
    if kind == "console":
        return ConsoleSpanExporter()
    if kind == "none" or not (endpoint or any(env.get(name) for name in ENDPOINT_VARIABLES)):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # Without an endpoint of ours the exporter reads the standard variables itself, headers and time-outs too.
    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces") if endpoint else OTLPSpanExporter()
