"""What is seen of a token that is to be written: the text on both sides of it; of one that asks: the text before it.

Reading is causal, writing is not: when a segment is folded into a memory, all of it is there. One bidirectional layer
over the decoder's hidden states says which tokens are worth writing and adds to their keys what comes after them, so
that a value told before what it is a value of ("Rex is my dog's name") is found too. Its width is its own, not the
decoder's.

Queries of a decoder whose lower layers were trained with the memory need no such layer: these layers gather a question
at its end. Those of another maker's checkpoint do not, and stay as they are; `Lookback` gathers it there.

`Skim` looks at the text first: which blocks of a long text are worth encoding at all, from token ids alone. Most of a
book holds nothing that the gate would let through, and a few convolutions, a sixtieth of what encoding costs, pass over
nearly all of it. What they pass over is lost, so they are set to keep nearly everything that training has seen written
(`titanmem/skim_training.py`), and text as short as a turn is never skimmed (`titanmem/fold.py`).

Axes: B rows, T tokens, L tokens before them, E decoder width, U width of the layer, A heads, Z head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.attention import attended
from titanmem.cache import window_mask
from titanmem.gradients import RMSNorm
from titanmem.rotary import rotary, rotated

WIDTH, HEADS, FEED = 256, 4, 512
THETA = 10000.0
SKIM_WIDTH, SKIM_TAPS, SKIM_DILATIONS = 64, 7, (1, 2, 4)


class Lookahead(nn.Module):
    """One transformer layer whose attention sees both sides, with query-key norm and SwiGLU."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, WIDTH, bias=False)
        self.attention_norm = RMSNorm(WIDTH, eps=1e-6)
        self.qkv_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_norm = RMSNorm(WIDTH // HEADS, eps=1e-6)
        self.k_norm = RMSNorm(WIDTH // HEADS, eps=1e-6)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = RMSNorm(WIDTH, eps=1e-6)
        self.gate_up_proj = nn.Linear(WIDTH, 2 * FEED, bias=False)
        self.down_proj = nn.Linear(FEED, WIDTH, bias=False)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, hidden_BTE: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """[B, T, E] at root mean square 1 -> [B, T, U] at root mean square 1; padding is where `valid_BT` is False."""
        return self.seen(hidden_BTE, None if valid_BT is None else valid_BT[:, None, None])

    def seen(self, hidden_BTE: Tensor, mask: Tensor | None, before: int = 0) -> Tensor:
        """What each token but the first `before` sees of all, or of those that `mask` shows it."""
        x = self.in_proj(hidden_BTE)
        rows, tokens, _ = x.shape
        parts = self.qkv_proj(self.attention_norm(x)).view(rows, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        turn = rotary(torch.arange(tokens, device=x.device), WIDTH // HEADS, THETA)
        query, key = rotated(self.q_norm(parts[0]), *turn), rotated(self.k_norm(parts[1]), *turn)
        out = attended(query[:, :, before:], key, parts[2], mask)
        x = x[:, before:] + self.o_proj(out.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.down_proj(F.silu(gate) * up)
        return F.rms_norm(x, (WIDTH,))


class Lookback(Lookahead):
    """The same layer, causal, over the last `window` tokens."""

    def __init__(self, hidden_size: int, window: int) -> None:
        super().__init__(hidden_size)
        self.window = window

    def forward(self, hidden_BTE: Tensor, history_BLE: Tensor) -> Tensor:
        """[B, T, E] behind [B, L, E], which is zero before a conversation's first token -> [B, T, U]."""
        before, tokens = history_BLE.shape[1], hidden_BTE.shape[1]
        shown_BS = torch.cat([history_BLE.any(-1), hidden_BTE.new_ones(hidden_BTE.shape[:2]).bool()], 1)
        mask = window_mask(tokens, before, self.window, hidden_BTE.device) & shown_BS[:, None, None]
        return self.seen(torch.cat([history_BLE, hidden_BTE], 1), mask, before)


class Skim(nn.Module):
    """How likely it is that something near a token is worth writing; 21 tokens on either side are seen."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, SKIM_WIDTH)
        self.layers = nn.ModuleList(
            nn.Conv1d(SKIM_WIDTH, SKIM_WIDTH, SKIM_TAPS, padding=SKIM_TAPS // 2 * step, dilation=step)
            for step in SKIM_DILATIONS
        )
        self.out = nn.Conv1d(SKIM_WIDTH, 1, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T]; from 0 on, the text around the token is to be encoded."""
        x = self.embed(tokens_BT).transpose(1, 2)
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return self.out(x)[:, 0] + self.bias
