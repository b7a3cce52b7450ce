"""A memory in decoders of somebody else: Hugging Face's Llama, GPT-2 and Qwen2, and one of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem import Attached, MemorySpec, NeuralMemory, attach
from titanmem.attach import MemoryLayer, decoder_layers
from titanmem.foreign import valid_tokens
from titanmem.modes import MODES, Mode

E, C, WINDOW, WORDS = 32, 16, 20, 64
SAME = 3e-5
"""Float32 sums in two orders, through three layers and a few updates, on logits of about 1."""
FAMILIES = ("llama", "gpt2", "qwen2")
CACHED = ("mag", "mal", "lmm")


def decoder(family: str, attention: str = "sdpa", seed: int = 0, **values: Any) -> Any:
    """Three layers of random weights, large enough that attention is no average."""
    import transformers

    common: dict[str, Any] = {"vocab_size": WORDS, "attn_implementation": attention, "pad_token_id": 0}
    torch.manual_seed(seed)
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=E, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1, **common, **values
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": E, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        name = {"llama": "Llama", "qwen2": "Qwen2"}[family]
        config = getattr(transformers, f"{name}Config")(num_key_value_heads=2, **sizes, **common, **values)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval().requires_grad_(False)


def memory(seed: int = 0, **values: Any) -> NeuralMemory:
    torch.manual_seed(seed)
    base = MemorySpec(
        rule="titans", width=E, d_nltm=16, depth=2, conv=4, chunk_size=C, window=WINDOW, lr=0.03, momentum=0.3,
        persistent_tokens=2,
    )  # fmt: skip
    return NeuralMemory(base.overridden(values))


def opened(model: nn.Module, mode: str | None, layers: tuple[int, ...] = (1,), **values: Any) -> Attached:
    """Attached, with gains far from their neutral start."""
    attached = attach(model, memory(**values), layers=layers, mode=mode)
    with torch.no_grad():
        for one in attached.modes:
            assert isinstance(one, Mode)
            one.gain_E.copy_(torch.linspace(-1, 1.5, E))
    return attached


def mode_of(attached: Attached, number: int = 0) -> Any:
    return attached.modes[number]


def words(rows: int = 2, tokens: int = 40, seed: int = 7) -> Tensor:
    return torch.randint(2, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **given}).logits


# -- attaching and detaching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_memory_changes_nothing_and_detach_puts_the_layers_back(family: str, attention: str):
    model, ids = decoder(family, attention), words()
    before, layers = logits(model, ids), list(decoder_layers(model))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in MODES:
        attached = attach(model, memory(), layers=[1], mode=mode)
        wrapped = logits(model, ids)
        if mode in ("mag", "mal"):
            assert torch.equal(wrapped, before), mode
        else:
            assert not torch.allclose(wrapped, before), "mac has new context, lmm has no layer"
        attached.detach()
        assert all(a is b for a, b in zip(decoder_layers(model), layers, strict=True))
        assert torch.equal(logits(model, ids), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_lmm_is_the_decoder_without_that_layer(family: str):
    model, ids = decoder(family), words()
    attach(model, memory(), layers=[1], mode="lmm")
    got = logits(model, ids)
    layers = decoder_layers(model)
    layers[1] = Passes()
    assert torch.equal(logits(model, ids), got)


class Passes(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def test_each_layer_has_a_memory_and_a_state_of_its_own():
    model, given = decoder("llama"), memory()
    decoders = {id(p) for p in model.parameters()}
    attached = attach(model, given, layers=[0, -1], mode=None)
    assert attached.states == [None, None]
    logits(model, words())
    first, last = attached.modes
    assert isinstance(first, MODES["mac"]), "None is the mode of the spec"
    assert isinstance(last, MODES["mac"])
    assert first.memory is given
    assert last.memory is not given
    assert not {id(p) for p in first.parameters()} & {id(p) for p in last.parameters()}
    one, other = attached.states
    assert one is not None
    assert other is not None
    assert not torch.equal(one.weights[0], other.weights[0])
    report = attached.reports[1]
    assert report is not None
    assert report.written.shape == report.surprise.shape == (2, 40)
    assert bool(report.written.all())
    assert not decoders & {id(p) for p in attached.parameters()}
    assert {id(p) for p in model.parameters()} == decoders | {id(p) for p in attached.parameters()}
    assert isinstance(decoder_layers(model)[2], MemoryLayer)
    assert decoder_layers(model)[2].self_attn is not None, "what is asked of the layer is the layer's"


@pytest.mark.parametrize("mode", list(MODES))
def test_recorded_hidden_states_are_those_that_leave_the_memory(mode: str):
    model, ids = decoder("llama"), words()
    attached = opened(model, mode)
    seen: list[Any] = []
    handle = decoder_layers(model)[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        recorded = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        assert [tuple(h.shape) for h in recorded] == [(2, 40, E)] * 4
        assert len(seen) == 1
        assert torch.equal(recorded[2], seen[0])
        handle.remove()
        attached.detach()
        layer: Any = decoder_layers(model)[2]
        following = layer(
            recorded[2], position_embeddings=model.model.rotary_emb(recorded[2], torch.arange(40)[None])
        )
        assert (model.model.norm(following) - recorded[3]).abs().max() < SAME
    assert len(seen) == 1


# -- what attention sees -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", FAMILIES)
def test_no_output_before_a_token_depends_on_it(family: str, mode: str, attention: str):
    model, ids = decoder(family, attention), words(1, 3 * C - 4)
    attached = opened(model, mode, (0, 2))
    base = logits(model, ids)
    for place in (C - 1, C + 5):
        attached.reset()
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % WORDS
        changed = (logits(model, other) != base).any(-1)[0].nonzero()[:, 0]
        assert int(changed.min()) == place


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mac_lets_each_token_see_what_section_4_1_says(family: str, attention: str):
    """Each token alone, through the original layer, after a sequence of only what it may see."""
    model, tokens = decoder(family, attention), 2 * C + 7
    attached = opened(model, "mac")
    wrapper, inputs = decoder_layers(model)[1], []
    assert isinstance(wrapper, MemoryLayer)
    wrapper.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    reads, outputs = [], []
    mode = mode_of(attached)
    mode_of(attached).memory.out.register_forward_hook(lambda module, args, output: reads.append(output))
    mode.gated = lambda x, y, m: outputs.append(y) or y
    logits(model, words(2, tokens))
    x, y, h = inputs[0], torch.cat(outputs, 1), torch.cat(reads[::2], 1)
    position = torch.arange(tokens)[None]
    for i in (0, 3, C - 1, C, C + 9, tokens - 1):
        start, first = i // C * C, max(0, i - WINDOW + 1)
        line = torch.cat([mode.persistent_PE.expand(2, -1, -1), h[:, start : i + 1], x[:, first : i + 1]], 1)
        given: dict[str, Any] = {"attention_mask": torch.zeros(2, 1, line.shape[1], line.shape[1])}
        if family != "gpt2":
            cosine, sine = model.model.rotary_emb(x, position)
            turn = [torch.cat([c[:, start : i + 1], c[:, first : i + 1]], 1) for c in (cosine, sine)]
            given["position_embeddings"] = (
                F.pad(turn[0], (0, 0, 2, 0), value=1.0),
                F.pad(turn[1], (0, 0, 2, 0)),
            )
        with torch.no_grad():
            expected = wrapper.layer.forward(line, **given)[:, -1]
        assert (y[:, i] - expected).abs().max() < SAME, i


@pytest.mark.parametrize(("window", "last"), [(6, 7), (None, C - 1)])
def test_mac_honours_the_layers_own_window(window: int | None, last: int):
    given: dict[str, Any] = {} if window is None else {"sliding_window": window, "max_window_layers": 0}
    model = decoder("qwen2", use_sliding_window=window is not None, **given)
    attached, outputs = opened(model, "mac", (0,)), []
    with torch.no_grad():  # what the memory says of a token is seen from further away, so let it say nothing
        mode_of(attached).memory.out.weight.zero_()
    decoder_layers(model)[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    ids = words(1, C)
    logits(model, ids)
    attached.reset()
    ids[0, 2] += 1
    logits(model, ids)
    changed = (outputs[0] != outputs[1]).any(-1)[0].nonzero()[:, 0]
    assert changed.tolist() == list(range(2, last + 1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_neither_seen_nor_written(family: str, mode: str, attention: str, side: str):
    model, tokens, total = decoder(family, attention), C + 9, 2 * C + 2
    attached = opened(model, mode, (0, 1))
    ids, full = words(1, tokens), words(1, total, seed=8)
    alone = logits(model, ids)
    states = [state.detached() for state in attached.states if state is not None]
    start = total - tokens if side == "left" else 0
    there = torch.zeros(2, total, dtype=torch.int64)
    there[0, start : start + tokens] = there[1] = 1
    batch = torch.cat([torch.zeros_like(full), full])
    batch[0, start : start + tokens] = ids[0]
    attached.reset()
    got = logits(
        model, batch, attention_mask=there, position_ids=(there.cumsum(1) - 1).clamp_min(0)
    )  # as generate() counts positions
    assert (got[:1, start : start + tokens] - alone).abs().max() < SAME
    for report, state, own in zip(attached.reports, attached.states, states, strict=True):
        assert report is not None
        assert state is not None
        assert torch.equal(report.written, there.bool())
        for whole, mine in zip(state.tensors(), own.tensors(), strict=True):
            assert (whole[:1] - mine).abs().max() < SAME


@pytest.mark.parametrize("mode", list(MODES))
def test_a_rows_bits_do_not_depend_on_the_others(mode: str):
    model, ids = decoder("llama"), words(3)
    attached = opened(model, mode)
    base = logits(model, ids)
    ids[1] = words(1, seed=9)
    attached.reset()
    got = logits(model, ids)
    assert torch.equal(got[[0, 2]], base[[0, 2]])
    assert not torch.equal(got[1], base[1])


def test_which_tokens_are_no_padding():
    x = torch.zeros(2, 3, E)
    assert valid_tokens(None, x, 0) is None
    two = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert valid_tokens(two, x, 2).tolist() == [[True] * 3, [True, True, False]]  # type: ignore[union-attr]
    seen = torch.ones(3, 5).tril(2).bool() & two.bool()[:, None, None]
    scores = torch.zeros(2, 1, 3, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, scores, scores.masked_fill(~seen, -torch.inf)):
        assert torch.equal(valid_tokens(mask, x, 2), two[:, 2:].bool())  # type: ignore[arg-type]
    # A cache of fixed length has room behind the newest token, one with a window has lost its oldest.
    assert torch.equal(valid_tokens(F.pad(seen, (0, 4)), x, 2), two[:, 2:].bool())  # type: ignore[arg-type]
    assert torch.equal(valid_tokens(seen, x, 90), two[:, 2:].bool())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sdpa or eager"):
        valid_tokens(object(), x, 0)


# -- calls that go on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CACHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_cached_calls_of_whole_chunks_are_one_call(family: str, mode: str):
    model, ids = decoder(family), words(2, 4 * C)
    attached = opened(model, mode, (0, 2))
    whole, states = logits(model, ids), attached.states
    attached.reset()
    with torch.no_grad():
        first = model(ids[:, : 2 * C], use_cache=True)
        second = model(ids[:, 2 * C :], past_key_values=first.past_key_values, use_cache=True)
    assert (torch.cat([first.logits, second.logits], 1) - whole).abs().max() < SAME
    for mine, theirs in zip(attached.states, states, strict=True):
        assert mine is not None
        assert theirs is not None
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert (a - b).abs().max() < SAME


@pytest.mark.parametrize("mode", CACHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_decodes_from_the_state_with_a_cache(family: str, mode: str):
    """Read only, decoding with a cache says what the whole text says; padded on the left, as generate() wants it."""
    model, prompt = decoder(family), words(2, 11)
    attached = opened(model, mode, (0, 1))
    logits(model, words(2, C, seed=9))
    attached.writing = False
    there = torch.ones_like(prompt)
    there[0, :3] = prompt[0, :3] = 0
    said: Any = model.generate(
        prompt, attention_mask=there, max_new_tokens=6, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    there = F.pad(there, (0, 5), value=1)
    whole = logits(
        model, said.sequences[:, :-1], attention_mask=there, position_ids=(there.cumsum(1) - 1).clamp_min(0)
    )
    assert (torch.stack(said.logits, 1) - whole[:, -6:]).abs().max() < SAME


@pytest.mark.parametrize("mode", CACHED)
def test_a_decoded_token_is_written_as_a_chunk_of_its_own(mode: str):
    model, prompt = decoder("llama"), words(2, C)
    attached = opened(model, mode)
    model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    state = attached.states[0]
    assert state is not None
    assert state.updates_U.tolist() == [1 + 5] * 2, "the last token that is said has not been read yet"


def test_mac_generates_without_a_cache_and_refuses_to_go_on_from_one():
    model, prompt = decoder("llama"), words(2, 20)
    attached = opened(model, "mac", (0,))
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(prompt, max_new_tokens=3, do_sample=False)
    attached.reset()
    whole = logits(model, prompt)
    attached.writing = False
    said: Any = model.generate(
        prompt, max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    again = logits(model, said.sequences[:, :-1])
    assert (torch.stack(said.logits, 1) - again[:, -4:]).abs().max() < SAME
    assert not torch.allclose(again[:, :20], whole), "the prompt has been written, and is read"


def test_reset_states_and_writing():
    model, ids = decoder("llama"), words(3)
    attached = opened(model, "mag", (0, 1))
    fresh = logits(model, ids)
    kept = attached.states
    second = logits(model, ids)
    assert not torch.allclose(second, fresh)
    with pytest.raises(ValueError, match=r"2 rows.*3 users.*reset"):
        logits(model, ids[:2])
    with pytest.raises(ValueError, match="from 0 to 2"):
        attached.reset(users=[3])
    attached.states = [None if s is None else s.of(torch.arange(3)) for s in kept]
    attached.reset(users=[1])
    mixed = logits(model, ids)
    assert torch.equal(mixed[1], fresh[1])
    assert not torch.allclose(mixed[0], fresh[0])
    attached.reset()
    logits(model, ids[:2])
    attached.writing = False
    assert not attached.writing
    before = attached.states[0]
    assert before is not None
    tensors = [x.clone() for x in before.tensors()]
    assert torch.equal(logits(model, ids[:2]), logits(model, ids[:2]))
    assert all(torch.equal(a, b) for a, b in zip(attached.states[0].tensors(), tensors, strict=True))  # type: ignore[union-attr]
    assert attached.reports == [None, None]


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", list(MODES))
def test_a_gradient_reaches_every_parameter_and_no_other(family: str, mode: str):
    model = decoder(family)
    attached = opened(model, mode)
    first = model(words(2, 2 * C), use_cache=False).logits
    attached.detach_states()
    (
        first.square().mean() + model(words(2, 2 * C, seed=8), use_cache=False).logits.square().mean()
    ).backward()
    for name, parameter in attached.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert parameter.grad.abs().max() > 0, name
    mine = {id(p) for p in attached.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    # The state carries its graph until it is cut.
    assert attached.states[0].weights[0].requires_grad  # type: ignore[union-attr]
    attached.detach_states()
    assert not any(x.requires_grad for x in attached.states[0].tensors())  # type: ignore[union-attr]


def asked_later(model: Any, attached: Attached, told: Tensor, *, forget: bool) -> Tensor:
    """A word is told in one call and asked for in the next, whose attention does not reach it: the loss."""
    attached.reset()
    model(told[:, None].expand(-1, 4), use_cache=False)
    if forget:
        attached.reset()
    answer = model(torch.ones(len(told), 2, dtype=torch.int64), use_cache=False).logits[:, -1]
    return F.cross_entropy(answer, told)


@pytest.mark.parametrize(("mode", "share_of_chance"), [("mac", 0.75), ("mal", 0.5)])
def test_training_teaches_a_frozen_decoder_what_its_window_can_not_see(mode: str, share_of_chance: float):
    model = decoder("llama", seed=3)
    frozen = {name: (p, p.clone()) for name, p in model.named_parameters()}
    attached = attach(model, memory(conv=1, lr=0.1), layers=[0], mode=mode)
    optimiser = torch.optim.Adam(attached.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        loss = asked_later(model, attached, torch.randint(2, 10, (32,), generator=generator), forget=False)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    told, chance = torch.arange(2, 10), torch.tensor(8.0).log()
    with torch.no_grad():
        assert asked_later(model, attached, told, forget=False) < share_of_chance * chance
        assert asked_later(model, attached, told, forget=True) > 0.99 * chance, "nothing else could tell"
    for name, (parameter, before) in frozen.items():
        assert torch.equal(parameter, before), name


# -- decoders of other kinds, and what is refused ------------------------------------------------------------


class OldLayer(nn.Module):
    """A layer that returns a tuple, as layers once did."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.experts = nn.Linear(E, E), nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, str]:
        scores = x @ x.transpose(1, 2) / E
        if attention_mask is None:
            scores = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -torch.inf)
        else:
            scores = scores + attention_mask[:, 0]
        return x + scores.softmax(-1) @ self.mix(x), "beside"


