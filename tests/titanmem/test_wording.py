"""Spellings, and sums of words: the same from any start, without values, and alike where words are alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from titanmem.lookahead import WIDTH
from titanmem.wording import Wording, spaced, spellings

VOCABULARY = {"Rex": 0, "Ġrex": 1, "ĠREX": 2, "▁rex": 3, "dog": 4, "Ġ": 5, "Ġdogs": 6}


def test_spellings_leave_case_and_space_aside():
    spelled = spellings(VOCABULARY, 9)
    assert len(set(spelled[:4].tolist())) == 1
    assert len(set(spelled.tolist())) == 6, "a space and a token without a name are like no other"
    assert bool((spelled > 0).all()), "0 says that nothing is recited"
    assert torch.equal(spelled, spellings(VOCABULARY, 9))


def test_a_token_at_the_start_of_a_text_has_its_like_behind_a_space():
    assert spaced({"dog": 4, "Ġdog": 7, "cat": 1, "▁cat": 9, "x": 3}) == {4: 7, 1: 9}


def wording() -> Wording:
    torch.manual_seed(0)
    module = Wording(12, 120, 64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.requires_grad_(False)


def test_words_asked_in_are_summed_up_the_same_in_steps_of_any_size():
    module, generator = wording(), torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 40, 12, generator=generator)
    spelled = torch.randint(1, 9, (2, 40), generator=generator)
    whole, _ = module.asked(hidden, spelled, spelled, torch.zeros(2, 64))
    before, parts = torch.zeros(2, 64), []
    for start, end in ((0, 1), (1, 17), (17, 18), (18, 40)):
        part, sums = module.asked(hidden[:, start:end], spelled[:, start:end], spelled[:, start:end], before)
        before = sums[:, -1]
        parts.append(part)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5
    assert (whole.norm(dim=-1) - 1).abs().max() < 1e-4


def test_values_and_padding_do_not_count_among_the_words_of_a_statement():
    module, generator = wording(), torch.Generator().manual_seed(1)
    around = torch.randn(1, 20, WIDTH, generator=generator)
    spelled = torch.randint(1, 9, (1, 20), generator=generator)
    about = torch.ones(1, 20, dtype=torch.bool)
    about[0, [3, 4, 15]] = False
    other = torch.where(about, spelled, 99)
    assert not torch.equal(module.told(around, *(2 * [spelled]), ~about), module.told(around, *(2 * [other]), ~about))
    # The token's own weight moves its softmax alone; its vector is not in the sum.
    same = module.told(around, spelled, other, about)
    assert torch.equal(module.told(around, spelled, spelled, about), same)
    assert float(module.told(around, spelled, spelled, about & False).abs().max()) == 0


def test_rare_words_weigh_more_from_the_start():
    module = Wording(12, 4, 64)
    module.count(torch.tensor([0] * 900 + [1] * 90 + [2] * 9))
    assert module.weight_V.diff().min() > 1


def test_a_name_that_nobody_knows_brings_statement_and_question_together():
    module = Wording(12, 120, 128).requires_grad_(False)
    around, hidden = torch.zeros(1, 6, WIDTH), torch.zeros(1, 6, 12)
    about = torch.ones(1, 6, dtype=torch.bool)
    words = torch.tensor([[11, 12, 13, 14, 15, 16]])
    told = module.told(around, words, words, about)[0, 3]
    same, other = (
        module.asked(hidden, *(2 * [torch.tensor([words])]), torch.zeros(1, 128))[0][0, -1]
        for words in ([21, 22, 11, 12, 23, 13], [21, 22, 31, 32, 23, 33])
    )
    assert F.cosine_similarity(told, same, dim=0) > F.cosine_similarity(told, other, dim=0) + 0.3
