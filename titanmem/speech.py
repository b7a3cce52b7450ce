"""How one model writes a conversation: what stands around a message, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from titanmem.tokenizer import ChatTokenizer

ANSWER, UNKNOWN = "It is", " not known to me."
"""How a reply of our own model begins, and how it goes on when nobody told the fact. One beginning for all: what the
memory is asked for then depends on the question, and not on words that a small model may choose wrongly."""
SPACES = ("Ġ", "▁")
"""What a vocabulary writes for a space before a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speech:
    """Token ids that frame messages, and how text becomes ids."""

    ids: Callable[[str], list[int]]
    """Ids of text that other text or a control token stands before."""
    user: Sequence[int]
    ended: Sequence[int]
    assistant: Sequence[int]
    """Before a message of the user, after it, and between it and the reply."""
    replied: Sequence[int]
    """After a reply."""
    spaced: Mapping[int, int]
    """From a token that begins a text to the same behind a space."""
    lead: str = ""
    """What a message begins with: a space, where the template has one that its first word's token takes in."""
    answers: Sequence[str] = (ANSWER,)
    """How replies begin before the value."""

    @classmethod
    def own(cls, tokenizer: Tokenizer) -> Speech:
        """That of the models that `titanmem train` makes. Raises ValueError for a tokenizer without their tokens."""
        marks = {}
        for name in ("<|user|>", "<|end|>", "<|assistant|>"):
            index = tokenizer.token_to_id(name)
            if index is None:
                raise ValueError(f"the tokenizer has no token {name}")
            marks[name] = [index]
        return cls(
            ids=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            user=marks["<|user|>"],
            ended=marks["<|end|>"],
            assistant=marks["<|assistant|>"],
            replied=marks["<|end|>"],
            spaced=spaced(tokenizer.get_vocab()),
        )

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> Speech:
        """That of another maker's checkpoint, by its chat template. Its replies begin as they like: some of the
        answers that a memory is trained with are the bare value. Raises ChatTemplateError for a template that cannot
        be taken apart."""
        before, after, prompt = tokenizer.around_a_message()

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, inside=True).tolist() if text else []

        lead = " " if before.endswith(" ") else ""
        return cls(
            ids=ids,
            user=tokenizer.encode_template(before.removesuffix(" ")),
            ended=tokenizer.encode_template(after),
            assistant=tokenizer.encode_template(prompt),
            replied=[min(tokenizer.stop_ids)],
            spaced=spaced(tokenizer.vocabulary),
            lead=lead,
            answers=("", "", ANSWER, "It's"),
        )


def spaced(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """From a token at the very start of a text to the same behind a space."""
    return {
        index: vocabulary[space + word]
        for word, index in vocabulary.items()
        for space in SPACES
        if space + word in vocabulary
    }
