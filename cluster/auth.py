"""Who is asking: a bearer key names a tenant, one more key names the operator.

| configured | `/v1` | `/admin` |
| --- | --- | --- |
| no keys (the embedded default, loopback only) | tenant `local` | open |
| an admin key only | tenant `local` | the admin key |
| keys of tenants | a tenant's key; or the admin key with `X-Titan-Tenant` | the admin key, else closed |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.errors import Forbidden, Unauthorized
from storage.names import check_name

LOCAL_TENANT = "local"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Identity:
    """What a request may do."""

    tenant: str | None
    """None: the operator, who has named no tenant."""
    admin: bool


class Keys:
    """The keys of a door. Only their hashes are kept, and compared, so time tells nothing about them."""

    def __init__(self, tenants: Mapping[str, str], admin_key: str | None) -> None:
        self._tenants = {_digest(key): check_name("tenant", tenant) for tenant, key in tenants.items()}
        self._admin = _digest(admin_key) if admin_key else None

    def identify(self, method: str, headers: Mapping[str, str]) -> Identity:
        """Whose request it is. `headers` have lower-case names. Raises `Unauthorized` or `Forbidden`."""
        digest = _digest(_bearer(headers.get("authorization", "")))
        if self._admin is not None and digest == self._admin:
            tenant = headers.get("x-titan-tenant")
            default = None if self._tenants else LOCAL_TENANT
            return Identity(check_name("tenant", tenant) if tenant else default, True)
        if digest in self._tenants:
            return Identity(self._tenants[digest], False)
        if self._tenants:
            raise Unauthorized("No valid API key: send one as `Authorization: Bearer KEY`.")
        _same_origin(method, headers)
        return Identity(LOCAL_TENANT, self._admin is None)

    def operator(self, method: str, headers: Mapping[str, str]) -> None:
        """Raises `Unauthorized` or `Forbidden` unless the request may use the admin routes."""
        if self.identify(method, headers).admin:
            return
        if self._admin is None:
            raise Forbidden("No admin key is configured, so the admin routes are closed.")
        raise Forbidden("The admin routes need the admin key: send it as `Authorization: Bearer KEY`.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same_origin(method: str, headers: Mapping[str, str]) -> None:
    """Without keys, a page that a browser shows from elsewhere must not write to the door beside it."""
    origin = headers.get("origin")
    if method in SAFE_METHODS or not origin:
        return
    if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise Forbidden("This door has no keys, so it takes no requests that a foreign web page sends.")
