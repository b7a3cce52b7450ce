"""θ_F: one compact Llama-family decoder with a memory between its lower and its upper layers.

Pre-RMSNorm, rotary positions, SwiGLU, sliding-window attention; norms and biases as the config says (the shipped
layout is Qwen3's). The first upper layer meets what the memory said (Titans, section 4): in mode `mac` it attends over
[what was said for each token of the window || the tokens of the window] (eq. 21-23), in `mag` what it adds is scaled by
a gate of it (eq. 27-28), in `mal` it works on the sum of its input and of what was said (eq. 29-31).

Two ways through the same weights: `blocks` for many tokens at once without a cache (training, folding a segment),
`cached` for a conversation (prefill by chunk, then token by token).

Axes: B rows, T tokens, W window, N blocks, A heads, Z head width, E width, D memory value width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.attention import attended
from titanmem.cache import Cache, window_mask
from titanmem.decoder_config import DecoderConfig
from titanmem.gradients import RMSNorm
from titanmem.no_memory import NoMemory
from titanmem.rotary import rotary, rotated
from titanmem.token_memory import SparseMemory, unit_rms


def beside(mask: Tensor, said_BS: Tensor) -> Tensor:
    """The mask of a layer that attends to what the memory said beside the tokens, [B, 1, T, 2 S].

    Where it said nothing there is nothing to attend to: an empty memory leaves the decoder as it is.
    """
    return torch.cat([mask & said_BS[:, None, None], mask.expand(len(said_BS), -1, -1, -1)], 3)


class Attention(nn.Module):
    """Sliding-window attention with optional extra context at the same positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=config.o_bias)
        self.q_norm = RMSNorm(head, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def split(self, x_BTX: Tensor) -> Tensor:
        """[B, T, A*Z] -> [B, A, T, Z]."""
        rows, tokens, _ = x_BTX.shape
        return x_BTX.view(rows, tokens, -1, self.config.head_dim).transpose(1, 2)

    def queries(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        return rotated(self.q_norm(self.split(self.q_proj(x))), *turn)

    def keys_values(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return rotated(self.k_norm(self.split(self.k_proj(x))), *turn), self.split(self.v_proj(x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of [B, A, T, Z] over [B, A', S, Z], merged and projected to [B, T, E]."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return self.o_proj(attended(query, key, value, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.window = config.memory.window

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))

    def blocks(self, x_BTE: Tensor, turn: tuple[Tensor, Tensor], context_BTE: Tensor | None) -> Tensor:
        """All T tokens at once, T a multiple of the window or below it; each block sees itself and the one before."""
        attention, window = self.self_attn, self.window
        normed = self.input_layernorm(x_BTE)
        query = attention.queries(normed, turn)
        sources = [attention.keys_values(normed, turn)]
        said_BT = None
        if context_BTE is not None:
            sources.insert(0, attention.keys_values(context_BTE, turn))
            said_BT = context_BTE.any(-1)
        tokens = x_BTE.shape[1]
        first = min(window, tokens)
        causal = window_mask(first, 0, window, x_BTE.device)
        outs = [
            attention.attend(
                query[:, :, :first],
                torch.cat([key[:, :, :first] for key, _ in sources], 2),
                torch.cat([value[:, :, :first] for _, value in sources], 2),
                causal if said_BT is None else beside(causal[None, None], said_BT[:, :first]),
            )
        ]
        if tokens > window:
            outs.append(self._later_blocks(query, sources, said_BT))
        return self.finish(x_BTE, torch.cat(outs, 1))

    def _later_blocks(
        self, query: Tensor, sources: list[tuple[Tensor, Tensor]], said_BT: Tensor | None
    ) -> Tensor:
        """Blocks 1.. of `blocks`: blocks become rows, so that one call serves them all."""
        attention, window = self.self_attn, self.window
        rows, _, tokens, head = query.shape
        count = tokens // window - 1

        def cut(x: Tensor, start: int) -> Tensor:
            part = x[:, :, start : start + count * window]
            part = part.reshape(rows, x.shape[1], count, window, head)
            return part.transpose(1, 2).reshape(rows * count, x.shape[1], window, head)

        key = torch.cat([cut(k, start) for k, _ in sources for start in (0, window)], 2)
        value = torch.cat([cut(v, start) for _, v in sources for start in (0, window)], 2)
        mask = window_mask(window, window, window, query.device)
        if said_BT is not None:
            pairs = said_BT.unfold(1, 2 * window, window).reshape(rows * count, 2 * window)
            mask = beside(mask[None, None], pairs)
        out = attention.attend(cut(query, window), key, value, mask)
        return out.view(rows, count * window, -1)

    def cached(
        self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Cache, layer: int, context_BTE: Tensor | None
    ) -> Tensor:
        """T new tokens of B conversations behind what `cache` holds."""
        attention = self.self_attn
        normed = self.input_layernorm(x)
        query = attention.queries(normed, turn)
        sources = [(layer, attention.keys_values(normed, turn))]
        if context_BTE is not None:
            sources.insert(0, (cache.context_layer, attention.keys_values(context_BTE, turn)))
        mask = cache.mask()
        if context_BTE is not None:
            mask = beside(mask, cache.said(context_BTE.any(-1)))
        seen = [cache.extended(index, *key_value) for index, key_value in sources]
        key = torch.cat([k for k, _ in seen], 2) if len(seen) > 1 else seen[0][0]
        value = torch.cat([v for _, v in seen], 2) if len(seen) > 1 else seen[0][1]
        return self.finish(x, attention.attend(query, key, value, mask))


class Decoder(nn.Module):
    """θ_F with the shared part of θ_M."""

    embed_conv: nn.Parameter
    """[E, taps]; None at run time where the config has no convolution."""
    memory: SparseMemory

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        taps = config.embedding_conv
        self.register_parameter(
            "embed_conv", nn.Parameter(torch.zeros(config.hidden_size, taps)) if taps > 1 else None
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        """Of `Layer`; see `stack`, which has their type."""
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        kind = SparseMemory if config.remembers else NoMemory
        self.memory = kind(config.hidden_size, config.vocab_size, config.memory)

    @property
    def stack(self) -> list[Layer]:
        """The layers, lowest first."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def embed(self, tokens_BT: Tensor, before_BCE: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings plus a short causal convolution over them; `before_BCE` are the taps - 1 rows before.

        Returns x [B, T, E] and the plain embeddings with those before them, [B, T + taps - 1, E].
        """
        plain = torch.cat([before_BCE, self.embed_tokens(tokens_BT)], 1)
        if self.config.embedding_conv == 1:
            return plain, plain
        taps = self.embed_conv
        mixed = F.conv1d(plain.transpose(1, 2), taps[:, None], groups=len(taps)).transpose(1, 2)
        return plain[:, before_BCE.shape[1] :] + mixed, plain

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosine and sine, ready to broadcast over heads."""
        config = self.config
        cosine, sine = rotary(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        return (cosine[:, None], sine[:, None]) if positions.dim() == 2 else (cosine, sine)

    def zeros(self, rows: int, tokens: int) -> Tensor:
        return self.embed_tokens.weight.new_zeros(rows, tokens, self.config.hidden_size)

    def lower_blocks(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Layers below the memory for whole rows: residual stream x and memory input h, both [B, T, E]."""
        x, _ = self.embed(tokens_BT, self.zeros(len(tokens_BT), self.config.embedding_conv - 1))
        turn = self.turn(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for layer in self.stack[: self.config.memory_layer]:
            x = layer.blocks(x, turn, None)
        return x, unit_rms(x)

    def met(
        self, x: Tensor, read_BTD: Tensor, mode: str, layer: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """The first upper layer, a function of [B, T, E] and a context, where it meets the memory."""
        if not self.config.remembers:
            return layer(x, None)
        if mode == "mag":
            return x + (layer(x, None) - x) * self.memory.as_gate(read_BTD)
        context = self.memory.as_context(read_BTD)
        return layer(x, context) if mode == "mac" else layer(x + context, None)

    def upper_blocks(self, x_BTE: Tensor, read_BTD: Tensor, mode: str = "mac") -> Tensor:
        """Layers from the memory on, for whole rows: normalised output [B, T, E]."""
        turn = self.turn(torch.arange(x_BTE.shape[1], device=x_BTE.device))
        first, *others = self.stack[self.config.memory_layer :]
        x_BTE = self.met(x_BTE, read_BTD, mode, lambda x, context: first.blocks(x, turn, context))
        for layer in others:
            x_BTE = layer.blocks(x_BTE, turn, None)
        return self.norm(x_BTE)

    def lower_cached(self, tokens_BT: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Layers below the memory for T new tokens of B conversations: x [B, T, E], queries [B, T, D]."""
        x, plain = self.embed(tokens_BT, cache.embeddings)
        turn = self.turn(cache.new_positions)
        for index, layer in enumerate(self.stack[: self.config.memory_layer]):
            x = layer.cached(x, turn, cache, index, None)
        hidden = unit_rms(x)
        query = self.memory.queries(hidden, cache.history)
        cache.keep(plain, hidden)
        return x, query

    def upper_cached(self, x_BTE: Tensor, read_BTD: Tensor, cache: Cache, mode: str = "mac") -> Tensor:
        """Layers from the memory on for the same tokens: normalised output [B, T, E]; then `cache.advance`."""
        turn, first = self.turn(cache.new_positions), self.config.memory_layer
        x_BTE = self.met(
            x_BTE, read_BTD, mode, lambda x, context: self.stack[first].cached(x, turn, cache, first, context)
        )
        for index in range(first + 1, self.config.num_hidden_layers):
            x_BTE = self.stack[index].cached(x_BTE, turn, cache, index, None)
        return self.norm(x_BTE)

    def logits(self, out_BTE: Tensor, read_BTD: Tensor, values_VD: Tensor) -> Tensor:
        """Next-token logits: the head's, plus what the memory points at, float32 [B, T, V]."""
        return self.lm_head(out_BTE).float() + self.memory.pointer_logits(out_BTE, read_BTD, values_VD)
