"""Text to token ids and back: one model's tokenizer and chat template, read from its folder.

| file | what is taken |
| --- | --- |
| `tokenizer.json` | the tokenizer (the `tokenizers` library) |
| `tokenizer_config.json` | `bos_token`, `eos_token`, `chat_template` |
| `chat_template.jinja` | the template; wins over the one in `tokenizer_config.json` |
| `generation_config.json` | `eos_token_id`, one or several; where it says nothing, the one of `config.json` counts |

A checkpoint of another maker that has no template gets a plain one (`PLAIN_TEMPLATE`), which is said at the start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram

from storage.errors import shorten
from titanmem.chat_template import DEFAULT_TEMPLATE, MARK, PLAIN_TEMPLATE, ChatTemplate, Message
from titanmem.errors import ChatTemplateError, ModelFolderError
from titanmem.huggingface import FAMILIES

ROLES = ("system", "user", "assistant")
END = "<|end|>"
HELD_TOKENS_MAX = 3
"""Tokens that may wait for the rest of their character: four bytes at most, one or more each."""
REPLACEMENT = "\ufffd"
CACHED_WORDS = 100_000
"""Words whose ids the library keeps, some 10 MB; its own 10,000 are fewer than a long book has."""
BLOCK_CHARS = 16384
"""Text given to the library at once, characters. It needs some 300 bytes a character: 4 MiB took 1.2 GB."""
_MESSAGE = "\ue000"
"""A character of the private use area: stands for a message in a template."""


def block_end(text: str, start: int = 0, chars_max: int = BLOCK_CHARS) -> int:
    """Where the block that begins at `start` ends: at most `chars_max` on, and where no token crosses.

    That is before a single space between two words: pre-tokenizers give the space to the word after it.
    Text without one is cut at any whitespace, else at `chars_max`; then ids may not be those of the whole
    text, but are the same every time.
    """
    limit = start + chars_max
    if len(text) <= limit:
        return len(text)
    at = limit
    while (at := text.rfind(" ", start + 1, at)) > 0:
        if not (text[at - 1].isspace() or text[at + 1].isspace()):
            return at
    return next((index for index in range(limit, start, -1) if text[index].isspace()), limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageTokens:
    """One message of a rendered conversation; the door hands it on as `actors.messages.RenderedMessage`."""

    role: str
    tokens: np.ndarray
    """int32 [n]: the ids that this message adds to the prompt."""
    prefix_hash: int
    """uint64: `prefix_hash` of the conversation up to and with this message."""


def prefix_hash(before: int, role: str, content: str) -> int:
    """uint64: hash of a conversation after one more message, chained xxh3_64; `before` is 0 for the first."""
    data = before.to_bytes(8, "little") + role.encode() + b"\0" + content.encode()
    return xxhash.xxh3_64_intdigest(data)


class ChatTokenizer:
    """The tokenizer of one model's folder. Raises ModelFolderError naming folder and file.

    Safe to use from several threads at once: nothing changes after it was made.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._tokenizer = load_tokenizer(self.folder)
        self._inner = _inner_tokenizer(self._tokenizer)
        """For text that is not the beginning of a prompt or document."""
        config = _load_json(self.folder, "tokenizer_config.json")
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = {token.content: index for index, token in added.items() if token.special}
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.stop_ids = self._find_stop_ids()
        self.vocab_size = self._tokenizer.get_vocab_size()
        template = _load_template(self.folder, config)
        self.has_plain_template = template is PLAIN_TEMPLATE
        """Whether the folder has no template of its own."""
        try:
            self._template = ChatTemplate(
                template,
                controls=self._controls,
                variables={"bos_token": self.bos_token, "eos_token": self.eos_token},
            )
        except ChatTemplateError as error:
            raise ModelFolderError(f"{self.folder}: {error}") from error

    def encode(self, text: str, *, inside: bool = False) -> np.ndarray:
        """int32 [n]: ids of plain text of any length. What looks like a control token stays text.

        With `inside`, other text or a control token stands before it.
        """
        pieces, start = [], 0
        while True:
            end = block_end(text, start)
            tokenizer = self._inner if inside or start else self._tokenizer
            # The fast way leaves out where each token stood in the text.
            (block,) = tokenizer.encode_batch_fast([text[start:end]], add_special_tokens=False)
            pieces.append(np.array(block.ids, dtype=np.int32))
            if end == len(text):
                return np.concatenate(pieces)
            start = end

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of `ids`, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def render(self, messages: Sequence[Message]) -> tuple[tuple[MessageTokens, ...], np.ndarray]:
        """A conversation as token ids: what each message adds to the prompt, and what precedes the reply.

        Messages are mappings of `role` and `content`. Raises ChatTemplateError if the template refuses them.
        """
        rendered = self._template.render(messages)
        parts, digest, inside = [], 0, False
        for message, text in zip(messages, rendered.parts, strict=True):
            digest = prefix_hash(digest, message["role"], message["content"])
            tokens = self._encode_rendered(text, inside)
            parts.append(MessageTokens(role=message["role"], tokens=tokens, prefix_hash=digest))
            inside = inside or bool(text)
        return tuple(parts), self._encode_rendered(rendered.generation_prompt, inside)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token → id."""
        return self._tokenizer.get_vocab()

    def around_a_message(self) -> tuple[str, str, str]:
        """What the template writes before a user's first message, after it, and before the reply."""
        rendered = self._template.render([{"role": "user", "content": _MESSAGE}])
        before, found, after = rendered.parts[0].partition(_MESSAGE)
        if not found:
            raise ChatTemplateError("the chat template does not write a message as it is")
        return before, after, rendered.generation_prompt

    def encode_template(self, text: str) -> list[int]:
        """Ids of what a template writes, control tokens by their literals."""
        return self._encode_rendered(text, inside=False).tolist() if text else []

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one reply, fed with its ids as they come."""
        return StreamDecoder(self)

    def _encode_rendered(self, text: str, inside: bool) -> np.ndarray:
        """int32 [n]: the template's control tokens by their literals, all between them as plain text."""
        pieces, last = [np.empty(0, np.int32)], 0
        for match in self._template.controls.finditer(text):
            before = text[last : match.start()].replace(MARK, "")
            pieces.append(self.encode(before, inside=inside or last > 0))
            pieces.append(np.array([self._controls[match.group()]], dtype=np.int32))
            last = match.end()
        pieces.append(self.encode(text[last:].replace(MARK, ""), inside=inside or last > 0))
        return np.concatenate(pieces)

    def _find_stop_ids(self) -> frozenset[int]:
        """Ids that end a reply: of `generation_config.json`, else `config.json`, and the end-of-sequence token."""
        files = (
            _load_json(self.folder, name, optional=True) for name in ("generation_config.json", "config.json")
        )
        found = next((ids for file in files if (ids := file.get("eos_token_id")) is not None), None)
        ids = set(found if isinstance(found, list) else [] if found is None else [found])
        eos = self._tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        ids |= set() if eos is None else {eos}
        if not ids:
            raise ModelFolderError(
                f"{self.folder}: neither generation_config.json (eos_token_id) nor tokenizer_config.json "
                f"(eos_token) names a token of tokenizer.json that ends a reply"
            )
        if not all(type(index) is int and index >= 0 for index in ids):
            raise ModelFolderError(
                f"{self.folder / 'generation_config.json'}: eos_token_id must be token ids"
            )
        return frozenset(ids)


