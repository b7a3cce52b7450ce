"""Ray's own settings, as `RAY_*` variables: the one place that says them.

`titanmem serve` sets them for the Ray that it starts; k8s/base/rayservice.yaml has the same for Ray's pods, and a
test compares the two. The operator's own environment wins.
"""

from __future__ import annotations

from pathlib import Path

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "200",
    "RAY_health_check_timeout_ms": "800",
    "RAY_health_check_failure_threshold": "3",
}
"""A killed node is noticed after 3 x 0.2 s, a frozen one after 3 x (0.2 + 0.8) s. Ray's defaults of 5 x 3 s and
5 x (3 + 10) s would leave its users without an answer for a minute."""

ENVIRONMENT = {
    **HEALTH,
    "RAY_worker_niceness": "0",  # Ray's 15 starves shards and door on a machine that does anything else
}
"""What every node of a cluster has."""

LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # Ray's remarks on dead workers; the coordinator logs what matters
}
"""What `titanmem serve` adds on its one machine."""


def gcs_storage(folder: Path) -> dict[str, str]:
    """For the head node: Ray's control service (GCS) keeps its state there, and goes on from it when started again."""
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder)}
