"""Chat templates: from messages to the text of a prompt, and where in that text each message begins and ends.

Rendered as Hugging Face does: jinja2's immutable sandbox, blocks trimmed, `raise_exception`, `strftime_now`.
A model's own words around a message (`<|user|>`, `<|end|>`) are its control tokens; text of a user that looks
the same must stay text. So every literal of a control token inside a message is broken by `MARK` before it is
rendered, whatever the template does with it, and the tokenizer takes the marks out after it has found the
template's own literals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from storage.errors import shorten
from titanmem.errors import ChatTemplateError

DEFAULT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Our own models' template. A message begins with a control token, so messages are tokenised one by one."""

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For a checkpoint that was never taught to chat and has no template. Its replies end where `max_tokens` or the
request's `stop` (say, `\\nUser:`) says, or at its end-of-sequence token."""

MARK = "\ufdd0"
"""A Unicode noncharacter: never part of interchanged text; one that comes all the same turns into U+FFFD."""

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text, cut at the messages' ends; still holding the marks."""

    parts: tuple[str, ...]
    """What each message adds; the parts together are the whole prompt."""
    generation_prompt: str
    """What stands between the last message and the assistant's reply."""


class ChatTemplate:
    """One compiled template of a model.

    `controls` are the control tokens' literals. Raises ChatTemplateError if the source does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        controls: Collection[str],
        variables: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self._variables = dict(variables)
        # A literal of one character cannot be broken by a mark, and no template needs one.
        literals = sorted((re.escape(c) for c in controls if len(c) > 1), key=len, reverse=True)
        self._literal_chars_max = max((len(c) for c in controls), default=0)
        self.controls = re.compile("|".join(literals) or r"(?!)")
        self._starts = re.compile(f"(?={self.controls.pattern})")
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {shorten(str(error))}") from error

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The prompt of a conversation. Raises ChatTemplateError if the template refuses it."""
        if not messages:
            raise ChatTemplateError("a conversation needs at least one message")
        shielded = [{"role": m["role"], "content": self._shield(m["content"])} for m in messages]
        whole = self._text(shielded)
        parts = self._one_by_one(shielded, whole) or self._growing(shielded, whole)
        prompted = self._text(shielded, add_generation_prompt=True)
        return Rendered(parts, prompted[self._shared(prompted, whole) :])

    def _one_by_one(self, messages: Sequence[Message], whole: str) -> tuple[str, ...]:
        """The parts when the whole is no more than its messages one after the other, as in ours; else ()."""
        try:
            parts = tuple(self._text([message]) for message in messages)
        except ChatTemplateError:
            return ()
        return parts if "".join(parts) == whole else ()

    def _growing(self, messages: Sequence[Message], whole: str) -> tuple[str, ...]:
        """Cuts the whole where the prompts of its first 1, 2, 3, … messages part from it.

        A template may refuse a conversation's beginning, or write an old message otherwise than a new one;
        then that text counts to the next message, so that the parts always make up the whole prompt.
        """
        cuts = [0]
        for count in range(1, len(messages)):
            try:
                cuts.append(max(cuts[-1], self._shared(whole, self._text(messages[:count]))))
            except ChatTemplateError:
                cuts.append(cuts[-1])
        cuts.append(len(whole))
        return tuple(whole[a:b] for a, b in pairwise(cuts))

    def _shared(self, text: str, other: str) -> int:
        """How many characters both begin with, never ending inside a control token's literal of `text`."""
        end = _common(text, other)
        for match in self.controls.finditer(text, max(0, end - self._literal_chars_max)):
            if match.start() >= end:
                break
            if match.end() > end:
                return match.start()
        return end

    def _shield(self, content: str) -> str:
        content = content.replace(MARK, "\ufffd")
        pieces, last = [], 0
        for match in self._starts.finditer(content):
            pieces += [content[last : match.start() + 1], MARK]
            last = match.start() + 1
        return "".join(pieces) + content[last:]

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ChatTemplateError(
                f"this model's chat template refuses the messages: {shorten(str(error))}"
            ) from error


def _common(text: str, other: str) -> int:
    """How many characters both begin with; by halving, since comparing slices is a memcmp."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
