"""Continuous batching: conversations of many users share the steps of one decoder.

A conversation gets a lane, a row of the attention cache. Each turn of the loop runs one prefill chunk (one
conversation alone, padded to a power of two) and one decode step (whole groups of `LANE_GROUP` rows, idle rows
padded). So the shape of every product is the same whoever else is served, and on the CPU path a row's bits do not
depend on its neighbours (tests/actors/test_engine.py).

The engine reads θ_M and never writes it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.slab import Resident, Slab
from kernels import ops
from titanmem.cache import Cache
from titanmem.decoder import Decoder

logger = logging.getLogger(__name__)

LANE_GROUP = 8
"""Rows of one decode step. One row alone takes another product in the BLAS, with other bits."""
PREFILL_WIDTH_MIN = 32

Ending = Literal["stop", "length", "cancelled"]


@dataclass(kw_only=True, eq=False)
class Generation:
    """One reply in the making."""

    prompt: np.ndarray
    """int32 [n], at least one id."""
    resident: Resident | None
    """Whose memory is read; None for memory `off`."""
    mode: str
    """How the memory meets attention."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: frozenset[int]
    emit: Callable[[int], None]
    """Called in the engine's thread with each new id."""
    finish: Callable[[Ending | BaseException], None]
    """Called once, in the engine's thread."""
    cancelled: bool = False
    """Set from any thread; the lane is free after the step that runs."""
    lane: int = -1
    filled: int = 0
    count: int = 0
    last: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)


