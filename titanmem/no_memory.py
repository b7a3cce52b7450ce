"""What stands in a decoder whose checkpoint has no memory: nothing is keyed, read or pointed at.

The decoder then is the checkpoint and no more: its first upper layer meets nothing, and there is no pointer.

Axes: B rows, T tokens, C convolution, E decoder width, D value width (0 here), V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from titanmem.spec import MemorySpec
from titanmem.token_memory import SparseMemory


class NoMemory(SparseMemory):
    """A `SparseMemory` without weights, for memory `off`. It writes nothing: whoever asks it to has not looked."""

    def __init__(self, hidden_size: int, vocab_size: int, spec: MemorySpec) -> None:
        nn.Module.__init__(self)  # and none of the weights
        self.spec = spec

    def queries(self, hidden_BTE: Tensor, history_BCE: Tensor, behind_BTU: Tensor | None = None) -> Tensor:
        """[B, T, 0]."""
        return hidden_BTE[..., :0]

    def vocabulary_values(self, embedding_VE: Tensor) -> Tensor:
        """[V, 0]."""
        return embedding_VE[:, :0].float()

    def pointer_logits(self, out_BTE: Tensor, read_BTD: Tensor, values_VD: Tensor) -> Tensor:
        """Zeros that broadcast, [1]."""
        return out_BTE.new_zeros(1)
