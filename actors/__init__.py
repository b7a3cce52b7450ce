"""Floor 3: where a memory lives and changes. One shard = one actor = one GPU = the single writer of its users."""