class StreamDecoder:
    """Turns the ids of one reply into text as they come, never giving out half a character.

    A character of UTF-8 may be spread over several tokens, and a tokenizer may write the first word of a text
    otherwise than the same word later; so each step decodes the last finished ids and the new ones together,
    and ids whose text ends in U+FFFD (an unfinished character) wait for the next, `HELD_TOKENS_MAX` at most.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._done: list[int] = []
        """Ids whose text has been given out, the last ones only: context for the next."""
        self._waiting: list[int] = []

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; may be empty."""
        self._waiting += [int(index) for index in ids]
        for held in range(min(HELD_TOKENS_MAX, len(self._waiting)) + 1):
            ready = len(self._waiting) - held
            text = self._text_of(ready)
            if not text.endswith(REPLACEMENT):
                break
        return self._give(ready, text)

    def flush(self) -> str:
        """What still waits, at the reply's end: an unfinished character becomes U+FFFD."""
        return self._give(len(self._waiting), self._text_of(len(self._waiting)))

    def _text_of(self, ready: int) -> str:
        before = self._tokenizer.decode(self._done)
        return self._tokenizer.decode(self._done + self._waiting[:ready])[len(before) :]

    def _give(self, ready: int, text: str) -> str:
        if text:
            self._done, self._waiting = self._waiting[:ready], self._waiting[ready:]
        return text


def write_chat_files(folder: Path) -> None:
    """Writes what belongs beside a `tokenizer.json` with our own roles: configuration and chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(DEFAULT_TEMPLATE, "utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The library's tokenizer of a folder. Raises ModelFolderError naming folder and file."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelFolderError(f"{folder}: tokenizer.json is missing") from error
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises bare Exception for a file that it cannot use
        raise ModelFolderError(f"{path}: no usable tokenizer: {shorten(str(error))}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _prepared(tokenizer)


def _inner_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same, but for the space that tokenizers of sentencepiece put before the first word of a text."""
    document = json.loads(tokenizer.to_str())
    top = document.get("pre_tokenizer") or {}
    steps = [step for step in (top, *top.get("pretokenizers", [])) if step.get("prepend_scheme") == "first"]
    if not steps:
        return tokenizer
    for step in steps:
        step["prepend_scheme"] = "never"
    return _prepared(Tokenizer.from_str(json.dumps(document)))


def _prepared(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, BPE | Unigram):
        tokenizer.model._resize_cache(CACHED_WORDS)
    return tokenizer


def _load_json(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    path = folder / name
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise ModelFolderError(f"{folder}: {name} is missing") from error
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFolderError(f"{path}: not JSON: {shorten(str(error))}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: must hold one JSON object")
    return value


def _load_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path}: cannot be read: {shorten(str(error))}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones, as Hugging Face allows
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if template is None and _load_json(folder, "config.json", optional=True).get("model_type") in FAMILIES:
        return PLAIN_TEMPLATE
    if not isinstance(template, str):
        raise ModelFolderError(
            f"{folder}: chat_template.jinja is missing, and tokenizer_config.json holds no chat_template"
        )
    return template


def _token_text(token: Any) -> str:
    """A token of `tokenizer_config.json`, which writes it as text or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
