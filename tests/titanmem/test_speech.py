"""Messages of training stand as the model's own template writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.tiny_model import TEXT, tiny_folder
from titanmem.corpus import train_tokenizer
from titanmem.errors import ChatTemplateError
from titanmem.speech import Speech
from titanmem.tokenizer import ChatTokenizer

PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTROLLED = (
    "<|system|>Be kind.<|end|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [PLAIN, CONTROLLED])
def test_a_message_has_the_ids_of_the_template(tmp_path: Path, template: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = ChatTokenizer(folder)
    speech = Speech.of(tokenizer)
    for text in ("My dog's name is Rex4.", "Rex7 is my dog."):
        (part,), prompt = tokenizer.render([{"role": "user", "content": text}])
        told = [*speech.user, *speech.ids(speech.lead + text), *speech.ended]
        assert told == part.tokens.tolist()
        assert [*speech.assistant] == prompt.tolist()
    assert speech.replied == [0]


def test_our_own_models_have_a_message_between_their_marks(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    own = Speech.own(Tokenizer.from_file(str(folder / "tokenizer.json")))
    (part,), prompt = ChatTokenizer(folder).render([{"role": "user", "content": "Rex3?"}])
    assert [*own.user, *own.ids("Rex3?"), *own.ended] == part.tokens.tolist()
    assert [*own.assistant] == prompt.tolist()
    assert own.ids("times")[0] != own.ids(" times")[0]


def test_a_tokenizer_without_the_marks_is_none_of_ours() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(ValueError, match=r"no token <\|user\|>"):
        Speech.own(tokenizer)


def test_a_template_that_rewrites_messages_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | length }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="does not write a message as it is"):
        Speech.of(ChatTokenizer(folder))


def test_words_behind_a_space_are_found_in_both_spellings() -> None:
    tokenizer = train_tokenizer(TEXT, 400)
    vocabulary = tokenizer.get_vocab()
    spaced = Speech.own(tokenizer).spaced
    assert spaced[vocabulary["t"]] == vocabulary["Ġt"]
