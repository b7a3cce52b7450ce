"""How a memory meets attention: as context, as gate, as layer, or alone (Titans, arXiv 2501.00663, section 4).

A mode knows the memory and nothing of the layer that it meets, which is a function: `titanmem.attach` makes one of a
decoder's layer, tests make one of a few lines. Everything here is causal: what comes out at a token depends on no
later one.

The memory is given hidden states at root mean square 1, for decoders differ in scale by orders of magnitude. ⊗ is the
paper's non-linear gating: the layer's contribution y - x is scaled, unit by unit, by 2σ(g ⊙ norm(m)) in (0, 2). g
starts at 0, which is a factor of exactly 1; where a memory's output is added, it goes through a gain that starts at 0.

Axes: B rows of the batch, each a user; T tokens, S of a segment, N of an extended segment, P persistent tokens;
E model width; K taps of the memory's convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.memory import NeuralMemory
from titanmem.state import MemoryState, UpdateReport

GATE_READS = ("before", "after")
EPSILON = 1e-6
"""Under the root of a mean square: a memory that answers nothing is 0, not 0 / 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Which tokens of a batch exist, and the order that has each row's own tokens in front.

    Memory and segments work in that order, so that a row has the same chunks however it is padded, left or right.
    """

    valid_BT: Tensor | None = None
    """bool, in the new order; None where every token exists."""
    order_BT: Tensor | None = None
    """int64: the place that each token had."""

    @classmethod
    def of(cls, valid_BT: Tensor | None) -> Rows:
        """From bool [B, T] in the batch's own order; None is no padding."""
        if valid_BT is None or bool(valid_BT.all()):
            return cls()
        order_BT = torch.argsort(~valid_BT, dim=1, stable=True)
        return cls(valid_BT=valid_BT.gather(1, order_BT), order_BT=order_BT)

    def front(self, x: Tensor) -> Tensor:
        """[B, T, ...] with existing tokens first."""
        return x if self.order_BT is None else _taken(x, self.order_BT)

    def back(self, x: Tensor) -> Tensor:
        """[B, T, ...] in the batch's order again; zeros where there is no token."""
        if self.order_BT is None or self.valid_BT is None:
            return x
        x = torch.where(
            self.valid_BT.view(*self.valid_BT.shape, *[1] * (x.dim() - 2)), x, torch.zeros_like(x)
        )
        return _taken(x, torch.argsort(self.order_BT, dim=1))

    def cut(self, places: slice) -> Tensor | None:
        """`valid_BT` of some tokens."""
        return None if self.valid_BT is None else self.valid_BT[:, places]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What attention is called with for one segment in mode `mac`: [persistent ‖ h ‖ tokens before ‖ segment]."""

    hidden_BNE: Tensor
    visible_BNN: Tensor
    """bool: which columns a row sees. Rows before the segment see only themselves; what they give is not used."""
    persistent: int
    segment: slice
    """The segment's places among the row's tokens; its h stand at the same places."""
    first: int
    """Place of the first token before the segment that is here."""


class Mode(nn.Module):
    """What all modes have: a memory, one gain, a state, and whether the memory is written.

    `forward(x, rows, layer, continues)` takes hidden states [B, T, E] to hidden states [B, T, E]; `continues` says
    that the tokens follow those of the call before (decoding with a cache). Raises ValueError when the state is of
    another number of users than the batch.
    """

    def __init__(self, memory: NeuralMemory, gate_reads: str = "before") -> None:
        super().__init__()
        self.memory = memory
        self.gate_reads = gate_reads
        self.gain_E = nn.Parameter(torch.zeros_like(memory.key.linear.weight[0]))
        self.writing = True
        self.state: MemoryState | None = None
        self.report: UpdateReport | None = None
        self.recent_BKE: Tensor | None = None

    def forward(self, x: Tensor, rows: Rows, layer: Callable[..., Tensor], continues: bool = False) -> Tensor:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget every user: the next call starts from θ_M₀, for any number of rows."""
        self.state = self.report = self.recent_BKE = None

    def state_for(self, users: int) -> MemoryState:
        """The state, made at the first call."""
        if self.state is None:
            self.state = self.memory.new_state(users)
        if self.state.users != users:
            raise ValueError(
                f"the batch has {users} rows, the attached memory holds the states of {self.state.users} users: "
                "call reset() before another batch size"
            )
        return self.state

    def remembered(self, x: Tensor, rows: Rows, continues: bool) -> Tensor:
        """M(x) [B, T, E], each chunk read before it is written; read only when `writing` is off."""
        state = self.state_for(len(x))
        told = _told(rows.front(x), rows.valid_BT)
        if self.writing:
            self.recent_BKE = None
            m, report = self.memory(state, told, rows.valid_BT)
            self.report = _joined([report], rows)
        else:
            # The state stays as it is, so the convolution's past of a reader that decodes is kept here.
            carried = continues and self.recent_BKE is not None
            past = self.recent_BKE if carried and self.recent_BKE is not None else state.history_UKE
            m = self.memory.read(replace(state, history_UKE=past), told, rows.valid_BT)
            self.recent_BKE = _recent(past, told, rows.valid_BT).detach()
            self.report = None
        return rows.back(m).to(x.dtype)

    def gated(self, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
        """x + (y - x) ⊗ m, written so that at gain 0 it is y to the bit."""
        factor = 2 * torch.sigmoid(self.gain_E * _unit(m.float()))
        return y + ((y - x).float() * (factor - 1)).to(y.dtype)

    def added(self, x: Tensor, m: Tensor) -> Tensor:
        """x + gain ⊙ m: x to the bit at gain 0."""
        return x + (self.gain_E * m.float()).to(x.dtype)


class MemoryAsGate(Mode):
    """MAG (section 4.2, eq. 26-28): x + (layer(x) - x) ⊗ M(x).

    The layer's attention, with its own window and cache, and the memory see the same sequence side by side.
    Untrained (gain 0) it is the layer, to the bit.
    """

    def forward(self, x: Tensor, rows: Rows, layer: Callable[..., Tensor], continues: bool = False) -> Tensor:
        m = self.remembered(x, rows, continues)
        return self.gated(x, layer(x), m)


class MemoryAsLayer(Mode):
    """MAL (section 4.3, eq. 29-31): layer(x + gain ⊙ M(x)). Untrained (gain 0) it is the layer, to the bit."""

    def forward(self, x: Tensor, rows: Rows, layer: Callable[..., Tensor], continues: bool = False) -> Tensor:
        return layer(self.added(x, self.remembered(x, rows, continues)))


class MemoryAlone(Mode):
    """LMM (section 4.4): x + gain ⊙ M(x) in the layer's place, which is not called.

    Untrained (gain 0) it passes x on: the decoder without that layer.
    """

    def forward(self, x: Tensor, rows: Rows, layer: Callable[..., Tensor], continues: bool = False) -> Tensor:
        return self.added(x, self.remembered(x, rows, continues))


class MemoryAsContext(Mode):
    """MAC (section 4.1, eq. 21-25), a segment of `spec.chunk_size` tokens after the other:

    1. h = M_{t-1}(q(S)): the memory as the segments before left it (eq. 21);
    2. y = attention over [persistent tokens ‖ h ‖ tokens before S ‖ S] (eq. 22-23). A token sees all persistent
       tokens, h_j for j ≤ i, since h_j is made of token j, and the `spec.window` tokens that end with itself;
    3. M_t = M_{t-1} updated with y (eq. 24);
    4. o = y ⊗ M(y) (eq. 25), with the M that `gate_reads` says.

    Eq. 25 reads M_t, which has been told the whole segment: its gate at token i would know the tokens after i, and a
    language model trained so would see what it is to predict. `gate_reads="before"`, the default, gates with
    M_{t-1}(y): every segment before has been written, nothing of this one, and the model is causal. That read is the
    one that step 3 makes anyway for its gradients. `gate_reads="after"` is eq. 25 to the letter, for texts that are
    only read; only whole segments are causal then.

    Untrained it is not the layer: h and the persistent tokens are new context from the first call on. Each call is a
    sequence of its own for attention, while the memory goes on.
    """

    def __init__(self, memory: NeuralMemory, gate_reads: str = "before") -> None:
        super().__init__(memory, gate_reads)
        self.persistent_PE = nn.Parameter(
            torch.randn(memory.spec.persistent_tokens, memory.spec.width, device=self.gain_E.device) * 0.02
        )

    def forward(self, x: Tensor, rows: Rows, layer: Callable[..., Tensor], continues: bool = False) -> Tensor:
        """`layer` takes a `Context` and gives the segment's [B, S, E]."""
        state, spec = self.state_for(len(x)), self.memory.spec
        front = rows.front(x)
        # Queries are of x, keys and values of y: each has a convolution with a past of its own.
        past_x = past_y = state.history_UKE
        out, reports = [], []
        for start in range(0, x.shape[1], spec.chunk_size):
            segment = slice(start, min(start + spec.chunk_size, x.shape[1]))
            valid, x_S = rows.cut(segment), front[:, segment]
            told = _told(x_S, valid)
            h = self.memory.read(replace(state, history_UKE=past_x), told, valid)
            y = layer(self._context(front, h.to(x.dtype), rows, segment))
            m, report = self._written(state, _told(y, valid), past_y, valid)
            out.append(self.gated(x_S, y, m))
            past_x = _recent(past_x, told, None)
            past_y = _recent(past_y, _told(y, valid), None)
            reports += [report] if report is not None else []
        self.report = _joined(reports, rows) if reports else None
        return rows.back(torch.cat(out, 1))

    def _context(self, front: Tensor, h: Tensor, rows: Rows, segment: slice) -> Context:
        first = max(0, segment.start - self.memory.spec.window + 1)
        persistent = self.persistent_PE.to(h.dtype).expand(len(h), -1, -1)
        return Context(
            hidden_BNE=torch.cat([persistent, h, front[:, first : segment.stop]], 1),
            visible_BNN=self._visible(rows, segment, first, front),
            persistent=len(self.persistent_PE),
            segment=segment,
            first=first,
        )

    def _visible(self, rows: Rows, segment: slice, first: int, front: Tensor) -> Tensor:
        place = torch.arange(segment.stop, device=front.device)
        row, token = place[segment, None], place[None, first:]
        seen = torch.cat(
            [place[None, segment] <= row, (token <= row) & (token > row - self.memory.spec.window)], 1
        )
        seen = F.pad(seen, (len(self.persistent_PE), 0), value=True).expand(len(front), -1, -1)
        if rows.valid_BT is not None:
            there = torch.cat([rows.valid_BT[:, segment], rows.valid_BT[:, first : segment.stop]], 1)
            seen = seen & F.pad(there, (len(self.persistent_PE), 0), value=True)[:, None]
        columns = seen.shape[2]
        visible = torch.eye(columns, dtype=torch.bool, device=front.device).repeat(len(front), 1, 1)
        visible[:, columns - seen.shape[1] :] |= seen
        return visible

    def _written(
        self, state: MemoryState, told: Tensor, past: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, UpdateReport | None]:
        """Steps 3 and 4's read: M(y), and the report of the write."""
        if self.writing and self.gate_reads == "before":
            return self.memory(state, told, valid)
        report = self.memory.update(state, told, valid) if self.writing else None
        return self.memory.read(replace(state, history_UKE=past), told, valid), report


MODES: dict[str, type[Mode]] = {
    "mac": MemoryAsContext,
    "mag": MemoryAsGate,
    "mal": MemoryAsLayer,
    "lmm": MemoryAlone,
}


def _unit(x: Tensor) -> Tensor:
    """The last axis at root mean square 1."""
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


def _told(x: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Hidden states as the memory gets them, float32: unit root mean square, zeros where there is no token."""
    x = x.float()
    return _unit(x if valid_BT is None else torch.where(valid_BT[..., None], x, torch.zeros_like(x)))


def _taken(x: Tensor, index_BT: Tensor) -> Tensor:
    index = index_BT.view(*index_BT.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def _recent(past_BKE: Tensor, x_BTE: Tensor, valid_BT: Tensor | None) -> Tensor:
    """The last K - 1 inputs after these tokens; with `valid_BT`, after each row's own last one."""
    taps = past_BKE.shape[1]
    both = torch.cat([past_BKE.to(x_BTE.dtype), x_BTE], 1)
    if valid_BT is None:
        return both[:, both.shape[1] - taps :]
    return _taken(both, valid_BT.sum(1)[:, None] + torch.arange(taps, device=both.device))


def _joined(reports: list[UpdateReport], rows: Rows) -> UpdateReport:
    """One report of all segments of a call, tokens at the batch's places, without a graph."""
    return UpdateReport(
        surprise=rows.back(torch.cat([r.surprise for r in reports], 1)).detach(),
        written=rows.back(torch.cat([r.written for r in reports], 1)),
        forget=torch.stack([r.forget for r in reports]).mean(0).detach(),
        changed=torch.stack([r.changed for r in reports]).sum(0),
        refused=torch.stack([r.refused for r in reports]).any(0),
    )
