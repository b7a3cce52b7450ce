"""How a memory rests: the `.titanmem` file, the journal, the stores and the cold backup. No torch, no Ray."""
