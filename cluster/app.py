"""The door as a Ray Serve application: `serveConfigV2` imports `build`, and `titanmem serve` runs `bind`.

Stateless: each replica has a router and a tokenizer of its own, and no replica knows of another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from cluster import telemetry
from cluster.api import build_api
from cluster.config import Config, load
from cluster.coordinator import ensure
from cluster.door import DoorSettings
from cluster.router import Router
from titanmem.tokenizer import ChatTokenizer

APPLICATION = "titanmem"
REQUESTS_MAX = 10_000
"""In flight in one replica. The shards' queues are what answers 429; this bounds memory alone."""
STREAMS_END_S = 20.0
"""A replica that stops lets replies that have begun end by themselves for so long."""
REPLICA_CPUS = 0.1
"""Logical: above 0, so that a head node without CPUs gets no replica."""


@serve.ingress()
class Ingress:
    """One replica of the door."""

    def __init__(self, config: Config) -> None:
        telemetry.configure(endpoint=config.otlp_endpoint, instance="door")
        ensure(config)
        self._config = config

    def __serve_build_asgi_app__(self) -> Any:
        config = self._config
        router = Router(config.store, request_timeout_s=config.request_timeout_s)
        settings = DoorSettings.of(config, model=config.model_name)
        return build_api(router, ChatTokenizer(config.model_folder), settings)


def bind(config: Config) -> Application:
    """The application for `config`."""
    deployment = serve.deployment(
        name="door",
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=REQUESTS_MAX,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=STREAMS_END_S,
        health_check_period_s=5.0,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return deployment(Ingress).bind(config)


def build(args: dict[str, Any] | None = None) -> Application:
    """`import_path: cluster.app:build`. `args` are fields of `Config`, and `config` may name a TOML file.

    Serve's own `http_options` say where the door listens, so without `host` here the door counts as open to
    others and needs `api_keys`. Raises `ValueError` naming the field.
    """
    return bind(config_of(dict(args or {}), os.environ))


def config_of(args: Mapping[str, Any], env: Mapping[str, str]) -> Config:
    """The configuration of an application that Serve listens for."""
    file = args.get("config")
    flags = {name: value for name, value in args.items() if name != "config"}
    return load(file, env={"TITANMEM_HOST": "0.0.0.0", **env}, flags=flags)
