"""Floor 2: what a memory is, and the decoder that reads it; the public face of the library."""
