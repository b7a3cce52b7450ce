"""What stands in a decoder whose checkpoint has no memory: nothing is keyed, read or pointed at.

The decoder then is the checkpoint and no more: its first upper layer meets nothing, and there is no pointer.

Axes: B rows, T tokens, C convolution, E decoder width, D value width (0 here), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from titanmem.cache import Past
from titanmem.spec import MemorySpec
from titanmem.token_memory import SparseMemory


class NoMemory(SparseMemory):
    """A `SparseMemory` without weights, for memory `off`. It writes nothing: whoever asks it to has not looked."""

    def __init__(self, hidden_size: int, vocab_size: int, spec: MemorySpec) -> None:
        nn.Module.__init__(self)  # and none of the weights
        self.spec = spec

    def asked(
        self, hidden_BTE: Tensor, tokens_BT: Tensor, past: Past, reciting_BT: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """[B, T, 0], and the same past as before at every place."""
        words, question = (x[:, None].expand(-1, hidden_BTE.shape[1], -1) for x in (past.words_BL, past.question_BD))
        return hidden_BTE[..., :0], Past(hidden_BTE, words, question, tokens_BT.new_zeros(tokens_BT.shape))

    def spell(self, vocabulary: Mapping[str, int]) -> None:
        """Nothing is spelled."""

    def vocabulary_values(self, embedding_VE: Tensor) -> Tensor:
        """[V, 0]."""
        return embedding_VE[:, :0].float()

    def pointer_logits(self, out_BTE: Tensor, read_BTD: Tensor, values_VD: Tensor) -> Tensor:
        """Zeros that broadcast, [1]."""
        return out_BTE.new_zeros(1)
