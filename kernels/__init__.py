"""Floor 1: the arithmetic of one memory step. Tensors in, tensors out; no I/O, no Ray, no model."""