class OldDecoder(nn.Module):
    def __init__(self, kind: type[nn.Module] = OldLayer) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, beside = block(x)
            assert beside == "beside"
        return x


@pytest.mark.parametrize("mode", ["mac", "mag", "mal"])
def test_any_list_of_layers_will_do(mode: str):
    torch.manual_seed(0)
    model, x = OldDecoder(), torch.randn(2, 2 * C, E)
    before = model(x)
    attached = attach(model, memory(), layers=[1], mode=mode)
    out = model(x)
    assert torch.equal(out, before) == (mode != "mac")
    again = attach(model, memory(1), layers=[2], mode="mag")
    assert model(x).shape == x.shape
    attached.detach()
    again.detach()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_decoder_in_bfloat16_keeps_its_type(mode: str):
    model = decoder("llama").bfloat16()
    attached = opened(model, mode)
    out = logits(model, words())
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out).all())
    assert attached.states[0].weights[0].dtype == torch.float32  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused_by_name():
    llama = decoder("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": [3]}, r"\[3\].*0 to 2"),
        ({"layers": []}, "one or more"),
        ({"layers": [1, -2]}, "each layer once"),
        ({"mode": "mix"}, "mac, mag, mal, lmm"),
        ({"gate_reads": "now"}, "before, after"),
        ({"memory": memory(width=48)}, r"48.*32"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            attach(llama, **{"memory": memory(), "layers": [1], **given})
    assert not any(isinstance(layer, MemoryLayer) for layer in decoder_layers(llama)), "nothing half attached"
    attached = attach(llama, memory(), layers=[1])
    with pytest.raises(ValueError, match="layer 1 has a memory already"):
        attach(llama, memory(), layers=[1])
    with pytest.raises(ValueError, match="alibi"):
        decoder_layers(llama)[1](torch.zeros(1, 4, E), alibi=torch.zeros(4, 1, 4))
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"eager or sdpa, not flash"):
        decoder_layers(llama)[1](torch.zeros(1, 4, E))
    attached.detach()


def test_layers_that_can_not_be_told_are_refused():
    with pytest.raises(ValueError, match=r"Linear.*there is none"):
        attach(nn.Linear(2, 2), memory())
    pair = nn.ModuleDict({"encoder": OldDecoder(), "decoder": OldDecoder()})
    with pytest.raises(ValueError, match=r"encoder\.blocks, decoder\.blocks"):
        attach(pair, memory())
    assert len(attach(pair["decoder"], memory()).modes) == 1, "the nine experts of a layer are no decoder"

    class Unmasked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="Unmasked does not take"):
        attach(OldDecoder(Unmasked), memory(), mode="mac")
    model = OldDecoder(Unmasked)
    attach(model, memory(width=48), mode="mag")
    with pytest.raises(ValueError, match=r"32.*48"):
        model.blocks[2](torch.zeros(1, 4, E))
