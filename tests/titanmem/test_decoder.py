"""The decoder's two ways are one function, and a row's bits do not depend on its neighbours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.tiny_model import tiny_config, tiny_decoder, tiny_folder
from titanmem.cache import Cache
from titanmem.decoder import Decoder
from titanmem.decoder_config import SERVED, DecoderConfig
from titanmem.errors import ModelFolderError
from titanmem.folder import base_hash, load_decoder

SAME = 2e-5
"""Float32 through four layers, summed in two orders."""


def through_cache(
    decoder: Decoder, tokens: torch.Tensor, cuts: list[int], read: torch.Tensor, mode: str
) -> torch.Tensor:
    """Normalised outputs of one conversation, prefilled in pieces and then token by token."""
    cache, outs, start = Cache(decoder.config, 1), [], 0
    for cut in [*cuts, *range(cuts[-1] + 1, tokens.shape[1] + 1)]:
        part = tokens[:, start:cut]
        width = 1 if part.shape[1] == 1 else 16
        padded = torch.zeros(1, width, dtype=torch.int64)
        padded[:, : part.shape[1]] = part
        said = torch.zeros(1, width, read.shape[2])
        said[:, : part.shape[1]] = read[:, start:cut]
        cache.begin(torch.tensor([part.shape[1]]), width)
        x, _ = decoder.lower_cached(padded, cache)
        outs.append(decoder.upper_cached(x, said, cache, mode)[:, : part.shape[1]])
        cache.advance()
        start = cut
    return torch.cat(outs, 1)


@pytest.mark.parametrize("mode", SERVED["mode"])
@pytest.mark.parametrize("cuts", [[1], [16], [5, 21], [16, 32, 40], [3, 4, 20]])
def test_cached_steps_equal_whole_rows(cuts, mode):
    decoder = tiny_decoder()
    tokens = torch.randint(4, 300, (1, 64), generator=torch.Generator().manual_seed(1))
    read = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    read[:, ::3] = 0.0  # where the memory says nothing, nothing is attended to
    x, _ = decoder.lower_blocks(tokens)
    whole = decoder.upper_blocks(x, read, mode)
    assert (through_cache(decoder, tokens, cuts, read, mode) - whole).abs().max() < SAME


def test_each_mode_hears_the_memory_in_its_own_way():
    decoder = tiny_decoder()
    tokens = torch.randint(4, 300, (1, 32), generator=torch.Generator().manual_seed(1))
    read = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(2))
    x, _ = decoder.lower_blocks(tokens)
    heard = {mode: decoder.upper_blocks(x, read, mode) for mode in SERVED["mode"]}
    silent = {mode: decoder.upper_blocks(x, torch.zeros_like(read), mode) for mode in SERVED["mode"]}
    for mode, out in heard.items():
        assert not torch.allclose(out, silent[mode], atol=1e-3), mode
        assert all(mode == other or not torch.allclose(out, heard[other], atol=1e-3) for other in heard)
    plain, turn = x, decoder.turn(torch.arange(32))
    for layer in decoder.stack[decoder.config.memory_layer :]:
        plain = layer.blocks(plain, turn, None)
    for mode, out in silent.items():
        assert torch.allclose(out, decoder.norm(plain), atol=SAME), f"{mode}: an empty memory changes nothing"


@pytest.mark.parametrize("lookback", [0, 3, 12])
def test_queries_are_the_same_both_ways(lookback: int):
    decoder = tiny_decoder(lookback=lookback)
    tokens = torch.randint(4, 300, (1, 32), generator=torch.Generator().manual_seed(1))
    _, hidden = decoder.lower_blocks(tokens)
    query = decoder.memory.queries(hidden, decoder.zeros(1, decoder.config.memory.history))
    cache, got = Cache(decoder.config, 1), []
    for count in (16, 1, 1, 14):
        start = sum(part.shape[1] for part in got)
        cache.begin(torch.tensor([count]), count)
        got.append(decoder.lower_cached(tokens[:, start : start + count], cache)[1])
        cache.advance()
    assert (torch.cat(got, 1) - query).abs().max() < SAME


def test_a_token_sees_no_further_than_the_window_a_layer():
    decoder = tiny_decoder()
    tokens = torch.randint(4, 300, (1, 96), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 0] += 1
    read = torch.zeros(1, 96, 16)
    first, second = (decoder.upper_blocks(decoder.lower_blocks(t)[0], read) for t in (tokens, other))
    changed = (first != second).any(-1)[0].nonzero()[:, 0]
    # Four layers of window 16 and an embedding convolution of 4 taps; nothing before the change, all of it after.
    assert changed.min() == 0
    assert changed.max() <= 4 * 15 + 3


@pytest.mark.parametrize("lookback", [0, 12])
def test_a_row_has_the_same_bits_in_any_company(lookback: int):
    decoder = tiny_decoder(lookback=lookback)

    def last(rows: list[int]) -> torch.Tensor:
        """Output of row 0's conversation (3, 9, 27) at place `rows.index(0)` of eight."""
        cache = Cache(decoder.config, 8)
        generator = torch.Generator().manual_seed(sum(r * 31**i for i, r in enumerate(rows)))
        for step in (3, 9, 27):
            tokens = torch.randint(4, 300, (8, 1), generator=generator)
            tokens[rows.index(0)] = step
            cache.begin(torch.ones(8, dtype=torch.int64), 1)
            x, query = decoder.lower_cached(tokens, cache)
            out = decoder.upper_cached(x, query, cache)
            cache.advance()
        return out[rows.index(0)]

    alone = last([0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(last([7, 5, 3, 0, 2, 4, 6, 1]), alone)
    assert torch.equal(last([1, 2, 3, 4, 5, 6, 7, 0]), alone)


def test_a_folder_comes_back_and_has_a_name(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    decoder = load_decoder(folder)
    assert decoder.config == DecoderConfig.from_dict(json.loads((folder / "config.json").read_text()))
    for name, tensor in tiny_decoder().state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor.half().float()), name
    before = base_hash(folder)
    assert before == base_hash(tiny_folder(tmp_path / "same"))
    assert before != base_hash(tiny_folder(tmp_path / "other", seed=1))


def test_a_broken_folder_names_what_is_wrong(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"config\.json is missing"):
        DecoderConfig.load(tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        load_decoder(folder)
    weights.unlink()
    with pytest.raises(ModelFolderError, match=r"model\.safetensors is missing"):
        load_decoder(folder)
    weights.write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 5}, "missing tensors"),
        ({"modes": ["lmm"]}, r"modes = \['lmm'\]: must be some of"),
        ({"model_type": "bert"}, "model_type = 'bert'"),
        ({"memory": {**config["memory"], "chunk_size": 32}}, "must be at most window"),
        ({"memory_layer": 9}, "memory_layer = 9"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelFolderError, match=said):
            load_decoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        load_decoder(folder)


def test_grouped_heads_are_configured_right():
    with pytest.raises(ValueError, match="num_key_value_heads = 3"):
        DecoderConfig(num_attention_heads=4, num_key_value_heads=3)
    assert tiny_config().num_key_value_heads == 1


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"rule": "titans"}, "memory.rule = 'titans': the decoder serves sparse"),
        ({"written_layers": "all"}, "the decoder serves last"),
    ],
)
def test_what_the_decoder_does_not_serve_is_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        replace(tiny_config(), memory=tiny_config().memory.overridden(knobs))


def test_a_mode_that_was_not_trained_is_refused_by_name(tmp_path):
    config = replace(tiny_config(), modes=("mac",))
    assert DecoderConfig.from_dict(config.to_dict()) == config
    assert config.served("mac", tmp_path) == "mac"
    with pytest.raises(ModelFolderError, match="mode 'mag': this checkpoint was trained for mac"):
        config.served("mag", tmp_path)
