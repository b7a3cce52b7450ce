"""What `u1` tells and is asked: the example's plain facts, spoken and read by the real `openai` client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = "titanmem-small"
ANSWER_TIMEOUT_S = 120.0
RIGHT_MIN = 15


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement, what is asked for it later, and the word that the answer must hold."""

    statement: str
    question: str
    value: str

    def known_in(self, answer: str) -> bool:
        return self.value.lower() in answer.lower()


VALUES = (
    "Biscuit",
    "turquoise",
    "48213",
    "Lisbon",
    "Oslo",
    "Mustard",
    "tulip",
    "7315",
    "lasagna",
    "drawer",
    "Amara",
    "90417",
    "Toronto",
    "autumn",
    "Ivanhoe",
    "wardrobe",
    "Comet",
    "mango",
    "Yusuf",
    "carpenter",
)
"""What the answer to each line of the example's questions must hold."""


def _lines(name: str) -> list[str]:
    return (EXAMPLES / name).read_text(encoding="utf-8").splitlines()


FACTS = tuple(
    Fact(statement, question, value)
    for statement, question, value in zip(_lines("facts.txt"), _lines("questions.txt"), VALUES, strict=True)
)
HIDDEN = (
    Fact("My neighbor's name is Orlando.", "What is my neighbor's name?", "Orlando"),
    Fact("The code for my alarm is 55172.", "What is the code for my alarm?", "55172"),
    Fact("My coach lives in Geneva.", "Where does my coach live?", "Geneva"),
)
"""What nobody says in chat: it stands between the chapters of the document that u1 reads."""
HIDDEN_RIGHT_MIN = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One answer: its text, our extension, and the tokens that it counts."""

    text: str
    titan: dict[str, Any]
    total_tokens: int


class Talk:
    """The `openai` client on one server; every message begins a conversation of its own."""

    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="any",
            max_retries=0,
            timeout=ANSWER_TIMEOUT_S,
        )

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def say(self, user: str, text: str, **more: Any) -> Said:
        """The whole answer at once."""
        answer: Any = self._client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], user=user, **more
        )
        choice = answer.choices[0]
        assert choice.finish_reason in ("stop", "length")
        return Said(text=choice.message.content, titan=answer.titan, total_tokens=answer.usage.total_tokens)

    def stream(self, user: str, text: str) -> Said:
        """The answer token by token, put together; our extension comes with the last ones."""
        chunks: list[Any] = list(
            self._client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": text}],
                user=user,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert len([piece for piece in pieces if piece]) > 1, "it came in one piece"
        last = chunks[-1]
        return Said(text="".join(pieces), titan=last.titan, total_tokens=last.usage.total_tokens)

    def tell(self, told: Mapping[str, Sequence[Fact]]) -> dict[str, list[Said]]:
        """Each user tells their facts, one a message, every other one streamed; the users talk at the same time."""
        return self._each(told, lambda n: self.stream if n % 2 else self.say, lambda fact: fact.statement)

    def ask(self, told: Mapping[str, Sequence[Fact]]) -> dict[str, list[Said]]:
        """Each user asks for facts, in the same order."""
        return self._each(told, lambda _: self.say, lambda fact: fact.question)

    def _each(self, told: Mapping[str, Sequence[Fact]], how: Any, words: Any) -> dict[str, list[Said]]:
        def talk(user: str) -> list[Said]:
            return [how(n)(user, words(fact)) for n, fact in enumerate(told[user])]

        with ThreadPoolExecutor(len(told)) as pool:
            return dict(zip(told, pool.map(talk, told), strict=True))


def right(facts: Sequence[Fact], answers: Sequence[Said]) -> list[Fact]:
    """The facts whose value stands in the answer to their question."""
    return [fact for fact, answer in zip(facts, answers, strict=True) if fact.known_in(answer.text)]


def shown(facts: Sequence[Fact], answers: Sequence[Said]) -> str:
    """Questions and answers, for a failure's message."""
    return "\n".join(f"{f.question} {a.text!r}" for f, a in zip(facts, answers, strict=True))
