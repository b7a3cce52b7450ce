"""What can go wrong between the door and a shard, on the one tree of `storage/errors.py`.

    TitanmemError
    └── ClusterError
        ├── ShardUnavailable   no answer from the shard: dead, restarting, or moving the user
        ├── NotReady           the cluster is starting or draining
        └── RequestError       the caller's fault
            ├── BadRequest       a value that cannot be used; names the field
            ├── UnknownModel     no such model is served here
            ├── Unauthorized     no key, or an unknown one
            ├── Forbidden        a key that may not do this
            ├── BodyTooLarge     more bytes than the limit
            └── BodyTooSlow      the body stopped arriving

`cluster/problems.py` gives each its HTTP status. All of them survive pickling.
What a shard itself says (`NotOwner`, `ShardNotOpen`, `QueueFull`) is in `actors/errors.py`.
"""

from __future__ import annotations

from storage.errors import TitanmemError, shorten

RETRY_AFTER_DEFAULT_S = 1.0


class ClusterError(TitanmemError):
    """Something between the door and a shard went wrong."""


class ShardUnavailable(ClusterError):
    """`shard` did not answer; nothing that was not acknowledged is known to be written. Try again."""

    def __init__(self, shard: str, why: str, retry_after_s: float = RETRY_AFTER_DEFAULT_S) -> None:
        message = f"{shard} is not available: {why}"
        super().__init__(message, shard=shard, why=why, retry_after_s=retry_after_s)


class NotReady(ClusterError):
    """The cluster is starting, draining or stopping; `reason` says which."""

    def __init__(self, reason: str, retry_after_s: float = RETRY_AFTER_DEFAULT_S) -> None:
        super().__init__(f"not ready: {reason}", reason=reason, retry_after_s=retry_after_s)


class RequestError(ClusterError):
    """The caller's fault: the same request again has the same answer."""


class BadRequest(RequestError):
    """A value that cannot be used; `param` names the field (`messages[0].content`)."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)


class UnknownModel(RequestError):
    """No model of that name is served here."""

    def __init__(self, model: str, served: str) -> None:
        shown = shorten(model, 64)
        super().__init__(
            f"The model {shown!r} does not exist here; this server serves {served!r}.",
            model=shown,
            served=served,
        )


class Unauthorized(RequestError):
    """No key was given, or one that is not known."""


class Forbidden(RequestError):
    """The key is known, but may not do this."""


class BodyTooLarge(RequestError):
    """The request's body is longer than `bytes_max`."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The body is too large: at most {bytes_max} bytes.", bytes_max=bytes_max)


class BodyTooSlow(RequestError):
    """Nothing of the request's body arrived for `idle_s`."""

    def __init__(self, idle_s: float) -> None:
        super().__init__(f"The body stopped arriving: nothing came for {idle_s:g} s.", idle_s=idle_s)
