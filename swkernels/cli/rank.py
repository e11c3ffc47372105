"""``swkernels rank``: the largest weights of a model by magnitude, and of which kind they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .measuring import OUTPUT, show_paths, show_rows
from .output import OutputDirectory, make_console, stages

# The defaults shown are those of swkernels.evidence.rank, which is too heavy to import for --help.
_MODEL = typer.Argument(
    metavar="MODEL",
    help="A folder of .safetensors files, one such file, or a name in the local Hugging Face "
    "cache. The files are read as they are; the model is not made.",
)
_K = typer.Option("-k", help="How many entries.")
_MODULE = typer.Option(
    "--module",
    metavar="KIND",
    help="Rank these kinds alone: q, k, v, kv, qkv, o, gate, up, gate_up, down. Repeatable.",
    show_default="all",
)
_NO_CACHE = typer.Option("--no-cache", help="Neither use nor keep a ranking made before.")
_BACKEND = typer.Option(help="reference, cpu or cuda.", show_default="the best there is")
_LISTED = 20  # entries that are printed


def rank(
    model: Annotated[str, _MODEL],
    k: Annotated[int, _K] = 10_000,
    module: Annotated[list[str] | None, _MODULE] = None,
    no_cache: Annotated[bool, _NO_CACHE] = False,
    backend: Annotated[str | None, _BACKEND] = None,
    output: Annotated[Path | None, OUTPUT] = None,
) -> None:
    """Rank the weights of MODEL by magnitude, over the projections of all blocks together."""
    from swkernels.evidence.rank import rank as ranked

    console = make_console()
    with OutputDirectory(output) as folder, stages(console) as progress:
        ranking = ranked(
            model, k, modules=module or None, backend=backend, cache=not no_cache,
            progress=progress,
        )  # fmt: skip
        notes = [] if output is None else _write(folder, ranking)
    _show(ranking, console)
    show_paths(folder, console, notes)


def _write(folder: OutputDirectory, ranking) -> list[str]:
    """Write the files, rank.json last as the sign of success; return what must be said of them."""
    from swkernels.errors import InvalidInput

    writers, notes = {"rank.png": ranking.plot}, []
    try:
        named = ranking.coordinates(strict=False)
        writers["coordinates.json"] = named.save
        if len(named) < len(ranking):
            notes.append(
                f"coordinates.json has {len(named)} of the {len(ranking)} entries: fused experts "
                "have no name but that of their down projection"
            )
    except InvalidInput as error:
        notes.append(f"no coordinates.json: {error}")
    folder.write(writers | {"rank.json": ranking.save})
    return notes


def _show(ranking, console) -> None:
    shares = ranking.shares()
    table = [
        {"kind": kind}
        | {f"top {row['top']:,}": _percent(row[kind]) for row in shares}
        | {"of all entries": _percent(_of_all(ranking, kind))}
        for kind in ranking.kinds
    ]
    show_rows(table, console, "Share of each kind of projection, in %")
    show_rows(ranking.rows(_LISTED), console, f"The {min(_LISTED, len(ranking))} largest")
    say = partial(console.print, soft_wrap=True, markup=False)
    matrices, entries = map(sum, zip(*ranking.sizes.values()))
    say(f"ranked: {entries:,} entries of {matrices:,} matrices of {ranking.model}")
    reasons: dict[str, list] = {}
    for entry in ranking.left_out:
        reasons.setdefault(entry.why, []).append(entry)
    for why, listed in reasons.items():
        count = sum(entry.tensors for entry in listed)
        names = ", ".join(entry.name for entry in listed[:3]) + (", ..." if listed[3:] else "")
        say(f"left out, {why}: {count} tensor{'s' if count > 1 else ''} ({names})")


def _percent(share: float) -> float:
    return round(100 * share, 1)


def _of_all(ranking, kind: str) -> float:
    return ranking.sizes[kind][1] / sum(entries for _, entries in ranking.sizes.values())
