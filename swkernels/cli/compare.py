"""``swkernels compare``: scan reports side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import measuring
from .output import OutputDirectory, make_console

_REPORTS = typer.Argument(
    metavar="REPORT REPORT ...",
    help="The report.json of scans, or their folders, in order: base before instruct, checkpoint "
    "after checkpoint.",
)
_NAMES = typer.Option(help="A name for each report, with commas between.", show_default="models'")
_VALUES_FROM = typer.Option(
    "--values-from",
    help="The checkpoint (a safetensors file or folder) of a report, to read weights from that "
    "the report does not list; one for each report, - for none.",
)
_OUTPUT = typer.Option("-o", "--output", help="Folder for compare.json and compare.png.")


def compare(
    reports: Annotated[list[Path], _REPORTS],
    names: Annotated[str | None, _NAMES] = None,
    values_from: Annotated[list[str] | None, _VALUES_FROM] = None,
    output: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Say which super weights and super activations stay, move, appear or fade over REPORTs."""
    from swkernels.evidence.compare import compare as run

    console = make_console()
    with OutputDirectory(output) as folder:
        result = run(
            reports,
            names=None if names is None else [name.strip() for name in names.split(",")],
            values_from=[None if v == "-" else v for v in values_from] if values_from else None,
        )
        measuring.write(folder, result, "compare")
    console.print(result.table())
    measuring.show_paths(folder, console, [*result.notes, str(result)])
