"""``swkernels guard``: prove that a checkpoint is intact, put super weights back into a copy."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .output import make_console

DAMAGED = 1  # exit code; 0 is intact, 2 (as of every command) says that it cannot be checked

guard = typer.Typer(help="Prove that a checkpoint is intact, and repair its super weights.")

_MODEL = typer.Argument(
    metavar="MODEL",
    help="A safetensors file, a folder of them, or the name of a model in the local cache of the "
    "Hugging Face hub.",
)
_MANIFEST = typer.Argument(metavar="MANIFEST", help="What guard create wrote.")
_KEY = typer.Option(
    help="File with the key that seals the manifest.",
    show_default="the environment's SWKERNELS_GUARD_KEY, if set",
)
_THREADS = typer.Option(help="That read and hash.", show_default="one a processor, at most 8")
_JSON = typer.Option("--json", help="As JSON.")


@guard.command()
def create(
    model: Annotated[str, _MODEL],
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest to write.")],
    report: Annotated[
        Path | None, typer.Option(help="A scan's report, for the super weights.")
    ] = None,
    catalogue: Annotated[
        str | None, typer.Option(help="An entry of the catalogue, for the super weights.")
    ] = None,
    coordinates: Annotated[
        Path | None, typer.Option(help="A file of coordinates, for the super weights.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Bytes of a chunk.")] = 1 << 20,
    digest: Annotated[
        str | None,
        typer.Option(
            "--hash",
            help="xxh3_128, xxh3_64 or sha256.",
            show_default="xxh3_128; sha256 with a key",
        ),
    ] = None,
    key_file: Annotated[Path | None, _KEY] = None,
    threads: Annotated[int | None, _THREADS] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write the manifest of MODEL: digests of all chunks, and the super weights' exact bits."""
    from swkernels import guard as run
    from swkernels.errors import InvalidInput

    given = [source for source in (report, catalogue, coordinates) if source is not None]
    if len(given) > 1:
        raise InvalidInput("expected one of --report, --catalogue and --coordinates")
    if not output.parent.is_dir():
        raise InvalidInput(f"cannot write {output}: there is no folder {output.parent}")
    weights = report
    if catalogue is not None:
        weights = f"catalogue:{catalogue}"
    elif coordinates is not None:
        from swkernels.train import Coordinates

        weights = Coordinates.load(coordinates)
    key = run.read_key(key_file)
    digest = digest or (run.HASH if key is None else "sha256")
    with _progress(as_json) as (console, progress):
        manifest = run.create(
            model, weights, chunk=chunk, hash=digest, threads=threads, progress=progress
        )
    manifest.save(output, key)
    if as_json:
        found = {name: manifest.content()[name] for name in ("schema", "model", "hash", "chunk")}
        counts = {"tensors": len(manifest.tensors), "bytes": manifest.size}
        weights = [weight.to_dict() for weight in manifest.super_weights]
        found |= counts | {"super_weights": weights, "sealed": key is not None}
        typer.echo(json.dumps(found | {"sha256": manifest.sha256, "path": str(output)}, indent=1))
        return
    for weight in manifest.super_weights:
        _say(console, f"{weight}: {weight.value} ({weight.bits})")
    seal = "sealed" if key is not None else "not sealed"
    _say(console, f"{len(manifest.tensors)} tensors, {manifest.size} bytes, {digest}, {seal}")
    _say(console, f"wrote {output} ({output.stat().st_size} bytes)")


@guard.command()
def verify(
    model: Annotated[str, _MODEL],
    manifest: Annotated[Path, _MANIFEST],
    key_file: Annotated[Path | None, _KEY] = None,
    threads: Annotated[int | None, _THREADS] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say whether MODEL is intact: exit code 0; 1 if it is damaged, 2 if that cannot be told."""
    from swkernels import guard as run

    expected = run.Manifest.load(manifest, run.read_key(key_file))
    with _progress(as_json) as (console, progress):
        result = run.verify(model, expected, threads=threads, progress=progress)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    else:
        _show(console, result)
    if not result.ok:
        raise typer.Exit(DAMAGED)


@guard.command()
def repair(
    model: Annotated[str, _MODEL],
    manifest: Annotated[Path, _MANIFEST],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the copy.")],
    key_file: Annotated[Path | None, _KEY] = None,
    threads: Annotated[int | None, _THREADS] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Copy MODEL with its super weights as they were: exit code 1 if other damage remains."""
    from swkernels import guard as run

    expected = run.Manifest.load(manifest, run.read_key(key_file))
    with _progress(as_json) as (console, progress):
        result = run.repair(model, expected, output, threads=threads, progress=progress)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
    else:
        for hit in result.restored:
            _say(console, f"put back {hit}")
        for hit in result.lost:
            _say(console, f"lost {hit}")
        _show(console, result.after)
    if not result.ok:
        raise typer.Exit(DAMAGED)


@contextmanager
def _progress(quiet: bool):
    """The console, and a bar of bytes on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = make_console(quiet)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    )  # fmt: skip
    shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, disable=not shown, transient=True) as bars:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield console, progress


def _show(console, result) -> None:
    from rich.table import Table
    from rich.text import Text

    if result.findings:
        table = Table(box=None, pad_edge=False)
        for heading in ("what", "name", "where", "super weights"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "name")
        for finding in result.findings:
            hits = "\n".join(map(str, finding.super_weights))
            table.add_row(*map(Text, (finding.kind, finding.name, finding.detail, hits)))
        console.print(table)
    _say(console, str(result))


def _say(console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
