"""`/metrics`: the door's own figures, and those of the shards, as one Prometheus text.

Ray's own metrics drop names with a colon, so the page is made here. A shard's figures come as text of its own
(`Backend.shard_metrics`); all texts are taken apart into families and put together again, since a family may
stand on the page only once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0,
)  # fmt: skip
"""vLLM's own bounds, so that its dashboards fit."""
LATENCY_BUCKETS_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
BETWEEN_TOKENS_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.0, 2.0)
SUMMED_KINDS = frozenset({"counter", "histogram", "summary"})


class DoorMetrics:
    """The door's own figures, under the names of vLLM where it has the same one. One registry a door."""

    def __init__(self, model: str) -> None:
        registry = self.registry = CollectorRegistry()
        label = {"labelnames": ("model_name",), "registry": registry}
        one = {"model_name": model}
        self.running = Gauge(
            "vllm:num_requests_running", "Chat requests whose tokens are coming.", **label
        ).labels(**one)
        self.waiting = Gauge(
            "vllm:num_requests_waiting", "Chat requests that wait for their first token.", **label
        ).labels(**one)
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Tokens of the prompts that were answered.", **label
        ).labels(**one)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens generated.", **label).labels(**one)
        self.first_token_s = Histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            **label,
        ).labels(**one)
        self.between_tokens_s = Histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between two arrivals of tokens of one reply.",
            buckets=BETWEEN_TOKENS_BUCKETS_S,
            **label,
        ).labels(**one)
        self.whole_s = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Seconds from a request's arrival to its last token.",
            buckets=LATENCY_BUCKETS_S,
            **label,
        ).labels(**one)
        self._finished = Counter(
            "vllm:request_success",
            "Replies that ended, by reason.",
            labelnames=("model_name", "finished_reason"),
            registry=registry,
        )
        self._model = model
        self.ingested_tokens = Counter(
            "titan:ingested_tokens", "Tokens of documents that were acknowledged.", registry=registry
        )
        self._requests = Counter(
            "titan:http_requests",
            "HTTP requests, by route and status.",
            labelnames=("method", "route", "status"),
            registry=registry,
        )
        self.shard_texts_refused = Counter(
            "titan:shard_metrics_refused",
            "Metrics texts of shards that could not be read.",
            registry=registry,
        )

    def finished(self, reason: str) -> None:
        """Counts one reply that ended for `reason`."""
        self._finished.labels(model_name=self._model, finished_reason=reason).inc()

    def answered(self, method: str, route: str, status: int) -> None:
        """Counts one HTTP request. `route` is the route's pattern, never a user's name."""
        self._requests.labels(method=method, route=route, status=str(status)).inc()

    def page(self, shard_texts: Iterable[bytes]) -> bytes:
        """The whole page. A shard's text that cannot be read is counted and left out."""
        good = []
        for text in shard_texts:
            try:
                good.append(parse(text))
            except ValueError as error:
                self.shard_texts_refused.inc()
                log.warning("a shard's metrics cannot be read: %s", error)
        return write(merge([parse(generate_latest(self.registry)), *good]))


@dataclass(slots=True)
class Family:
    """One metric with all its samples."""

    kind: str
    help: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)
    """(sample name, sorted labels) → value."""

    def take(self, other: Family) -> None:
        """Adds another's samples. The same sample twice: counts are summed, the larger gauge counts."""
        for key, value in other.samples.items():
            if key not in self.samples:
                self.samples[key] = value
            elif self.kind in SUMMED_KINDS:
                self.samples[key] += value
            else:
                self.samples[key] = max(self.samples[key], value)


def parse(text: bytes) -> dict[str, Family]:
    """Families of one Prometheus text by name, `_created` samples left out. ValueError if it is none."""
    families: dict[str, Family] = {}
    for metric in text_string_to_metric_families(text.decode("utf-8")):
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        family = Family(metric.type, metric.documentation)
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            family.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        if family.samples and name not in families:
            families[name] = family
        elif family.samples:
            families[name].take(family)
    return families


def merge(texts: Iterable[Mapping[str, Family]]) -> dict[str, Family]:
    """All families of all texts, each once, in order of name; kind and help are the first one's."""
    merged: dict[str, Family] = {}
    for families in texts:
        for name, family in families.items():
            merged.setdefault(name, Family(family.kind, family.help)).take(family)
    return dict(sorted(merged.items()))


def write(families: Mapping[str, Family]) -> bytes:
    """Prometheus text format 0.0.4."""
    lines = []
    for name, family in families.items():
        kind = "untyped" if family.kind == "unknown" else family.kind
        text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [
            f"{sample}{_labels(labels)} {_number(value)}"
            for (sample, labels), value in family.samples.items()
        ]
    return ("\n".join(lines) + "\n").encode()


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
