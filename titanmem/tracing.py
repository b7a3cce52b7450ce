"""Traces across processes: opentelemetry-api only, so a shard may import it, and nothing is sent by default.

A trace travels as a plain dict with the W3C names `traceparent` and `tracestate` (`ChatCall.trace`), since
Ray carries no context between actors by itself. Who collects the spans is decided in `cluster/telemetry.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SCOPE = "titanmem"
_W3C = TraceContextTextMapPropagator()
Attribute = str | bool | int | float | tuple[str, ...]


def tracer() -> Tracer:
    """The project's tracer; its spans cost next to nothing while no provider is set up."""
    return trace.get_tracer(SCOPE)


def inject(context: Context | None = None) -> dict[str, str]:
    """The current trace (or that of `context`) as a carrier; empty when there is none."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=context)
    return carrier


def context_of(carrier: Mapping[str, str]) -> Context:
    """The context that `carrier` names (HTTP headers will do); a malformed one counts as none."""
    return _W3C.extract({name.lower(): value for name, value in carrier.items()}, context=Context())


def context_with(span: Span) -> Context:
    """A context whose current span is `span`: for spans that outlive one block of code, as a stream does."""
    return trace.set_span_in_context(span, Context())


@contextmanager
def continued(
    carrier: Mapping[str, str], name: str, kind: SpanKind = SpanKind.INTERNAL, **attributes: Attribute
) -> Iterator[Span]:
    """A span `name` below the one that `carrier` names; with an empty carrier, below the current one.

    Two underscores in an attribute's name stand for a dot: `gen_ai__system` is `gen_ai.system`.
    An exception marks the span as failed and goes on; its message is not recorded, since it may hold content.
    """
    context = context_of(carrier) if carrier else None
    span = tracer().start_span(name, context=context, kind=kind, attributes=dotted(attributes))
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield span
        except BaseException as error:
            failed(span, error)
            raise


def dotted(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """`gen_ai__request__model` → `gen_ai.request.model`."""
    return {name.replace("__", "."): value for name, value in attributes.items()}


def failed(span: Span, error: BaseException) -> None:
    """Marks `span` as failed with the kind of `error`, without its message."""
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
