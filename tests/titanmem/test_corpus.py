"""The tokenizer that a training run makes."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from titanmem.corpus import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    numbers = [f"The code is {n}, {n:03}{n:03}{n % 100:02}{n:03}{n % 10}." for n in range(1000)]
    return train_tokenizer(numbers * 2, 3000)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("is 8411645.", ["is", "Ġ841", "164", "5", "."]),
        ("156 dollars", ["156"]),
        ("555-1234", ["555", "-", "123", "4"]),
        ("at 14:05", ["Ġ14", ":", "05"]),
        ("room 7", ["Ġ7"]),
        ("12 34", ["12", "Ġ34"]),
    ],
)
def test_digits_come_in_threes_from_the_front_with_the_space_before_them(tokenizer, text, pieces):
    found = [piece for piece in tokenizer.encode(text).tokens if any(c.isdigit() for c in piece)]
    assert found == [piece for piece in pieces if any(c.isdigit() for c in piece)]


@pytest.mark.parametrize("text", ["8411645", "a  12", "١٢٣٤ 中文 5", " 1", "\n12\n", "x1y22z333w4444"])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