class Engine:
    """Lanes, waiting conversations and the loop over both."""

    def __init__(self, decoder: Decoder, slab: Slab, lanes: int = 16) -> None:
        if lanes % LANE_GROUP:
            raise ValueError(f"lanes = {lanes}: must be a multiple of {LANE_GROUP}")
        self.decoder, self.slab = decoder, slab
        self.window = decoder.config.memory.window
        self.cache = Cache(decoder.config, lanes)
        self.values_VD = decoder.memory.vocabulary_values(decoder.embed_tokens.weight)
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self._lanes: list[Generation | None] = [None] * lanes
        self._waiting: deque[Generation] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def prompt_of(self, tokens: np.ndarray) -> np.ndarray:
        """The end of a prompt that can still matter to the next token: each layer sees one window further back."""
        return tokens[-self.decoder.config.num_hidden_layers * self.window :]

    @property
    def running(self) -> int:
        return sum(generation is not None for generation in self._lanes)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Queue a conversation; it starts as soon as a lane is free."""
        generation.generator.manual_seed(generation.seed)
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(generation)
            self._wake.notify()

    def cancel(self, generation: Generation) -> None:
        """End a conversation after the step that runs; from any thread."""
        generation.cancelled = True
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """End all conversations as cancelled and stop the loop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self.running)
                if self._closed:
                    break
            self.step()
        for generation in [*self._lanes, *self._waiting]:
            if generation is not None:
                generation.finish("cancelled")

    def step(self) -> None:
        """One turn of the loop: admit, one prefill chunk, one decode step."""
        self._sweep()
        self._admit()
        with torch.no_grad():
            filling = [g for g in self._lanes if g is not None and g.filled < len(g.prompt)]
            if filling:
                # The shortest rest first: a long prompt does not hold up the first token of a short one.
                self._guarded(self._prefill, [min(filling, key=lambda g: len(g.prompt) - g.filled)])
            for start in range(0, len(self._lanes), LANE_GROUP):
                group = self._lanes[start : start + LANE_GROUP]
                ready = [g for g in group if g is not None and g.filled >= len(g.prompt)]
                for mode in sorted({g.mode for g in ready}):
                    self._guarded(self._decode, [g for g in ready if g.mode == mode])

    def _guarded(self, work: Callable[[list[Generation]], None], members: list[Generation]) -> None:
        """A step that fails ends its own conversations with the error and leaves all others alone."""
        try:
            work(members)
        except Exception as error:  # whatever went wrong, the loop must go on for the other users
            logger.exception("a step of %d conversations failed", len(members))
            for generation in members:
                self._end(generation, error)

    def _sweep(self) -> None:
        for generation in [*self._lanes, *self._waiting]:
            if generation is not None and generation.cancelled:
                self._end(generation, "cancelled")

    def _admit(self) -> None:
        for lane, generation in enumerate(self._lanes):
            if generation is None and self._waiting:
                with self._wake:
                    admitted = self._waiting.popleft()
                admitted.lane = lane
                self._lanes[lane] = admitted
                self.cache.rows(lane, lane + 1).clear()

    def _end(self, generation: Generation, ending: Ending | BaseException) -> None:
        if generation.lane >= 0 and self._lanes[generation.lane] is generation:
            self._lanes[generation.lane] = None
        else:
            with self._wake:
                if generation not in self._waiting:
                    return
                self._waiting.remove(generation)
        generation.finish(ending)

    def _read(self, query_ND: Tensor, residents: list[Resident | None]) -> Tensor:
        """What each row's memory says, zeros for rows without one, [N, D]."""
        out_ND = torch.zeros(len(query_ND), self.values_VD.shape[1])
        rows = [row for row, resident in enumerate(residents) if resident is not None]
        if rows:
            columns, values = self.decoder.memory.code(query_ND)
            readers = [resident for resident in residents if resident is not None]
            slots = torch.tensor([resident.slot for resident in readers])
            with ExitStack() as locks:
                for resident in dict.fromkeys(readers):
                    locks.enter_context(resident.lock.shared())
                out_ND[rows] = ops.sparse_read(self.slab.written_SHD, slots, columns[rows], values[rows])
        return out_ND

    def _prefill(self, members: list[Generation]) -> None:
        """The next chunk of one prompt; with the last chunk, the first token of the reply."""
        (generation,) = members
        part = generation.prompt[generation.filled : generation.filled + self.window]
        width = max(PREFILL_WIDTH_MIN, 1 << (len(part) - 1).bit_length())
        tokens = torch.zeros(1, min(width, self.window), dtype=torch.int64)
        tokens[0, : len(part)] = torch.from_numpy(part.astype(np.int64))
        cache = self.cache.rows(generation.lane, generation.lane + 1)
        cache.begin(torch.tensor([len(part)]), tokens.shape[1])
        x, query = self.decoder.lower_cached(tokens, cache)
        read = self._read(query[0], [generation.resident] * tokens.shape[1])[None]
        out = self.decoder.upper_cached(x, read, cache, generation.mode)
        cache.advance()
        generation.filled += len(part)
        self.prompt_tokens += len(part)
        if generation.filled >= len(generation.prompt):
            last = slice(len(part) - 1, len(part))
            self._take(generation, self.decoder.logits(out[:, last], read[:, last], self.values_VD)[0, 0])

    def _decode(self, members: list[Generation]) -> None:
        """One token for conversations of one mode in a group of lanes."""
        start = members[0].lane // LANE_GROUP * LANE_GROUP
        tokens = torch.zeros(LANE_GROUP, 1, dtype=torch.int64)
        count = torch.zeros(LANE_GROUP, dtype=torch.int64)
        residents: list[Resident | None] = [None] * LANE_GROUP
        for generation in members:
            row = generation.lane - start
            tokens[row, 0], count[row], residents[row] = generation.last, 1, generation.resident
        cache = self.cache.rows(start, start + LANE_GROUP)
        cache.begin(count, 1)
        x, query = self.decoder.lower_cached(tokens, cache)
        read = self._read(query[:, 0], residents)[:, None]
        out = self.decoder.upper_cached(x, read, cache, members[0].mode)
        cache.advance()
        logits = self.decoder.logits(out, read, self.values_VD)
        for generation in members:
            self._take(generation, logits[generation.lane - start, 0])

    def _take(self, generation: Generation, logits_V: Tensor) -> None:
        """Choose the next token, hand it out, and end the reply where it ends."""
        token = sample(logits_V, generation.temperature, generation.top_p, generation.generator)
        generation.last = token
        if token in generation.stop_ids:
            self._end(generation, "stop")
            return
        generation.count += 1
        self.generated_tokens += 1
        generation.emit(token)
        if generation.count >= generation.max_tokens:
            self._end(generation, "length")


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The most likely token at temperature 0, else one drawn from the smallest set that holds `top_p` of the mass."""
    if temperature <= 0:
        return int(logits_V.argmax())
    probability = (logits_V.float() / temperature).softmax(-1)
    sorted_p, order = probability.sort(descending=True)
    sorted_p[sorted_p.cumsum(0) - sorted_p >= top_p] = 0.0
    return int(order[torch.multinomial(sorted_p, 1, generator=generator)])
