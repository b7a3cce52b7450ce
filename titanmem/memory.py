"""`NeuralMemory`: a neural long-term memory as a module, for one user or for many (Titans, arXiv 2501.00663).

The module holds what all users share: projections, gates and θ_M₀. What a user has learnt is a `MemoryState`, which
`update` changes and `read` does not. Tokens of one call are cut into chunks of `spec.chunk_size`; all gradients of a
chunk are taken at its start, and a call's end ends a chunk. Without `torch.no_grad` everything has a gradient, so the
shared part can be meta-learned through updates.

Axes: U users, T tokens of a call, C of a chunk, E model width, D memory width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titanmem import code_memory
from titanmem.code_memory import SharedFeatures
from titanmem.dense_memory import DenseMemory
from titanmem.projections import Projection
from titanmem.spec import MemorySpec
from titanmem.state import MemoryState, UpdateReport, Written, finite_users

PADDING = 16
"""A call's tokens are padded to a multiple of this, or are one: with other row counts the BLAS chooses its routine by
what else is in the batch, and a user's bits would depend on neighbours (tests/titanmem/test_memory.py)."""


@dataclass(kw_only=True, slots=True)
class _Call:
    """One call's tokens after the projections, for users who have equally many."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    valid_UT: Tensor


class NeuralMemory(nn.Module):
    """A memory of `spec` between hidden states of `spec.width`.

    Raises ValueError for a spec without a width.
    """

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__()
        if spec.width < 1:
            raise ValueError("memory.width = 0: say how wide the hidden states are that the memory reads")
        self.spec = spec
        width, taps = spec.width, spec.conv
        key_dim, value_dim = (spec.d_nltm, spec.d_nltm) if spec.writes_all else (spec.key_dim, spec.value_dim)
        self.query = Projection(width, key_dim, taps, normalised=True)
        self.key = Projection(width, key_dim, taps, normalised=True)
        self.value = Projection(width, value_dim, taps, normalised=not spec.writes_all)
        self.out = nn.Identity() if value_dim == width else nn.Linear(value_dim, width, bias=False)
        with torch.no_grad():  # a memory that has just been told x says so when it is asked with x
            self.query.linear.weight.copy_(self.key.linear.weight)
        self.dense = DenseMemory(width, spec) if spec.writes_all else None
        if not spec.writes_all:
            self.features = SharedFeatures(spec)
            self.write_gate = nn.Linear(width, 1)
            nn.init.zeros_(self.write_gate.weight)
            nn.init.constant_(self.write_gate.bias, 3.0)

    # -- state ---------------------------------------------------------------------------------------------------

    def new_state(self, users: int, dtype: torch.dtype = torch.float32) -> MemoryState:
        """θ_M₀ for each of `users`. `dtype` is that of the weights; sums are made in float32."""
        spec, device = self.spec, self.key.linear.weight.device
        if self.dense is not None:
            weights, momentum = self.dense.new_weights(users), self.dense.new_momentum(users)
        else:
            weights = [torch.zeros(users, *spec.written_shape, device=device)]
            momentum = [torch.zeros(users, 1, device=device)]
        return MemoryState(
            weights=[x.to(dtype) for x in weights],
            momentum=[x.to(dtype) if x.dim() == 3 else x for x in momentum],
            history_UKE=torch.zeros(users, spec.conv - 1, spec.width, device=device),
            updates_U=torch.zeros(users, dtype=torch.int64, device=device),
        )

    # -- the four verbs --------------------------------------------------------------------------------------------

    def read(self, state: MemoryState, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """y = M(q), [U, T, E], from the state as it is; nothing is written (Titans, eq. 15).

        `valid` bool [U, T] says which tokens exist; others are read as nothing came there.
        """
        out: Tensor | None = None
        for users, call, part in self._calls(state, x, valid):
            y = self.out(self._read(part.weights, call.query))
            out = _placed(out, users, _fitted(y, x.shape[1]), len(x))
        return x.new_zeros(*x.shape[:2], self.spec.width) if out is None else out

    def update(self, state: MemoryState, x: Tensor, valid: Tensor | None = None) -> UpdateReport:
        """Write x [U, T, E] into the users' θ_M, chunk by chunk.

        A user whose input, state or result is not finite is refused, reported, and keeps the state it had.
        Raises ValueError for shapes that do not fit.
        """
        return self._walk(state, x, valid, reads=False)[1]

    def forward(
        self, state: MemoryState, x: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, UpdateReport]:
        """`read` and `update` in one walk: each chunk reads the memory that the chunks before it left, then writes."""
        return self._walk(state, x, valid, reads=True)

    def surprise(self, state: MemoryState, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalised norm of each token's gradient at the state as it is, [U, T]; nothing is written."""
        out = x.new_zeros(x.shape[:2])
        for users, call, part in self._calls(state, x, valid):
            found = self._surprise(part, call) * call.valid_UT
            out = out.index_put((users,), _fitted(found, x.shape[1]))
        return out

    @torch.no_grad()
    def decay(self, state: MemoryState, alpha: float) -> None:
        """Forget the share `alpha` of everything: W <- (1 - alpha) W. Raises ValueError for a share outside [0, 1]."""
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha = {alpha}: must be from 0 to 1")
        state.weights = [W * (1 - alpha) for W in state.weights]

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Measure on text what is ordinary: the scale of surprise, or the whitening of shared features.

        `x` [U, T, E] are hidden states as the memory will see them, some thousand tokens or more.
        """
        state = self.new_state(len(x))
        call = next(iter(self._calls(state, x, None)))[1]
        if self.dense is not None:
            found = self.dense.read_and_gradients(state.weights, None, call.key, call.value)[2]
            self.dense.surprise_scale_L.copy_(found.norm_LUC.flatten(1).mean(1).clamp_min(1e-6))
            return
        features = self.features.features(call.key.flatten(0, 1))
        self.features.whiten(features.mean(0), torch.cov(features.T))

    # -- one walk over chunks --------------------------------------------------------------------------------------

    def _walk(
        self, state: MemoryState, x: Tensor, valid: Tensor | None, *, reads: bool
    ) -> tuple[Tensor, UpdateReport]:
        self._check(state, x, valid)
        users, tokens = x.shape[:2]
        finite = finite_users(x) & state.finite()
        if not bool(finite.all()):
            valid = finite[:, None] & (torch.ones_like(x[..., 0]).bool() if valid is None else valid)
            x = torch.where(finite[:, None, None], x, 0.0)
        out: Tensor | None = None
        surprise = torch.zeros(users, tokens, device=x.device)
        written = torch.zeros(users, tokens, dtype=torch.bool, device=x.device)
        forget = torch.zeros(users, device=x.device)
        changed = torch.zeros(users, dtype=torch.int64, device=x.device)
        refused = ~finite
        for group, call, part in self._calls(state, x, valid):
            part, read, chunks = self._chunks(part, call, reads=reads)
            good = part.finite() & finite[group]
            refused[group[~good]] = True
            if reads and read:
                out = _placed(out, group, _fitted(self.out(torch.cat(read, 1)), tokens), users)
            surprise = surprise.index_put(
                (group,), _fitted(torch.cat([c.surprise_UC for c in chunks], 1), tokens)
            )
            written[group] = _fitted(torch.cat([c.written_UC for c in chunks], 1), tokens) & good[:, None]
            forget[group] = torch.stack([c.forget_U for c in chunks]).mean(0).detach().float() * good
            changed[group] = torch.stack([c.changed_U for c in chunks]).sum(0) * good
            if not bool(good.all()):
                part = part.of(good)
            state.put(_mask(group[good], users), part)
        out = x.new_zeros(users, tokens if reads else 0, self.spec.width) if out is None else out
        return out, UpdateReport(
            surprise=surprise, written=written, forget=forget, changed=changed, refused=refused
        )

    def _chunks(
        self, part: MemoryState, call: _Call, *, reads: bool
    ) -> tuple[MemoryState, list[Tensor], list[Written]]:
        """Every chunk of a call in order; the state after the last."""
        read, chunks = [], []
        weights, momentum, updates = part.weights, part.momentum, part.updates_U
        if not torch.is_grad_enabled():
            # A copy that chunks may change in place: a user who is refused keeps the old one.
            weights, momentum = [x.clone() for x in weights], [x.clone() for x in momentum]
        for start in range(0, call.hidden.shape[1], self.spec.chunk_size):
            cut = slice(start, start + self.spec.chunk_size)
            y, done = self._chunk(weights, momentum, call, cut, reads=reads)
            if y is not None:
                read.append(y)
            chunks.append(done)
            weights = [new.to(old.dtype) for new, old in zip(done.weights, weights, strict=True)]
            momentum = [new.to(old.dtype) for new, old in zip(done.momentum, momentum, strict=True)]
            updates = updates + done.written_UC.any(1)
        after = MemoryState(
            weights=weights, momentum=momentum, history_UKE=self._history(part, call), updates_U=updates
        )
        return after, read, chunks

    def _chunk(
        self, weights: list[Tensor], momentum: list[Tensor], call: _Call, cut: slice, *, reads: bool
    ) -> tuple[Tensor | None, Written]:
        key, value, valid = call.key[:, cut], call.value[:, cut], call.valid_UT[:, cut]
        query = call.query[:, cut] if reads else None
        if self.dense is None:
            y = None if query is None else code_memory.read(self.features, weights[0], query)
            gate = self.write_gate(call.hidden[:, cut])[..., 0].sigmoid()
            return y, code_memory.write(self.features, weights[0], momentum[0], key, value, gate, valid)
        y, W, found = self.dense.read_and_gradients(weights, query, key, value)
        if self.spec.rule == "titans":
            gates = self.dense.gates(call.hidden[:, cut])
            return y, self.dense.write_titans(weights, momentum, W, found, gates, valid)
        return y, self.dense.write_sparse(weights, momentum[0], found, valid)

    def _read(self, weights: list[Tensor], query: Tensor) -> Tensor:
        if self.dense is None:
            return code_memory.read(self.features, weights[0], query)
        return self.dense.read(weights, query)

    def _surprise(self, part: MemoryState, call: _Call) -> Tensor:
        if self.dense is not None:
            found = self.dense.read_and_gradients(part.weights, None, call.key, call.value)[2]
            return self.dense.surprise(found)
        read = code_memory.read(self.features, part.weights[0], call.key)
        return self.write_gate(call.hidden)[..., 0].sigmoid() * (call.value - read).norm(dim=-1)

    # -- users with equally many tokens, projected -------------------------------------------------------------------

    def _calls(
        self, state: MemoryState, x: Tensor, valid: Tensor | None
    ) -> Iterator[tuple[Tensor, _Call, MemoryState]]:
        """Groups of users whose tokens fill the same length: who they are (int64), their tokens, their state."""
        self._check(state, x, valid)
        if not x.shape[1]:
            return
        if valid is None:
            everyone = torch.arange(len(x), device=x.device)
            yield everyone, self._call(state, x, None), state
            return
        place = torch.arange(1, x.shape[1] + 1, device=x.device)
        length_U = _padded_length((valid * place).amax(1))
        for length in length_U.unique().tolist():
            users = (length_U == length).nonzero()[:, 0]
            part = state if len(users) == len(x) else state.of(users)
            yield users, self._call(part, _fitted(x[users], length), _fitted(valid[users], length)), part

    def _check(self, state: MemoryState, x: Tensor, valid: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[2] != self.spec.width or len(x) != state.users:
            raise ValueError(
                f"x {tuple(x.shape)}: must be [{state.users} users, tokens, {self.spec.width} width]"
            )
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
            raise ValueError(f"valid {tuple(valid.shape)} {valid.dtype}: must be bool {tuple(x.shape[:2])}")

    def _call(self, part: MemoryState, x: Tensor, valid: Tensor | None) -> _Call:
        length = int(_padded_length(torch.tensor(x.shape[1])))
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            x = torch.where(valid[..., None], x, 0.0)
        x, valid = _fitted(x, length), _fitted(valid, length)
        before = torch.cat([part.history_UKE.to(x.dtype), x], 1) if self.spec.conv > 1 else x
        return _Call(
            query=self.query(before), key=self.key(before), value=self.value(before), hidden=x, valid_UT=valid
        )

    def _history(self, part: MemoryState, call: _Call) -> Tensor:
        """The last taps - 1 inputs up to each user's last token."""
        taps = self.spec.conv - 1
        place = torch.arange(1, call.valid_UT.shape[1] + 1, device=call.valid_UT.device)
        end_U = (call.valid_UT * place).amax(1)
        both = torch.cat([part.history_UKE, call.hidden.to(part.history_UKE.dtype)], 1)
        index = end_U[:, None] + torch.arange(taps, device=end_U.device)
        return both.gather(1, index[..., None].expand(-1, -1, both.shape[2])).detach()


def _padded_length(tokens_U: Tensor) -> Tensor:
    """1 or a multiple of `PADDING`, int64."""
    return torch.where(tokens_U <= 1, 1, (tokens_U + PADDING - 1) // PADDING * PADDING)


def _fitted(x_UT: Tensor, tokens: int) -> Tensor:
    """The same rows with `tokens` tokens: cut, or filled with zeros at the end."""
    missing = tokens - x_UT.shape[1]
    if missing <= 0:
        return x_UT[:, :tokens]
    return torch.cat([x_UT, x_UT.new_zeros(len(x_UT), missing, *x_UT.shape[2:])], 1)


def _placed(out: Tensor | None, users: Tensor, part: Tensor, count: int) -> Tensor:
    """`part` as the rows `users` of `count` rows; the others as in `out`, zeros where there is none yet."""
    if len(users) == count:
        return part
    out = part.new_zeros(count, *part.shape[1:]) if out is None else out
    return out.index_put((users,), part)


def _mask(users: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool, device=users.device)
    mask[users] = True
    return mask
