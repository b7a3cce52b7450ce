"""Every knob has a range, every wrong value is named, and every refused combination says why."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from titanmem.spec import CHOICES, FLAGS, RANGES, MemorySpec


def spec_of(knobs: dict[str, Any]) -> MemorySpec:
    return MemorySpec(**knobs)


def test_every_knob_is_checked():
    known = {field.name for field in fields(MemorySpec)}
    assert known == RANGES.keys() | CHOICES.keys() | set(FLAGS) | {"written_layers"}


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_named(name):
    low, high = RANGES[name]
    for wrong in (low - 1, high + 1, "1", None, True, float("nan")):
        with pytest.raises(ValueError, match=f"memory.{name} = .*must be a number from"):
            spec_of({name: wrong})


@pytest.mark.parametrize("name", [*CHOICES, *FLAGS, "written_layers"])
def test_an_unknown_word_is_named(name):
    with pytest.raises(ValueError, match=f"memory.{name} = 'other': must be"):
        spec_of({name: "other"})


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"chunk_size": 512, "window": 256}, "chunk_size = 512: must be at most window = 256"),
        ({"rule": "titans", "written_layers": "last"}, "the rule titans writes all layers"),
        ({"retention": "norm"}, "rescales elements that a sparse update did not select"),
        ({"bias": "huber"}, "sparse codes are written by the delta rule"),
        ({"depth": 2}, "with written_layers = last there are always 3"),
        ({"code_width": 64, "code_active": 64}, "must be below code_width"),
        ({"code_active": 200}, "one token touches 200"),
        ({"rule": "titans", "bias": "dot"}, "never vanishes"),
        ({"rule": "titans", "bias": "lp"}, "overshoots"),
    ],
)
def test_a_combination_that_can_not_work_says_why(knobs: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        spec_of(knobs)


def test_the_shapes_that_a_spec_stands_for():
    deep = MemorySpec(rule="titans", d_nltm=512, depth=3)
    assert deep.writes_all
    assert deep.layer_shapes == [(512, 512)] * 3
    assert deep.parameters == 786_432
    assert MemorySpec(rule="titans", d_nltm=64, depth=2, expansion=4).layer_shapes == [(256, 64), (64, 256)]
    served = MemorySpec()
    assert not served.writes_all
    assert served.parameters == 1_048_576
    assert served.tokens_per_update * served.code_active <= served.top_k_ratio * served.code_width
    assert MemorySpec(written_layers="all").writes_all


def test_a_spec_survives_its_own_document():
    spec = MemorySpec(rule="titans", bias="huber", residual=True)
    assert MemorySpec().overridden(spec.to_dict()) == spec
    with pytest.raises(ValueError, match=r"memory.speed: unknown; the knobs are bias, bounded"):
        spec.overridden({"speed": 3})
