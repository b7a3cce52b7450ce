"""The `titanmem` command: its tree of commands, and how every one of them ends.

Exit codes: 0 done, 1 failed with one line on stderr, 2 wrong use, 130 stopped by Ctrl-C.
`TITANMEM_DEBUG=1` shows the traceback of a failure.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer

# Only the standard library above: Ctrl-C while the rest is still being imported must end in one line, too.


def main() -> NoReturn:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if sys.argv[1:2] == ["train"]:
            from cluster.allocator import keep_memory

            keep_memory()
        build_app()()
        code = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        code = 130
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
    sys.exit(code)


def _discard_stdout() -> None:
    """The reader of our pipe has gone: what is still buffered must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_app() -> typer.Typer:
    """The whole tree of commands."""
    import typer

    from cluster.commands.ending import OneLineGroup, root

    app = typer.Typer(
        cls=OneLineGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog="Example: titanmem chat --user alice")(root)
    return app
