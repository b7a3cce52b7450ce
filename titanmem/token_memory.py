"""The default memory: shared features, K-sparse codes, one written layer.

θ_M is an MLP of three layers, M(k) = W_3 code(W_2 W_1 k). The first two are the same for every user; only
W_3 is written while a user talks, so W_3 is the user. The key of a token is the text around it and its value is the
token itself; a query is the text before a token: recall is next-token prediction from weights (Titans, arXiv
2501.00663, eq. 11-12, with the key moved back by one token). Lower decoder layers never read the memory, so all of this
comes in parallel.

Axes: B rows, T tokens, E decoder width, D key or value width, F features, L width of the words' half of a key,
U width of the lookahead, V vocabulary, C taps, P tokens that are looked back on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.binding import held, later, prefixes, signs
from titanmem.cache import Past
from titanmem.code_memory import SharedFeatures
from titanmem.lookahead import WIDTH, Lookahead, Skim
from titanmem.spec import MemorySpec
from titanmem.wording import Wording, spaced, spellings


def unit_rms(x: Tensor) -> Tensor:
    """Scale the last axis to root mean square 1, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


class SparseMemory(SharedFeatures):
    """Projections, features and gates that every user shares (θ_M₀ and the maps around it).

    Keys and queries are `key_dim` wide: one half says what is meant, the other the words it is said in
    (`titanmem/wording.py`). Features are what codes are taken of: keys, whitened and bound (`titanmem/binding.py`).
    """

    spelling_V: Tensor
    spaced_V: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, spec: MemorySpec) -> None:
        super().__init__(spec)
        width, d_value = hidden_size, spec.value_dim
        sense = spec.key_dim - spec.words_dim
        self.query_proj = nn.Linear(width, sense)
        self.query_conv = nn.Parameter(torch.empty(sense, spec.conv))
        self.value_proj = nn.Linear(width, d_value, bias=False)
        self.out_proj = nn.Linear(d_value, width, bias=False)
        self.out_scale = nn.Parameter(torch.tensor(float(width) ** 0.5))
        self.skim = Skim(vocab_size)
        self.lookahead = Lookahead(width)
        self.around_proj = nn.Linear(WIDTH, sense, bias=False)
        self.wording = Wording(width, vocab_size, spec.words_dim)
        self.wording_scale = nn.Parameter(torch.tensor(0.8))
        """Length of the words' half beside that of what is meant."""
        self.gate_in = nn.Linear(WIDTH, 64)
        self.gate_out = nn.Linear(64, 1)
        self.reciting = nn.Linear(width, 1)
        self.mag_proj = nn.Linear(d_value, width, bias=False)
        self.pointer = nn.Linear(width, 1)
        self.register_buffer("spelling_V", spellings({}, vocab_size), persistent=False)
        self.register_buffer("spaced_V", torch.arange(vocab_size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: newer tokens count more in a query, W_2 a random direction a unit."""
        spec = self.spec
        with torch.no_grad():
            nn.init.orthogonal_(self.value_proj.weight)
            self.out_proj.weight.copy_(self.value_proj.weight.T)
            age = torch.arange(spec.conv).flip(0).float()
            taps = torch.where(age == 0, torch.ones(spec.conv), 0.1 * torch.exp(-age / 8))
            self.query_conv.copy_(taps.expand_as(self.query_conv))
            self.gate_out.bias.fill_(-3.0)
            self.reciting.bias.fill_(-3.0)
            nn.init.normal_(self.around_proj.weight, std=0.02)
            nn.init.zeros_(self.reciting.weight)
            nn.init.zeros_(self.mag_proj.weight)
            nn.init.zeros_(self.pointer.weight)
            self.pointer.bias.fill_(0.54)

    def spell(self, vocabulary: Mapping[str, int]) -> None:
        """Take the spellings of a tokenizer's tokens; without any, each token is a word of its own."""
        size = len(self.spelling_V)
        self.spelling_V = spellings(vocabulary, size)
        self.spaced_V = torch.arange(size)
        for start, behind in spaced(vocabulary).items():
            self.spaced_V[start] = behind

    def features_of(self, key: Tensor, prefix: Tensor) -> Tensor:
        """Keys or queries [..., D], bound to what has been said of a value, int64 [...], as features [..., F]."""
        return self.whitened(key) * signs(prefix, self.spec.d_nltm)

    def asked(
        self, hidden_BTE: Tensor, tokens_BT: Tensor, past: Past, reciting_BT: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """What each place asks the memory for, as features [B, T, F], and its `Past` at every place, [B, T, …].

        `reciting_BT`: which tokens are part of a value that the reply recites; None lets the memory tell by itself.
        While it recites, the question stays what it was, and only what it is bound to moves on.
        """
        if reciting_BT is None:
            reciting_BT = self.reciting_logit(hidden_BTE) > 0
        spelled_BT = self.spelling_V[tokens_BT]
        words_BTL, sums_BTL = self.wording.asked(hidden_BTE, tokens_BT, spelled_BT, past.words_BL)
        query_BTD = self._joined(self.sense_asked(hidden_BTE, past.hidden_BCE), words_BTL)
        question_BTD = held(query_BTD, reciting_BT, past.question_BD)
        recited_BT = spelled_BT * reciting_BT
        query_BTF = self.features_of(question_BTD, prefixes(recited_BT, past.recited_BP))
        return query_BTF, Past(hidden_BTE, sums_BTL, question_BTD, recited_BT)

    def queries(self, hidden_BTE: Tensor, tokens_BT: Tensor, reciting_BT: Tensor | None = None) -> Tensor:
        """The same, [B, T, F], for whole rows that nothing stands before."""
        past = Past.none(self.spec, hidden_BTE.shape[-1], len(hidden_BTE), hidden_BTE.device)
        return self.asked(hidden_BTE, tokens_BT, past, reciting_BT)[0]

    def told(
        self,
        hidden_BTE: Tensor,
        around_BTU: Tensor,
        tokens_BT: Tensor,
        value_BT: Tensor,
        valid_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [B, T, D], what they are bound to [B, T] and which token is stored, int64 [B, T], of each token.

        `value_BT`: which tokens are values; a run of them is one, and has the key of its first token.
        """
        spelled_BT = self.spelling_V[tokens_BT]
        about_BT = ~value_BT if valid_BT is None else valid_BT & ~value_BT
        words_BTL = self.wording.told(around_BTU, tokens_BT, spelled_BT, about_BT)
        key_BTD = self._joined(unit_rms(self.around_proj(around_BTU)), words_BTL)
        goes_on_BT = value_BT & later(value_BT)
        key_BTD = held(key_BTD, goes_on_BT, key_BTD[:, 0])
        prefix_BT = later(prefixes(spelled_BT * value_BT))
        # A value at the very start of a text is recalled behind a space.
        stored_BT = torch.where(goes_on_BT, tokens_BT, self.spaced_V[tokens_BT])
        return key_BTD, prefix_BT, stored_BT

    def sense_asked(self, hidden_BTE: Tensor, before_BCE: Tensor) -> Tensor:
        """What is meant by the tokens up to each, [B, T, D/2] at rms 1."""
        hidden = torch.cat([before_BCE[:, 1:], hidden_BTE], 1)
        return unit_rms(_convolved(self.query_proj(hidden), self.query_conv))

    def _joined(self, sense: Tensor, words: Tensor) -> Tensor:
        return torch.cat([sense, self.wording_scale * sense.shape[-1] ** 0.5 * words], -1)

    def reciting_logit(self, hidden_BTE: Tensor) -> Tensor:
        """Logit of a token being part of a value in a reply, [B, T]."""
        return self.reciting(hidden_BTE)[..., 0]

    def gate_logit(self, around_BTU: Tensor) -> Tensor:
        """Logit of the write gate w_t, [B, T]: how much this token is worth keeping."""
        return self.gate_out(F.relu(self.gate_in(around_BTU)))[..., 0]

    def vocabulary_values(self, embedding_VE: Tensor) -> Tensor:
        """Value of each token of the vocabulary, unit norm, float32 [V, D]."""
        return F.normalize(self.value_proj(unit_rms(embedding_VE)).float(), dim=-1)

    def as_context(self, read_BTD: Tensor) -> Tensor:
        """What was read, as a token of the decoder's width for attention to see (mode `mac`), [B, T, E]."""
        return self.out_scale * self.out_proj(read_BTD)

    def as_gate(self, read_BTD: Tensor) -> Tensor:
        """What was read, as a factor in (0, 2) on what a layer adds (mode `mag`), [B, T, E]; 1 for nothing."""
        return 2.0 * torch.sigmoid(self.mag_proj(read_BTD))

    def pointer_logits(self, out_BTE: Tensor, read_BTD: Tensor, values_VD: Tensor) -> Tensor:
        """Logits that the memory adds: what was read, scored against the value of every token, float32 [B, T, V]."""
        strength = 8.0 * F.softplus(self.pointer(out_BTE).float())
        return strength * (read_BTD.float() @ values_VD.T)


def _convolved(projected_BSD: Tensor, taps_DC: Tensor) -> Tensor:
    out = F.conv1d(projected_BSD.transpose(1, 2), taps_DC[:, None], groups=len(taps_DC))
    return out.transpose(1, 2)
