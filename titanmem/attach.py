"""`attach`: a memory in the layers of a decoder that is not ours, Hugging Face's or any with a list of layers.

The decoder's weights are not touched. A chosen layer is replaced by a `MemoryLayer` that calls it, and `detach` puts
it back. What layers are called with is `titanmem.foreign`'s business.

Axes as in `titanmem.modes`; H heads, X any width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titanmem.foreign import (
    CACHES,
    SegmentCall,
    argument_names,
    cached_tokens,
    check_attention,
    count_tokens,
    valid_tokens,
)
from titanmem.memory import NeuralMemory
from titanmem.modes import GATE_READS, MODES, MemoryAlone, MemoryAsContext, Mode, Rows
from titanmem.state import MemoryState, UpdateReport

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class MemoryLayer(nn.Module):
    """A decoder's layer with a memory; it is called as the layer was, and returns what the layer returned.

    Hooks on the layer are hooks on this, so that `output_hidden_states` and the like show what leaves here; any other
    attribute that is asked for is the layer's. Raises ValueError for hidden states of another width than the memory's.
    In mode `lmm`, where the layer is not called, a tensor is returned.
    """

    def __init__(self, layer: nn.Module, mode: Mode, index: int) -> None:
        super().__init__()
        self.layer, self.mode, self.index = layer, mode, index
        self.training = layer.training
        self.names = argument_names(layer)
        for name in HOOKS:
            setattr(self, name, getattr(layer, name))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = args[0] if args else kwargs.pop(self.names[0])
        given.pop(self.names[0] if self.names else "", None)
        width = self.mode.memory.spec.width
        if x.shape[-1] != width:
            raise ValueError(f"hidden states of width {x.shape[-1]} come to a memory of width {width}")
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        past = 0 if cache is None else cached_tokens(cache, self.index)
        rows = Rows.of(valid_tokens(given.get("attention_mask"), x, past))
        beside: list[tuple[Any, ...]] = []

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # `forward`, for the layer's hooks run around this module instead.
            output = self.layer.forward(x, *args, **kwargs)
            if isinstance(output, tuple):
                beside[:] = [output[1:]]
                return output[0]
            return output

        if isinstance(self.mode, MemoryAsContext):
            if past:
                raise ValueError(
                    "mode mac reads whole sequences and has no KV cache to go on from: call the model, or generate(), "
                    "with use_cache=False"
                )
            check_attention(self.layer)
            out = self.mode(x, rows, SegmentCall(call, given, rows))
        else:
            out = self.mode(x, rows, lambda x: call(x, *args[1:], **kwargs), past > 0)
        if cache is not None and isinstance(self.mode, MemoryAsContext | MemoryAlone):
            count_tokens(cache, x, self.index)
        return (out, *beside[0]) if beside else out


class Attached(nn.Module):
    """What `attach` returns: the memories in a decoder, their users' states, and the way back.

    As a module it holds the memories and gates only: `parameters()` and `state_dict()` have nothing of the decoder.
    """

    def __init__(self, wrapped: Sequence[tuple[nn.ModuleList, MemoryLayer]]) -> None:
        super().__init__()
        self.modes = nn.ModuleList(layer.mode for _, layer in wrapped)
        self._wrapped = tuple(wrapped)

    def _all(self) -> list[Mode]:
        return [layer.mode for _, layer in self._wrapped]

    @property
    def states(self) -> list[MemoryState | None]:
        """One a wrapped layer, in the order of `layers`; None before the first forward.

        They are what the next forward writes: `state.of(rows)` is a copy to keep, and to set here later.
        """
        return [mode.state for mode in self._all()]

    @states.setter
    def states(self, states: Sequence[MemoryState | None]) -> None:
        for mode, state in zip(self._all(), states, strict=True):
            mode.reset()
            mode.state = state

    @property
    def reports(self) -> list[UpdateReport | None]:
        """What the last forward wrote, one a wrapped layer; None where nothing was to be written."""
        return [mode.report for mode in self._all()]

    @property
    def writing(self) -> bool:
        """Whether forwards write; False leaves every state as it is, to the bit."""
        return all(mode.writing for mode in self._all())

    @writing.setter
    def writing(self, value: bool) -> None:
        for mode in self._all():
            mode.writing = value

    def reset(self, users: Iterable[int] | None = None) -> None:
        """Forget some users (rows of the batch), or all: then the next forward may have any batch size.

        Raises ValueError for a user that the states do not hold.
        """
        for mode in self._all():
            if users is None:
                mode.reset()
            elif mode.state is not None:
                rows = torch.as_tensor(list(users), dtype=torch.int64)
                if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < mode.state.users:
                    raise ValueError(f"users {rows.tolist()}: must be from 0 to {mode.state.users - 1}")
                rows = rows.to(mode.gain_E.device)
                mode.state.put(rows, mode.memory.new_state(len(rows), mode.state.weights[0].dtype))
                mode.recent_BKE = None

    def detach_states(self) -> None:
        """Cut the graph that made the states, between steps of training."""
        for mode in self._all():
            mode.state = None if mode.state is None else mode.state.detached()

    def detach(self) -> None:
        """Put the original layers back. The states stay readable here."""
        for layers, wrapper in self._wrapped:
            if layers[wrapper.index] is wrapper:
                layers[wrapper.index] = wrapper.layer


def attach(
    any_transformer: nn.Module,
    memory: NeuralMemory,
    layers: Sequence[int] = (2,),
    mode: str | None = "mac",
    *,
    gate_reads: str = "before",
) -> Attached:
    """Put `memory` into `layers` of a decoder; the first layer gets `memory`, each other one a copy of its own.

    `mode` is `mac`, `mag`, `mal` or `lmm` (`titanmem.modes` says what each does to a layer), or None for that of
    `memory.spec`; `gate_reads` is for `mac`. Each row of a batch is a user. A call's end ends a chunk, so with a KV
    cache each decoded token is a chunk of its own. `mac` needs `use_cache=False`, where `generate` reads the whole
    text again for every token: set `writing` to False for it, or the memory is told the text that often. The rows of
    a batch must stay whose they are, which beam search does not see to.

    Raises ValueError where no list of layers can be told to be the decoder's, for layers that are not there or that
    have a memory already, for a width that is not the decoder's, and for an unknown mode.
    """
    mode = memory.spec.mode if mode is None else mode
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: must be one of {', '.join(MODES)}")
    if gate_reads not in GATE_READS:
        raise ValueError(f"gate_reads = {gate_reads!r}: must be one of {', '.join(GATE_READS)}")
    found = decoder_layers(any_transformer)
    places = _places(layers, found)
    width = getattr(getattr(any_transformer, "config", None), "hidden_size", memory.spec.width)
    if width != memory.spec.width:
        raise ValueError(f"memory.width = {memory.spec.width}: must be the decoder's hidden size, {width}")
    for place in places:
        if mode == "mac" and "attention_mask" not in argument_names(found[place]):
            raise ValueError(
                f"mode mac calls a layer with a 4-D attention_mask, which {type(found[place]).__name__} does not "
                "take: take mag, mal or lmm"
            )
    wrapped = []
    for number, place in enumerate(places):
        own = memory if number == 0 else copy.deepcopy(memory)
        wrapped.append((found, MemoryLayer(found[place], MODES[mode](own, gate_reads), place)))
    for _, wrapper in wrapped:
        found[wrapper.index] = wrapper
    return Attached(wrapped)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The one longest ModuleList of like modules; lists within layers (experts, heads) do not count.

    Raises ValueError where there is none, or more than one of that length.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            kinds = {type(x.layer) if isinstance(x, MemoryLayer) else type(x) for x in module}
            if len(kinds) == 1:
                lists[name] = module
    longest = max(map(len, lists.values()), default=0)
    names = [name for name, found in lists.items() if len(found) == longest]
    if len(names) != 1:
        what = f"several are as long, {', '.join(names)}" if names else "there is none"
        raise ValueError(
            f"{type(model).__name__}: a decoder's layers must be the one longest ModuleList of modules of one type; "
            f"{what}. Pass the part of the model that holds them"
        )
    return lists[names[0]]


def _places(layers: Sequence[int], found: nn.ModuleList) -> list[int]:
    """`layers` as places from 0 on."""
    count = len(found)
    if not layers or not all(-count <= i < count for i in layers):
        raise ValueError(f"layers = {list(layers)}: must be one or more of 0 to {count - 1}")
    places = [i % count for i in layers]
    if len(set(places)) < len(places):
        raise ValueError(f"layers = {list(layers)}: each layer once")
    for place in places:
        if isinstance(found[place], MemoryLayer):
            raise ValueError(
                f"layers = {list(layers)}: layer {place} has a memory already; detach that first"
            )
    return places
