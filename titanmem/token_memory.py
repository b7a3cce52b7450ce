"""The default memory: shared features, K-sparse codes, one written layer.

θ_M is an MLP of three layers, M(k) = W_3 code(W_2 W_1 k). The first two are the same for every user; only
W_3 is written while a user talks, so W_3 is the user. The key of a token is the text around it and its value is the
token itself; a query is the text before a token: recall is next-token prediction from weights (Titans, arXiv
2501.00663, eq. 11-12, with the key moved back by one token). Lower decoder layers never read the memory, so all of this
comes in parallel.

Axes: B rows, T tokens, E decoder width, D key or value width, U width of the lookahead, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.code_memory import SharedFeatures
from titanmem.lookahead import WIDTH, Lookahead, Lookback, Skim
from titanmem.spec import MemorySpec

FAINT = 0.05
"""How far above `MemorySpec.read_floor` what is read counts in full."""


def unit_rms(x: Tensor) -> Tensor:
    """Scale the last axis to root mean square 1, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


class SparseMemory(SharedFeatures):
    """Projections, features and gates that every user shares (θ_M₀ and the maps around it)."""

    def __init__(self, hidden_size: int, vocab_size: int, spec: MemorySpec) -> None:
        super().__init__(spec)
        width, d_key, d_value = hidden_size, spec.key_dim, spec.value_dim
        self.key_proj = nn.Linear(width, d_key)
        self.query_proj = nn.Linear(width, d_key)
        self.value_proj = nn.Linear(width, d_value, bias=False)
        self.out_proj = nn.Linear(d_value, width, bias=False)
        self.out_scale = nn.Parameter(torch.tensor(float(width) ** 0.5))
        self.key_conv = nn.Parameter(torch.empty(d_key, spec.conv))
        self.query_conv = nn.Parameter(torch.empty(d_key, spec.conv))
        self.skim = Skim(vocab_size)
        self.lookahead = Lookahead(width)
        self.around_proj = nn.Linear(WIDTH, d_key, bias=False)
        if spec.lookback:
            self.lookback = Lookback(width, spec.lookback)
            self.behind_proj = nn.Linear(WIDTH, d_key, bias=False)
        self.gate_in = nn.Linear(WIDTH, 64)
        self.gate_out = nn.Linear(64, 1)
        self.mag_proj = nn.Linear(d_value, width, bias=False)
        self.pointer = nn.Linear(width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: queries equal keys, newer tokens count more, W_2 a random direction a unit."""
        spec = self.spec
        with torch.no_grad():
            self.query_proj.weight.copy_(self.key_proj.weight)
            self.query_proj.bias.copy_(self.key_proj.bias)
            nn.init.orthogonal_(self.value_proj.weight)
            self.out_proj.weight.copy_(self.value_proj.weight.T)
            age = torch.arange(spec.conv).flip(0).float()
            taps = torch.where(age == 0, torch.ones(spec.conv), 0.1 * torch.exp(-age / 8))
            self.key_conv.copy_(taps.expand_as(self.key_conv))
            self.query_conv.copy_(taps.expand_as(self.query_conv))
            self.gate_out.bias.fill_(-3.0)
            nn.init.zeros_(self.around_proj.weight)
            if spec.lookback:
                nn.init.zeros_(self.behind_proj.weight)
            nn.init.zeros_(self.mag_proj.weight)
            nn.init.zeros_(self.pointer.weight)
            self.pointer.bias.fill_(0.54)

    def behind(self, hidden_BTE: Tensor, history_BCE: Tensor) -> Tensor | None:
        """What `MemorySpec.lookback` gathers up to each token, [B, T, U]; None where there is no such layer."""
        return self.lookback(hidden_BTE, history_BCE) if self.spec.lookback else None

    def queries(self, hidden_BTE: Tensor, history_BCE: Tensor, behind_BTU: Tensor | None = None) -> Tensor:
        """Query q_t from the tokens up to t, [B, T, D] at rms 1; `history_BCE`: the `MemorySpec.history` hidden states
        before, `behind_BTU`: what `behind` says of the same, where it is known already."""
        hidden = torch.cat([history_BCE[:, history_BCE.shape[1] - self.spec.conv + 1 :], hidden_BTE], 1)
        query = _convolved(self.query_proj(hidden), self.query_conv)
        if self.spec.lookback:
            behind = self.behind(hidden_BTE, history_BCE) if behind_BTU is None else behind_BTU
            query = query + self.behind_proj(behind)
        return unit_rms(query)

    def keys(self, hidden_BTE: Tensor, around_BTU: Tensor) -> Tensor:
        """Key k_t of each token from the tokens up to t-1 and what `lookahead` saw around it, [B, T, D] at rms 1."""
        before = F.pad(self.key_proj(hidden_BTE), (0, 0, self.spec.conv, 0))[:, :-1]
        return unit_rms(_convolved(before, self.key_conv) + self.around_proj(around_BTU))

    def gate_logit(self, around_BTU: Tensor) -> Tensor:
        """Logit of the write gate w_t, [B, T]: how much this token is worth keeping."""
        return self.gate_out(F.relu(self.gate_in(around_BTU)))[..., 0]

    def vocabulary_values(self, embedding_VE: Tensor) -> Tensor:
        """Value of each token of the vocabulary, unit norm, float32 [V, D]."""
        return F.normalize(self.value_proj(unit_rms(embedding_VE)).float(), dim=-1)

    def heard(self, read_BTD: Tensor) -> Tensor:
        """What was read, or zero where it is too faint to be more than a resemblance, [B, T, D]."""
        floor = self.spec.read_floor
        if floor == 0.0:
            return read_BTD
        norm_BT1 = read_BTD.norm(dim=-1, keepdim=True)
        return read_BTD * ((norm_BT1 - floor) / FAINT).clamp(0.0, 1.0)

    def as_context(self, read_BTD: Tensor) -> Tensor:
        """What was read, as a token of the decoder's width for attention to see (mode `mac`), [B, T, E]."""
        return self.out_scale * self.out_proj(self.heard(read_BTD))

    def as_gate(self, read_BTD: Tensor) -> Tensor:
        """What was read, as a factor in (0, 2) on what a layer adds (mode `mag`), [B, T, E]; 1 for nothing."""
        return 2.0 * torch.sigmoid(self.mag_proj(self.heard(read_BTD)))

    def pointer_logits(self, out_BTE: Tensor, read_BTD: Tensor, values_VD: Tensor) -> Tensor:
        """Logits that the memory adds: what was read, scored against the value of every token, float32 [B, T, V]."""
        strength = 8.0 * F.softplus(self.pointer(out_BTE).float())
        return (strength * self.heard(read_BTD).float()) @ values_VD.T


def _convolved(projected_BSD: Tensor, taps_DC: Tensor) -> Tensor:
    out = F.conv1d(projected_BSD.transpose(1, 2), taps_DC[:, None], groups=len(taps_DC))
    return out.transpose(1, 2)
