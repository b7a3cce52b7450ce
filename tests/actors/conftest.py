"""The servers of the storage room's tests, for what must hold on each kind of store."""

from tests.storage.conftest import redis_url, s3_server, s3_url, shared_redis

__all__ = ["redis_url", "s3_server", "s3_url", "shared_redis"]
