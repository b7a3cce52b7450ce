"""What all routes share: the settings, the cluster behind the door, and whose request it is."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from cluster.auth import Keys
from cluster.backend import Backend
from cluster.bodies import read_body, read_json
from cluster.config import Config
from cluster.errors import BadRequest, Forbidden
from cluster.metrics import DoorMetrics
from storage.names import UserKey
from storage.titanmem import TITANMEM_BYTES_MAX
from titanmem.decoder_config import DecoderConfig
from titanmem.tokenizer import ChatTokenizer

IDEMPOTENCY_CHARS_MAX = 200
SMALL_BODY_BYTES_MAX = 65536
"""Bodies of a field or two: a version to go back to, a number of shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoorSettings:
    """All that the door itself is told. Raises ValueError naming the field."""

    model: str
    """The name that clients call the model by."""
    modes: tuple[str, ...] = ("mac",)
    """How memory can meet attention here; a request that asks for another mode is refused."""
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Tenant → bearer key; empty: one tenant `local` and no keys."""
    admin_key: str | None = field(default=None, repr=False)
    """Bearer key of the admin routes."""
    body_bytes_max: int = 4 << 20
    """Largest JSON body in bytes, 1,024 or more."""
    import_bytes_max: int = TITANMEM_BYTES_MAX
    """Largest `.titanmem` that may be sent, bytes."""
    body_idle_s_max: float = 60.0
    """Longest silence inside a body, seconds."""
    messages_max: int = 1024
    """Messages in one chat request, 1 or more."""
    max_tokens_default: int = 256
    """Tokens of a reply when the request names no number."""
    max_tokens_max: int = 4096
    """Most tokens of a reply that a request may ask for."""
    temperature_default: float = 0.0
    """Temperature when the request names none; 0 answers from memory best."""
    ingest_patience_s: float = 60.0
    """How long a document that has begun waits, in all, for room in a shard's queue before it is refused."""
    trace_content: bool = False
    """Whether traces hold what users and the model said."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: must not be empty")
        for name, low in (
            ("body_bytes_max", 1024),
            ("import_bytes_max", 1024),
            ("messages_max", 1),
            ("max_tokens_default", 1),
            ("max_tokens_max", self.max_tokens_default),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)} must be {low} or more")
        if self.body_idle_s_max <= 0:
            raise ValueError(f"body_idle_s_max: {self.body_idle_s_max} must be over 0")

    @classmethod
    def of(cls, config: Config, *, model: str) -> DoorSettings:
        """The door's part of a cluster's configuration."""
        return cls(
            model=model,
            modes=DecoderConfig.load(config.model_folder).modes,
            api_keys=config.api_keys,
            admin_key=config.admin_key,
            body_bytes_max=config.body_bytes_max,
        )


@dataclass(frozen=True, slots=True)
class Door:
    """One ingress: the cluster behind it, and what its routes need."""

    backend: Backend
    tokenizer: ChatTokenizer
    settings: DoorSettings
    keys: Keys
    metrics: DoorMetrics
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    now: Callable[[], float] = time.time
    """Seconds since 1970."""

    def tenant(self, request: Request) -> str:
        """The tenant of a request. Raises `Unauthorized` or `Forbidden`."""
        tenant = self.keys.identify(request.method, request.headers).tenant
        if tenant is None:
            raise Forbidden("The admin key belongs to no tenant: name one in the header X-Titan-Tenant.")
        return tenant

    def key(self, request: Request, user: str) -> UserKey:
        """The user's key, of the tenant who asks. Raises `InvalidName` too."""
        return UserKey(self.tenant(request), user)

    def operator(self, request: Request) -> None:
        """Raises unless the request may use the admin routes."""
        self.keys.operator(request.method, request.headers)

    async def body(self, request: Request, bytes_max: int) -> bytes:
        return await read_body(request, bytes_max, self.settings.body_idle_s_max)

    async def json(self, request: Request, bytes_max: int = SMALL_BODY_BYTES_MAX) -> dict[str, object]:
        """A small JSON object; none at all is an empty one."""
        return await read_json(request, bytes_max, self.settings.body_idle_s_max, optional=True)

    def idempotency_key(self, request: Request) -> str | None:
        """What the client calls this write, so that it may send it again. Raises `BadRequest`."""
        key = request.headers.get("idempotency-key")
        if key is not None and not (
            1 <= len(key) <= IDEMPOTENCY_CHARS_MAX and key.isascii() and key.isprintable()
        ):
            message = f"Idempotency-Key: 1 to {IDEMPOTENCY_CHARS_MAX} printable ASCII characters."
            raise BadRequest(message, "Idempotency-Key")
        return key


def door_of(request: Request) -> Door:
    """The door that `request` came to."""
    return request.app.state.door
