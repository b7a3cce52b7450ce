"""The shipped phrase book is sound, and one that is not says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from titanmem.phrasebook import MADE, ME, Subject, another, capitalised, load, worded

VALUES = "city: Oslo, Graz\nrelation: sister\n"
TALK = """> Hi! || Hello!
lead: By the way,
tail: Fine.
ask: Tell me:
asktail: Thanks.
ack: Okay.
filler: It rained.
"""
HOME = "@ home | about: me, relation | value: city\n= {S} [live|lives] in {v}.\n? Where [do|does] {S} live?\n"


def book(folder: Path, text: str, values: str = VALUES, talk: str = TALK) -> Path:
    for name, content in (("people", text), ("values", values), ("talk", talk)):
        (folder / f"{name}.txt").write_text(content)
    return folder


def test_the_shipped_book_has_many_ways_to_say_a_thing():
    found = load()
    assert len(found.attributes) > 1500
    assert all(len(a.statements) >= 4 and len(a.questions) >= 4 for a in found.attributes)
    assert sum(len(a.corrections) for a in found.attributes) > 500
    assert all(kind in MADE or len(found.values[kind]) >= 4 for a in found.attributes for kind in a.kinds)
    questions = [question for a in found.attributes for question in a.questions if "{k}" not in question]
    assert len(questions) == len(set(questions)), "a question says what it asks for"
    assert len(found.talk.pairs) > 100
    assert not any("{" in text for text in (*found.talk.leads, *found.talk.tails, *found.talk.fillers))


def test_a_pattern_is_worded_for_its_subject():
    pattern = "{S's} {k} is where {S} [keep|keeps] {v}, ask {O}."
    assert worded(pattern, ME, "box") == "my box is where I keep {v}, ask me."
    assert worded(pattern, another("Anna"), "box") == "Anna's box is where Anna keeps {v}, ask Anna."
    assert another("my boss") == Subject("my boss", "my boss'", "my boss")
    assert capitalised(worded("{S} [am|is] here.", another("my dog"))) == "My dog is here."


def test_a_correction_may_name_the_value_it_replaces(tmp_path):
    folder = book(tmp_path, HOME + "~ {S} left {old} for {v}.\n~ Now {S} [am|is] in {v}.\n")
    (home,) = load(folder).attributes
    assert home.corrections == ["{S} left {old} for {v}.", "Now {S} [am|is] in {v}."]
    for wrong in (
        "= {S} left {old} for {v}.\n",
        "~ {S} left {old} and {old} for {v}.\n",
        "~ {S} left {old}.\n",
    ):
        with pytest.raises(ValueError, match=r"people\.txt:4"):
            load(book(tmp_path, HOME + wrong))


def test_values_lie_in_any_file_that_says_so(tmp_path):
    (book(tmp_path, HOME) / "values-more.txt").write_text("city: Ulm\n")
    assert "Ulm" in load(tmp_path).values["city"]


def test_an_attribute_may_go_on_in_another_file(tmp_path):
    folder = book(tmp_path, HOME)
    (folder / "zoo.txt").write_text(HOME.replace("[live|lives] in", "[am|is] at home in"))
    (home,) = load(folder).attributes
    assert (len(home.statements), len(home.questions)) == (2, 1), "what is there already is not added again"
    (folder / "zoo.txt").write_text(HOME.replace("me, relation", "me"))
    with pytest.raises(ValueError, match=r"zoo\.txt: attribute 'home' is about others elsewhere"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HOME.replace("value: city", "value: town"), r"people\.txt:1: attribute 'home'.*unknown kinds \['town'\]"),
        (HOME.replace("about: me,", "about: us,"), r"people\.txt:1"),
        (HOME + "= {S} [live|lives] there.\n", r"people\.txt:4: a statement holds \{v\} once"),
        (HOME + "? Is {v} where {S} [live|lives]?\n", r"people\.txt:4: a statement holds \{v\} once"),
        (HOME + "= home is {v}.\n", r"people\.txt:4: says nothing of its subject"),
        (HOME + "= {S} [live in {v}.\n", r"people\.txt:4: a bracket is left over"),
        (HOME + "= {S} {k} in {v}.\n", r"people\.txt:4: \{k\} belongs to attributes with a key"),
        (HOME + "! what\n", r"people\.txt:4: expected @, =, ~ or \?"),
        ("= {S} in {v}.\n", r"people\.txt:1: expected @"),
        ("@ home | about: me | value: city\n", "'home' lacks statements or questions"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        load(book(tmp_path, text))


def test_wrong_values_and_talk_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"values\.txt:2"):
        load(book(tmp_path, HOME, values="relation: sister\nOslo, Graz\n"))
    with pytest.raises(ValueError, match=r"talk\.txt:1"):
        load(book(tmp_path, HOME, talk="> Hi!\n"))
    with pytest.raises(ValueError, match=r"talk\.txt:1: expected >, lead:"):
        load(book(tmp_path, HOME, talk="say: Hi!\n"))
