"""`titanmem doctor`: is this machine fit to serve, and if not, what is to be done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.commands.terminal import CommandFailed, JsonOption, emit, printable, waiting

app = typer.Typer(add_completion=False)
STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}


@app.command(epilog="Example: titanmem doctor --store s3://memories/titanmem")
def doctor(
    store: Annotated[str | None, typer.Option("--store", help="Store to check.")] = None,
    model: Annotated[Path | None, typer.Option("--model", help="Model folder to check.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port to check.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of `serve`.")] = None,
    json: JsonOption = False,
) -> None:
    """Check this machine, Ray, GPU, store and model. Ends with 1 when something is broken."""
    from cluster.commands.checks import all_findings
    from cluster.config import load

    flags: dict[str, Any] = {"store": store, "model": str(model) if model else None, "port": port}
    try:
        wanted = load(config, flags=flags)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with waiting("checking"):
        findings = list(all_findings(wanted))
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if json:
        emit(
            {
                "ok": not broken,
                "checks": [
                    {"name": f.name, "status": f.status, "found": f.found, "advice": f.advice}
                    for f in findings
                ],
            }
        )
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("check", "", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for f in findings:
            table.add_row(f.name, Text(f.status, STYLES[f.status]), Text(printable(f.found)), Text(f.advice))
        width = None if sys.stdout.isatty() else 200
        Console(file=sys.stdout, highlight=False, width=width).print(table)
    if broken:
        raise CommandFailed(f"broken: {', '.join(broken)}")
