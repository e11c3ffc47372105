"""``swkernels catalogue`` and ``verify-catalogue``: what was published, and what of it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import measuring
from .output import make_console

_ENTRY = typer.Argument(
    metavar="MODEL",
    help="Id on the Hugging Face hub, or its last part; upper and lower case do not matter.",
    show_default="all of them",
)
_JSON = typer.Option("--json", help="As JSON.")
_AS = typer.Option(
    "--as", help="Which entry of the catalogue MODEL is.", show_default="the one called MODEL"
)
_CONTROLS = typer.Option(help="Draws of each kind of random weights, for comparison.")


def catalogue(
    model: Annotated[str | None, _ENTRY] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """List the published super weights, with their provenance."""
    from swkernels.train import published

    entries = published.catalogue() if model is None else [published.find_entry(model)]
    if as_json:
        document = {
            "schema": "swkernels.catalogue/1",
            "convention": published.convention(),
            "tiers": published.tiers(),
            "models": [entry.to_dict() for entry in entries],
        }
        typer.echo(json.dumps(document, indent=1))
    elif model is None:
        _show_all(entries)
    else:
        _show_one(entries[0].to_dict())


def verify_catalogue(
    model: Annotated[str, measuring.MODEL],
    name: Annotated[str | None, _AS] = None,
    controls: Annotated[int, _CONTROLS] = 3,
    text: Annotated[Path | None, measuring.TEXT] = None,
    tokens: Annotated[int | None, measuring.TOKENS] = None,
    window: Annotated[int | None, measuring.WINDOW] = None,
    stride: Annotated[int | None, measuring.STRIDE] = None,
    batch_size: Annotated[int, measuring.BATCH_SIZE] = 1,
    seed: Annotated[int, measuring.SEED] = 42,
    device: Annotated[str | None, measuring.DEVICE] = None,
    dtype: Annotated[str | None, measuring.DTYPE] = None,
    trust_remote_code: Annotated[bool, measuring.TRUST] = False,
    output: Annotated[Path | None, measuring.OUTPUT] = None,
) -> None:
    """Zero what was published of MODEL, together and one by one, and say what holds."""
    from swkernels.errors import InvalidInput
    from swkernels.evidence.verify_catalogue import verify_catalogue as run
    from swkernels.train.published import find_entry

    if controls < 0:
        raise InvalidInput(f"--controls must be at least 0, got {controls}")
    try:
        published = find_entry(model if name is None else name)
    except InvalidInput as error:
        raise InvalidInput(f"{error}; --as NAME says which entry MODEL is") from error
    measures = measuring.read_measures(text, False, tokens, window, stride, batch_size, None, None)
    work = measuring.at_work(model, output, device, dtype, trust_remote_code)
    with work as (console, folder, progress, load):
        loaded, tokenizer, _ = load()
        result = run(
            loaded, published.model, measures.yardstick(tokenizer), controls=controls, seed=seed,
            progress=progress,
        )  # fmt: skip
        measuring.write(folder, result, "catalogue-check")
    measuring.show_rows(result.rows(), console, title=published.model)
    lines = [*result.ablation.notes, str(result), *measures.notes]
    measuring.show_paths(folder, console, lines)


def _show_all(entries: list) -> None:
    from rich.table import Table
    from rich.text import Text

    from swkernels.train.published import tiers

    console = make_console()
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "tier", "coordinates", "source and note"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        found = entry.to_dict()
        model = f"{entry.model}\n({entry.variant})" if entry.variant else entry.model
        about = f"{entry.source}\n({entry.note})" if entry.note else entry.source
        cells = model, entry.tier, "\n".join(map(_place, found["coordinates"])), about
        table.add_row(*map(Text, cells))
    console.print(table)
    for tier, meaning in tiers().items():
        console.print(f"{tier}: {meaning}", markup=False)


def _show_one(entry: dict) -> None:
    console = make_console()
    lines = [entry["model"]]
    for place in entry["coordinates"]:
        value = "" if place["value"] is None else f", value {place['value']}"
        lines.append(f"  {_place(place)}{value}")
    rows, columns = entry["shape"]
    facts = {
        "weights": f"{entry['module']}, [{rows}, {columns}] (output, input)",
        "variant": entry["variant"],
        "tier": f"{entry['tier']}: {entry['tier_means']}",
        "source": entry["source"],
        "note": entry["note"],
    }
    lines += [f"{key}: {fact}" for key, fact in facts.items() if fact]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _place(place: dict) -> str:
    from swkernels.detect.table import position

    return position(place)
