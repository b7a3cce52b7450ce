"""`titanmem shards`: the cluster's shards."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.terminal import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    connect,
    emit,
    note,
    show_record,
    show_rows,
    waiting,
)

app = typer.Typer(
    help="Shards of the cluster: list, scale, drain.", no_args_is_help=True, add_completion=False
)


@app.command("list", epilog="Example: titanmem shards list")
def list_shards(url: UrlOption = DEFAULT_URL, key: KeyOption = "", json: JsonOption = False) -> None:
    """List the shards: what they own, hold and do."""
    with connect(url, key) as client:
        body = client.shards()
    if json:
        emit(body)
        return
    rows = next((value for value in body.values() if isinstance(value, list)), [])
    if rows:
        show_rows(rows)
    rest = {name: value for name, value in body.items() if not isinstance(value, list)}
    if rest:
        note("  ".join(f"{name} {value}" for name, value in rest.items()))


@app.command(epilog="Example: titanmem shards scale 4")
def scale(
    shards: Annotated[int, typer.Argument(min=1, max=4096, help="Wanted number of shards.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Change the number of shards."""
    with connect(url, key) as client, waiting(f"scaling to {shards} shards"):
        record = client.scale(shards)
    if json:
        emit(record)
    else:
        show_record(record)


@app.command(epilog="Example: titanmem shards drain shard-1")
def drain(
    shard: Annotated[str, typer.Argument(help="The shard to empty.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    json: JsonOption = False,
) -> None:
    """Move every user off a shard."""
    with connect(url, key) as client, waiting(f"draining {shard}"):
        record = client.drain(shard)
    if json:
        emit(record)
    else:
        show_record(record)
