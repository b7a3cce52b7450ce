"""Ray actors by name, and their errors taken apart. Type checkers do not see `.remote`: a handle is `Any`."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

NAMESPACE = "titanmem"
COORDINATOR = "coordinator"
SNAPSHOTTER = "snapshotter"
FIND_TIMEOUT_S = 5.0
"""`ray.get_actor` blocks for as long as Ray's control service is away."""

Handle = Any


async def find(name: str, timeout_s: float = FIND_TIMEOUT_S) -> Handle | None:
    """The living actor of that name in our namespace, or None; `TimeoutError` if nobody knows."""
    look = functools.partial(ray.get_actor, name, namespace=NAMESPACE)
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(look)
    except ValueError:
        return None


async def ask(call: Any, timeout_s: float) -> Any:
    """The result of a remote call. Raises what the actor raised, unwrapped, or `TimeoutError`."""
    try:
        async with asyncio.timeout(timeout_s):  # `wait_for` of Python 3.11 can lose a cancellation
            return await call
    except RayTaskError as error:
        raise unwrap(error) from None


def unwrap(error: BaseException) -> BaseException:
    """What was raised in the actor, as it was raised there; other errors as they are."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, BaseException) and not isinstance(cause, RayTaskError):
            return cause
    return error


def is_gone(error: BaseException) -> bool:
    """The actor is dead, restarting or cannot be reached: what became of the call is not known."""
    return isinstance(error, RayActorError)
