"""Every error as HTTP: its status, and an OpenAI body `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from starlette.responses import JSONResponse

from actors import errors as actor_errors
from cluster import errors as cluster_errors
from storage import errors as storage_errors
from storage.errors import TitanmemError
from titanmem.errors import ChatTemplateError

log = logging.getLogger(__name__)

REQUEST, AUTH, PERMISSION, RATE, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "server_error",
)
RETRY_STATUSES = frozenset({408, 429, 503})


@dataclass(frozen=True, slots=True)
class Problem:
    """How one class of error is answered."""

    status: int
    type: str
    code: str | None
    """None: the name of the error's own class."""
    param: str | None = None


PROBLEMS: dict[type[Exception], Problem] = {
    cluster_errors.BadRequest: Problem(400, REQUEST, "invalid_value"),
    cluster_errors.UnknownModel: Problem(404, REQUEST, "model_not_found", "model"),
    cluster_errors.Unauthorized: Problem(401, AUTH, "invalid_api_key"),
    cluster_errors.Forbidden: Problem(403, PERMISSION, "forbidden"),
    cluster_errors.BodyTooLarge: Problem(413, REQUEST, "body_too_large"),
    cluster_errors.BodyTooSlow: Problem(408, REQUEST, "body_too_slow"),
    actor_errors.QueueFull: Problem(429, RATE, "queue_full"),
    actor_errors.NoMemoryWeights: Problem(409, REQUEST, "no_memory_weights"),
    actor_errors.MemoryFrozen: Problem(409, REQUEST, "memory_frozen", "user"),
    actor_errors.MemoryDamaged: Problem(503, SERVER, "memory_damaged", "user"),
    cluster_errors.ShardUnavailable: Problem(503, SERVER, "shard_unavailable"),
    cluster_errors.NotReady: Problem(503, SERVER, "not_ready"),
    actor_errors.NotOwner: Problem(503, SERVER, "not_owner"),
    actor_errors.ShardNotOpen: Problem(503, SERVER, "shard_not_open"),
    TimeoutError: Problem(503, SERVER, "timed_out"),
    ChatTemplateError: Problem(400, REQUEST, "template_refused", "messages"),
    storage_errors.InvalidName: Problem(400, REQUEST, "invalid_name", "user"),
    storage_errors.BadMemoryFile: Problem(422, REQUEST, None),
    storage_errors.VersionConflict: Problem(409, REQUEST, "version_conflict"),
    storage_errors.Fenced: Problem(409, SERVER, "fenced"),
    storage_errors.NoSuchMemory: Problem(404, REQUEST, "no_such_memory", "user"),
    storage_errors.Forgotten: Problem(410, REQUEST, "forgotten", "user"),
    storage_errors.NotReplicated: Problem(503, SERVER, "not_replicated"),
    storage_errors.StoreUnavailable: Problem(503, SERVER, "store_unavailable"),
    storage_errors.StoreUnfit: Problem(503, SERVER, "store_unfit"),
    storage_errors.JournalFull: Problem(503, SERVER, "journal_full"),
    storage_errors.JournalFailed: Problem(503, SERVER, "journal_failed"),
    storage_errors.NoSuchSnapshot: Problem(404, REQUEST, "no_such_snapshot"),
    storage_errors.StoreNotEmpty: Problem(409, REQUEST, "store_not_empty"),
}
"""The nearest class of an error's ancestry counts. What is not here is our own fault and answers 500."""

UNEXPECTED = Problem(500, SERVER, "internal_error")


def problem_of(error: BaseException) -> Problem:
    """How `error` is answered."""
    for kind in type(error).__mro__:
        if kind in PROBLEMS:
            return PROBLEMS[kind]
    return UNEXPECTED


def error_body(error: BaseException, request_id: str = "") -> dict[str, object]:
    """The OpenAI error body. An unexpected error is logged under `request_id`, and tells nothing."""
    problem = problem_of(error)
    details = error.details if isinstance(error, TitanmemError) else {}
    if problem is UNEXPECTED:
        log.error("request %s failed", request_id, exc_info=error)
        message = f"The server had an error; its log has it under {request_id}." if request_id else ""
        return body_of(message or "The server had an error; its log says more.", problem)
    message = str(error) or ("It took too long." if isinstance(error, TimeoutError) else type(error).__name__)
    if isinstance(error, cluster_errors.BadRequest):
        code = details.get("code") or problem.code
        return body_of(message, problem, code=code, param=details.get("param"))
    if isinstance(error, storage_errors.InvalidName) and details.get("kind") in ("user", "tenant"):
        return body_of(message, problem, code=problem.code, param=details["kind"])
    return body_of(message, problem, code=problem.code or type(error).__name__, param=problem.param)


def body_of(
    message: str, problem: Problem, *, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    """An OpenAI error body from its parts."""
    code = code or problem.code
    return {"error": {"message": message, "type": problem.type, "param": param, "code": code}}


def error_response(error: BaseException, request_id: str = "") -> JSONResponse:
    """The whole answer to a request that failed, `Retry-After` included where trying again can help."""
    problem = problem_of(error)
    headers = {}
    if problem.status in RETRY_STATUSES:
        details = error.details if isinstance(error, TitanmemError) else {}
        wait_s = details.get("retry_after_s", cluster_errors.RETRY_AFTER_DEFAULT_S)
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if problem.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error_body(error, request_id), problem.status, headers)
