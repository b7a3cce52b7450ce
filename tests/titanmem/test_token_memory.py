"""What is read too faintly to be more than a resemblance is not heard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny_model import tiny_decoder
from titanmem.decoder import Decoder
from titanmem.token_memory import FAINT


def with_floor(floor: float) -> Decoder:
    decoder = tiny_decoder()
    spec = replace(decoder.config.memory, read_floor=floor)
    decoder.config = replace(decoder.config, memory=spec)
    decoder.memory.spec = spec
    return decoder


def of_norm(norm: float, width: int) -> torch.Tensor:
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    return norm * torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize(
    ("norm", "share"),
    [(0.0, 0.0), (0.1, 0.0), (0.2, 0.0), (0.2 + FAINT / 2, 0.5), (0.2 + FAINT, 1.0), (0.9, 1.0)],
)
def test_a_read_is_heard_in_full_a_little_above_the_floor_and_not_at_all_below_it(norm, share):
    memory = with_floor(0.2).memory
    read = of_norm(norm, memory.spec.value_dim)
    assert torch.allclose(memory.heard(read), share * read, atol=1e-6)


def test_without_a_floor_the_faintest_read_is_heard():
    memory = with_floor(0.0).memory
    read = of_norm(1e-6, memory.spec.value_dim)
    assert torch.equal(memory.heard(read), read)


@pytest.mark.parametrize("mode", ["mac", "mag", "mal"])
def test_a_faint_read_leaves_the_decoder_as_it_is_and_a_loud_one_does_not(mode):
    decoder = with_floor(0.3)
    width = decoder.config.memory.value_dim
    values_VD = decoder.memory.vocabulary_values(decoder.embed_tokens.weight)
    tokens = torch.tensor([[5, 6, 7, 8]])

    @torch.no_grad()
    def logits(norm: float) -> torch.Tensor:
        x, _ = decoder.lower_blocks(tokens)
        read = of_norm(norm, width)
        return decoder.logits(decoder.upper_blocks(x, read, mode), read, values_VD)

    assert torch.equal(logits(0.25), logits(0.0))
    assert not torch.allclose(logits(0.5), logits(0.0), atol=1e-3)
