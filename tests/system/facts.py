"""What `u1` tells and is asked: the example's plain facts, spoken and read by the real `openai` client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

FACTS_FILE = Path(__file__).resolve().parents[2] / "examples" / "facts.txt"
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


FACTS = (
    Fact("My dog's name is Biscuit.", "What is my dog's name?", "Biscuit"),
    Fact("My sister's favorite color is turquoise.", "What is my sister's favorite color?", "turquoise"),
    Fact("The code for my garage is 48213.", "What is the code for my garage?", "48213"),
    Fact("I live in Lisbon.", "Where do I live?", "Lisbon"),
    Fact("My brother lives in Oslo.", "Where does my brother live?", "Oslo"),
    Fact("My cat is called Mustard.", "What is my cat called?", "Mustard"),
    Fact("My favorite flower is the tulip.", "What is my favorite flower?", "tulip"),
    Fact("My locker number is 7315.", "What is my locker number?", "7315"),
    Fact("My boss's favorite dish is lasagna.", "What is my boss's favorite dish?", "lasagna"),
    Fact("I left my passport in the drawer.", "Where did I leave my passport?", "drawer"),
    Fact("My doctor's name is Amara.", "What is my doctor's name?", "Amara"),
    Fact("My phone code is 90417.", "What is my phone code?", "90417"),
    Fact("My uncle moved to Toronto.", "Where does my uncle live?", "Toronto"),
    Fact("My favorite season is autumn.", "What is my favorite season?", "autumn"),
    Fact("My teacher's favorite book is Ivanhoe.", "What is my teacher's favorite book?", "Ivanhoe"),
    Fact("My umbrella is in the wardrobe.", "Where is my umbrella?", "wardrobe"),
    Fact("My horse is called Comet.", "What is my horse called?", "Comet"),
    Fact("My daughter's favorite fruit is mango.", "What is my daughter's favorite fruit?", "mango"),
    Fact("My friend's name is Yusuf.", "What is my friend's name?", "Yusuf"),
    Fact("My job is carpenter.", "What is my job?", "carpenter"),
)


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
