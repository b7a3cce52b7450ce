"""The `titanmem` command, one noun a file. Nothing here imports torch or Ray before a command needs it."""
