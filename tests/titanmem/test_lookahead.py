"""What is seen of a token to be written: both sides of it, and nothing of the padding; of one that
asks: what is before."""

from __future__ import annotations

import torch

from titanmem.lookahead import SKIM_DILATIONS, SKIM_TAPS, WIDTH, Lookahead, Lookback, Skim


def layer() -> Lookahead:
    torch.manual_seed(0)
    made = Lookahead(24)
    with torch.no_grad():
        made.o_proj.weight.normal_(std=0.1)
        made.down_proj.weight.normal_(std=0.1)
    return made


@torch.no_grad()
def test_a_token_sees_both_sides():
    lookahead, hidden = layer(), torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(1))
    before = lookahead(hidden)
    assert before.shape == (1, 12, WIDTH)
    for changed in (0, 11):
        other = hidden.clone()
        other[0, changed] += 1
        assert bool(((lookahead(other) - before).abs().amax(-1) > 1e-4).all()), changed


@torch.no_grad()
def test_padding_is_not_seen():
    lookahead, hidden = layer(), torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(12)[None] < torch.tensor([[7], [12]])
    alone = lookahead(hidden[:1, :7])
    for padding in (0.0, 9.0):
        padded = torch.where(valid[..., None], hidden, torch.full_like(hidden, padding))
        assert torch.allclose(lookahead(padded, valid)[:1, :7], alone, atol=1e-5)


@torch.no_grad()
def test_looking_back_ends_at_the_window_and_where_a_conversation_begins():
    torch.manual_seed(0)
    lookback, history = Lookback(24, window=5), torch.zeros(1, 8, 24)
    lookback.o_proj.weight.normal_(std=0.1)
    hidden = torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(1))
    before = lookback(hidden, history)
    assert before.shape == (1, 12, WIDTH)
    other = hidden.clone()
    other[0, 4] += 1
    changed = ((lookback(other, history) - before).abs().amax(-1) > 1e-4)[0].nonzero()[:, 0]
    assert changed.tolist() == [4, 5, 6, 7, 8]
    # What is zero stands for no token at all: no history, and a longer one of nothing, are the same.
    assert torch.allclose(lookback(hidden, torch.zeros(1, 4, 24)), before, atol=1e-5)
    split = lookback(hidden[:, 7:], torch.cat([history, hidden[:, :7]], 1)[:, -8:])
    assert torch.allclose(split, before[:, 7:], atol=1e-5)


@torch.no_grad()
def test_a_skim_sees_what_is_near():
    torch.manual_seed(0)
    skim, tokens = Skim(50), torch.randint(0, 50, (1, 64))
    before = skim(tokens)
    assert before.shape == (1, 64)
    other = tokens.clone()
    other[0, 30] = (other[0, 30] + 1) % 50
    changed = (skim(other) != before)[0].nonzero()[:, 0]
    reach = SKIM_TAPS // 2 * sum(SKIM_DILATIONS)
    assert int(changed.min()) >= 30 - reach
    assert int(changed.max()) <= 30 + reach
