"""One memory in a process of its own: tell it text, ask it questions, without server, journal or cache.

For training reports and experiments. What serves is `actors/`; `titanmem bench needle` measures that.

Axes: B questions, T tokens, D value width, K active units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import ops
from titanmem.consolidation import PASSES, consolidate
from titanmem.decoder import Decoder
from titanmem.fold import Encoder, Fold, fold
from titanmem.reservoir import Reservoir
from titanmem.tokenizer import ChatTokenizer


class Listener:
    """A memory that is told texts and asked questions; the same steps as the server's, in the same order."""

    def __init__(self, decoder: Decoder, tokenizer: ChatTokenizer) -> None:
        self.decoder, self.tokenizer, self.spec = decoder, tokenizer, decoder.config.memory
        self.encoder = Encoder(decoder, self.spec)
        self.slab_SHD = torch.zeros(1, self.spec.code_width, self.spec.value_dim, dtype=torch.float16)
        self.reservoir, self.momentum = Reservoir.empty(self.spec), 0.0
        self.context = np.zeros(0, np.int32)

    def read(self, tokens: np.ndarray) -> Fold:
        """Fold int32 [T] tokens, as a segment of their own."""
        written = self.encoder.encode(self.context, tokens)
        done = fold(self.slab_SHD, 0, written, self.momentum, self.spec, reservoir=self.reservoir)
        self.momentum, self.reservoir = done.momentum, done.reservoir or self.reservoir
        self.context = np.concatenate([self.context, tokens])[-self.spec.window :]
        return done

    def say(self, text: str) -> Fold:
        """Fold one message of the user in a new conversation."""
        self.context = np.zeros(0, np.int32)
        parts, _ = self.tokenizer.render([{"role": "user", "content": text}])
        return self.read(parts[0].tokens)

    def rest(self, passes: int = PASSES) -> None:
        """Consolidate."""
        if passes:
            consolidate(self.slab_SHD, 0, self.reservoir, self.encoder.values_VD, self.spec, passes)

    def recalled(self, query_ND: Tensor) -> Tensor:
        """What the memory says to each query, [N, D]."""
        columns_NK, values_NK = self.decoder.memory.code(query_ND)
        slots = torch.zeros(len(columns_NK), dtype=torch.int64)
        return ops.sparse_read(self.slab_SHD, slots, columns_NK, values_NK)

    @torch.no_grad()
    def ask(self, questions: Sequence[str], most: int = 16, mode: str = "mac") -> list[str]:
        """The likeliest reply to each question, each in a new conversation, at most `most` tokens."""
        prompts = []
        for question in questions:
            parts, prompt = self.tokenizer.render([{"role": "user", "content": question}])
            prompts.append([*parts[0].tokens.tolist(), *prompt.tolist()])
        replies: list[list[int]] = [[] for _ in questions]
        going = list(range(len(questions)))
        for _ in range(most):
            if not going:
                break
            texts = [prompts[index] + replies[index] for index in going]
            for index, token in zip(going, self._next(texts, mode), strict=True):
                replies[index].append(token)
            going = [index for index in going if replies[index][-1] not in self.tokenizer.stop_ids]
        return [self.tokenizer.decode(reply).strip() for reply in replies]

    def _next(self, texts: list[list[int]], mode: str) -> list[int]:
        texts = [text[-self.spec.window :] for text in texts]
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        decoder, memory = self.decoder, self.decoder.memory
        x, hidden = decoder.lower_blocks(tokens)
        query = memory.queries(hidden, decoder.zeros(len(texts), self.spec.history))
        read = self.recalled(query.flatten(0, 1)).view(*tokens.shape, -1)
        out = decoder.upper_blocks(x, read, mode)
        last = torch.tensor([len(text) - 1 for text in texts])
        rows = torch.arange(len(texts))
        logits = decoder.logits(out[rows, last][:, None], read[rows, last][:, None], self.encoder.values_VD)
        return logits[:, 0].argmax(-1).tolist()
