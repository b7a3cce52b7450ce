"""`titanmem serve`: the cluster on this machine, or into a running Ray cluster."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.terminal import note

app = typer.Typer(add_completion=False)


class Mode(StrEnum):
    """How memory meets attention."""

    mac = "mac"
    mag = "mag"
    mal = "mal"


class Durability(StrEnum):
    """What an answer waits for."""

    local = "local"
    replicated = "replicated"
    sync = "sync"


@app.command(epilog="Example: titanmem serve --port 8000 --shards 2 --store file:///srv/titanmem")
def serve(
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder; default: the small model that ships.")
    ] = None,
    mode: Annotated[Mode | None, typer.Option("--mode", help="How memory meets attention.")] = None,
    shards: Annotated[int | None, typer.Option("--shards", min=1, help="Shard actors.")] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="file://, s3:// or redis:// URL where memories rest.")
    ] = None,
    durability: Annotated[
        Durability | None,
        typer.Option(
            "--durability",
            help="What an answer waits for: the journal on this disk (local), that and the store within 2 s "
            "(replicated), or the store (sync).",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to bind; default: loopback.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port of the door.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file; flags win over it.")] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="Running Ray cluster to deploy into.")
    ] = None,
) -> None:
    """Start the server and stay in the foreground; Ctrl-C drains and stops."""
    from cluster.config import load

    flags: dict[str, Any] = {
        "model": str(model) if model else None,
        "mode": mode.value if mode else None,
        "shards": shards,
        "store": store,
        "durability": durability.value if durability else None,
        "host": host,
        "port": port,
        "ray_address": ray_address,
    }
    try:
        wanted = load(config, flags=flags)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    note("starting …")
    from cluster.serve import run

    run(wanted)
