"""`POST /v1/chat/completions` and `GET /v1/models`: from a request to a `ChatCall`; `reply.py` answers it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from fastapi import APIRouter
from opentelemetry.trace import Span, SpanKind
from starlette.requests import Request
from starlette.responses import Response

from actors.messages import ChatCall, RenderedMessage
from cluster.bodies import read_json
from cluster.door import Door, door_of
from cluster.errors import BadRequest, UnknownModel
from cluster.openai import ROLES, ChatRequest, model_object, parse_chat
from cluster.reply import ChatResponse
from storage.errors import shorten
from storage.names import UserKey
from titanmem.tracing import context_of, context_with, failed, inject, tracer

router = APIRouter()
NO_USER = (
    "Whose memory? Name the user in the field `user` (or the header X-Titan-User): "
    "each user has a memory of their own."
)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions, for a model that remembers each user."""
    door, arrived_s = door_of(request), time.perf_counter()
    tenant = door.tenant(request)
    settings = door.settings
    body = await read_json(request, settings.body_bytes_max, settings.body_idle_s_max)
    chat = parse_chat(body, messages_max=settings.messages_max, tokens_max=settings.max_tokens_max)
    key = UserKey(tenant, _user(request, chat))
    if chat.model != settings.model:
        raise UnknownModel(chat.model, settings.model)
    span = _span(request, chat, door)
    try:
        call = await _call(door, request, chat, key, span)
    except BaseException as error:
        failed(span, error)
        span.end()
        raise
    return ChatResponse(door, call, chat, span, arrived_s)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    door = door_of(request)
    door.tenant(request)
    return {"object": "list", "data": [model_object(door.settings.model, request.app.state.created)]}


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """One model by name. Raises `UnknownModel`."""
    door = door_of(request)
    door.tenant(request)
    if model != door.settings.model:
        raise UnknownModel(model, door.settings.model)
    return model_object(model, request.app.state.created)


def _user(request: Request, chat: ChatRequest) -> str:
    header = request.headers.get("x-titan-user")
    if chat.user and header and chat.user != header:
        raise BadRequest("The field `user` and the header X-Titan-User name two different users.", "user")
    user = chat.user or header
    if not user:
        raise BadRequest(NO_USER, "user", "missing_required_parameter")
    return user


async def _call(door: Door, request: Request, chat: ChatRequest, key: UserKey, span: Span) -> ChatCall:
    settings, options = door.settings, chat.titan
    if options and options.mode and options.mode not in settings.modes:
        message = (
            f"titan.mode: {shorten(options.mode, 32)!r} is not served; "
            f"this server's model was trained for {', '.join(settings.modes)}."
        )
        raise BadRequest(message, "titan.mode", "unsupported_value")
    messages = [{"role": ROLES[m.role], "content": m.content} for m in chat.messages]
    # Tokenising four million characters takes seconds; other requests go on meanwhile.
    parts, prompt = await asyncio.to_thread(door.tokenizer.render, messages)
    name = door.new_id()
    return ChatCall(
        key=key,
        request_id=f"chatcmpl-{name}",
        update_id=door.idempotency_key(request) or f"chat-{name}",
        messages=tuple(
            RenderedMessage(role=p.role, tokens=p.tokens, prefix_hash=p.prefix_hash) for p in parts
        ),
        generation_prompt=prompt,
        conversation=(options.conversation if options else None) or "",
        max_tokens=chat.max_completion_tokens or chat.max_tokens or settings.max_tokens_default,
        temperature=settings.temperature_default if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        seed=chat.seed,
        stop=tuple(chat.stop or ()),
        memory=chat.access,
        mode=options.mode if options else None,
        trace=inject(context_with(span)),
    )


def _span(request: Request, chat: ChatRequest, door: Door) -> Span:
    """The span of one request, in the client's trace if it sent one; names as OpenTelemetry's for GenAI."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "titanmem",
        "gen_ai.request.model": chat.model,
        "gen_ai.output.type": "text",
        "titan.memory": chat.access,
        "titan.stream": bool(chat.stream),
    }
    for name in ("temperature", "top_p", "seed"):
        if getattr(chat, name) is not None:
            attributes[f"gen_ai.request.{name}"] = getattr(chat, name)
    if chat.titan and chat.titan.conversation:
        attributes["gen_ai.conversation.id"] = chat.titan.conversation
    if door.settings.trace_content:
        said = [{"role": m.role, "parts": [{"type": "text", "content": m.content}]} for m in chat.messages]
        attributes["gen_ai.input.messages"] = json.dumps(said, ensure_ascii=False)
    context = context_of(request.headers)
    return tracer().start_span("chat", context=context, kind=SpanKind.SERVER, attributes=attributes)
