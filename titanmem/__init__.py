"""Floor 2: what a memory is, and the decoder that reads it; the public face of the library."""

from titanmem.attach import Attached, attach
from titanmem.memory import NeuralMemory
from titanmem.spec import MemorySpec
from titanmem.state import MemoryState, UpdateReport

__all__ = ["Attached", "MemorySpec", "MemoryState", "NeuralMemory", "UpdateReport", "attach"]
