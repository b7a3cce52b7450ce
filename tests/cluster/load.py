"""A steady load through the HTTP door: each user asks and reads in turn, and every answer is written down.

An update that is asked for again has the same `Idempotency-Key`, so what became of each is known in the end.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

THINK_S = (0.05, 0.25)
ANSWER_TIMEOUT_S = 120.0
CHAT_TOKENS = 4
TRIES_MAX = 100
TEXT = "The parcel {n} of {user} is on its way to {place}, and it was sent on a {day}. "
PLACES = ("Lisbon", "Oslo", "Graz", "Turku", "Bern", "Porto", "Ghent", "Lviv")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request and what became of it. `error` is empty when it was answered as it should be."""

    user: str
    kind: str
    began: float
    ended: float
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(kw_only=True)
class Load:
    """Users of one cluster. All times are `time.monotonic()`."""

    url: str
    model: str
    seed: int
    answers: list[Answer] = field(default_factory=list)
    acknowledged: dict[str, list[str]] = field(default_factory=dict)
    """User -> names of the updates that were acknowledged."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        self._client = httpx.AsyncClient(
            base_url=self.url, timeout=ANSWER_TIMEOUT_S, limits=limits, trust_env=False
        )

    # -- one request ---------------------------------------------------------------------------------

    async def chat(self, user: str, kind: str = "chat") -> Answer:
        """One short reply, memory read and written."""
        message = {"role": "user", "content": f"Where is the parcel of {user}?"}
        body = {"model": self.model, "user": user, "messages": [message], "max_tokens": CHAT_TOKENS}
        return await self._ask(user, kind, "/v1/chat/completions", json=body)

    async def ingest(self, user: str, name: str) -> Answer:
        """One sentence to remember, under its name; again and again until it is acknowledged."""
        rng = random.Random(f"{self.seed} {name}")
        text = TEXT.format(n=name, user=user, place=rng.choice(PLACES), day=rng.choice(DAYS))
        path, headers = f"/v1/memories/{user}/ingest", {"Idempotency-Key": name}
        answer = await self._ask(user, "ingest", path, content=text, headers=headers)
        if not answer.error:
            self.acknowledged.setdefault(user, []).append(name)
        return answer

    async def until_answered(self, user: str) -> float:
        """Asks until there is a good answer; when that was."""
        for _ in range(TRIES_MAX):
            answer = await self.chat(user, "probe")
            if not answer.error:
                return answer.ended
            await asyncio.sleep(0.02)
        raise AssertionError(f"{user} has no answer: {answer.error}")

    async def _ask(self, user: str, kind: str, path: str, **body: object) -> Answer:
        began, error = time.monotonic(), ""
        try:
            answer = await self._client.post(path, **body)  # pyright: ignore[reportArgumentType]
            if answer.status_code != 200:
                error = f"{answer.status_code} {_code(answer)}"
        except httpx.HTTPError as caught:
            error = type(caught).__name__
        done = Answer(user=user, kind=kind, began=began, ended=time.monotonic(), error=error)
        self.answers.append(done)
        return done

    async def get(self, path: str) -> httpx.Response:
        return await self._client.get(path)

    # -- all of it -----------------------------------------------------------------------------------

    async def shard_of(self, user: str) -> str:
        """Where the user lives, once something was told."""
        assert not (await self.ingest(user, f"{user}-first")).error
        return (await self.get(f"/v1/memories/{user}")).json()["shard"]

    async def users_by_shard(self, names: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for user in names:
            found.setdefault(await self.shard_of(user), []).append(user)
        return found

    def start(self, users: list[str]) -> None:
        self._tasks = [asyncio.create_task(self._live(user)) for user in users]

    async def stop(self) -> None:
        """Ends the load; what is on its way is waited for."""
        for task in self._tasks:
            task.set_name("stop")
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        await self._client.aclose()

    async def _live(self, user: str) -> None:
        rng, n = random.Random(f"{self.seed} {user}"), 0
        task = asyncio.current_task()
        assert task is not None
        while task.get_name() != "stop":
            n += 1
            if n % 2:
                await self.chat(user)
            else:
                for _ in range(TRIES_MAX):
                    if not (await self.ingest(user, f"{user}-{n}")).error:
                        break
                    await asyncio.sleep(0.1)
            await asyncio.sleep(rng.uniform(*THINK_S))

    # -- what is left --------------------------------------------------------------------------------

    def errors_during(
        self, outages: list[tuple[str, float, float]], users: dict[str, list[str]]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Errors by kind and code: of users whose shard was away while they asked, and all others.

        `outages` are (shard, from, to), `users` those of each shard.
        """
        own, others = Counter[str](), Counter[str]()
        for answer in self.answers:
            away = any(
                answer.user in users[shard] and answer.began < ended and answer.ended > began
                for shard, began, ended in outages
            )
            if answer.error:
                (own if away else others)[f"{answer.kind}: {answer.error}"] += 1
        return dict(own), dict(others)

    async def lost(self) -> list[str]:
        """Acknowledged updates that the cluster does not know: each, asked for again, must be a duplicate."""
        missing = []
        for user, names in self.acknowledged.items():
            for name in names:
                headers = {"Idempotency-Key": name}
                path = f"/v1/memories/{user}/ingest"
                answer = await self._client.post(path, content="Once more.", headers=headers)
                if answer.status_code != 200 or answer.json()["duplicates"] != 1:
                    missing.append(name)
        return missing


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))] if ordered else 0.0


def table(values: list[float]) -> dict[str, float]:
    """Seconds: how many there are, p50, p99, the longest."""
    return {
        "n": len(values),
        "p50_s": round(percentile(values, 0.5), 3),
        "p99_s": round(percentile(values, 0.99), 3),
        "max_s": round(max(values, default=0.0), 3),
    }


def _code(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:80]
