"""Ray's own settings, as `RAY_*` variables: the one place that says them.

`titanmem serve` sets `EVERYWHERE` and `ALONE` for the Ray that it starts; k8s/base/rayservice.yaml has `EVERYWHERE` and
`CLUSTER` for Ray's pods, and a test compares the two. The operator's own environment wins.
"""

from __future__ import annotations

CLUSTER = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "200",
    "RAY_health_check_timeout_ms": "800",
    "RAY_health_check_failure_threshold": "3",
}
"""Where another node can go on. A killed node is noticed after 3 x 0.2 s, a frozen one after 3 x (0.2 + 0.8) s. Ray's
defaults of 5 x 3 s and 5 x (3 + 10) s would leave its users without an answer for a minute. A node that is starved for
three seconds counts as frozen: with ten runnable processes on two cores that was seen."""

ALONE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "12",
}
"""For one machine. To declare its only node dead ends the server and helps nobody, so a machine that is suspended, or
starved for a while, gets two minutes. A shard's process is watched by the coordinator either way."""

EVERYWHERE = {
    "RAY_kill_worker_timeout_milliseconds": "500",  # Ray's 5 s is how long a frozen shard would keep its journal
    "RAY_worker_niceness": "0",  # Ray's 15 starves shards and door on a machine that does anything else
}

LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # Ray's remarks on dead workers; the coordinator logs what matters
}
"""What `titanmem serve` sets beside."""


def of_server(joined: bool) -> dict[str, str]:
    """What `titanmem serve` sets: for a Ray of its own, or when it has `joined` one that runs."""
    return {**EVERYWHERE, **LOCAL, **(CLUSTER if joined else ALONE)}
