"""``swkernels study``: the published experiments, repeated on a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .measuring import DEVICE, TRUST, show_rows
from .output import make_console, stages

DATA = "SWKERNELS_DATA"  # the variable that names the folder
LIST = "list"

_NAMES = typer.Argument(
    metavar="NAME...", help="Of studies; all for every one, list to see what there is."
)
_MODEL = typer.Option(help="A directory, a .gguf file or a name on the Hugging Face hub.")
_DATA = typer.Option(
    help=f"Folder with wikitext2/, arc/ and winogrande/ (or {DATA}).",
    show_default="Hugging Face data sets",
)
_SEEDS = typer.Option(help="Such as 42-51 or 42,43.", show_default="those of the budget")
_BUDGET = typer.Option(help="small (two cores) or full (a GPU).")
_DTYPE = typer.Option(help="float32, bfloat16, float16 or auto, the checkpoint's.")
_SUPER_WEIGHTS = typer.Option(
    "--super-weights",
    help="A scan's report.json or a file of coordinates.",
    show_default="those that a scan finds",
)
_OUTPUT = typer.Option("-o", "--output", help="Folder for runs.jsonl, the page and its figures.")


def study(
    names: Annotated[list[str], _NAMES],
    model: Annotated[str | None, _MODEL] = None,
    data: Annotated[Path | None, _DATA] = None,
    seeds: Annotated[str | None, _SEEDS] = None,
    budget: Annotated[str, _BUDGET] = "small",
    super_weights: Annotated[Path | None, _SUPER_WEIGHTS] = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str, _DTYPE] = "float32",
    trust_remote_code: Annotated[bool, TRUST] = False,
    output: Annotated[Path | None, _OUTPUT] = None,
) -> None:
    """Repeat published experiments on a model; what was measured is kept, and gone on with."""
    from swkernels.detect import loading
    from swkernels.errors import InvalidInput
    from swkernels.quant.super_weights import read_super_weights
    from swkernels.studies import budget as budgets
    from swkernels.studies.data import Data
    from swkernels.studies.recipe import Plan
    from swkernels.studies.study import Model, chosen
    from swkernels.studies.study import study as run

    from .inputs import load_model

    if names == [LIST]:
        return _list()
    chosen(names)
    if model is None or output is None:
        raise InvalidInput("give the model with --model and a folder for the results with -o")
    size = budgets.budget_named(budget)
    plan = Plan(size, budgets.parse_seeds(seeds) if seeds else size.seeds)
    loading.check_device(device)
    loading.check_dtype(dtype)
    loading.source_of(model)
    folder = data or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    found = Data(folder)
    listed = None if super_weights is None else read_super_weights(super_weights)
    console = make_console()

    def load():
        return load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    def say(run, number: int, total: int) -> None:
        console.print(f"run {number} of {total}: {run.kind} {run.config}", markup=False)

    with stages(console) as progress:
        path = run(
            names, Model(model, load), output, plan, data=found, super_weights=listed,
            progress=progress, on_run=say,
        )  # fmt: skip
    console.print(f"wrote {path}", markup=False)


def _list() -> None:
    from swkernels.studies.recipes import RECIPES

    rows = [
        {
            "study": recipe.name,
            "published": recipe.published,
            "shows": recipe.shows,
            "minutes": recipe.minutes,
            "data": ", ".join(recipe.data),
        }
        for recipe in RECIPES.values()
    ]
    show_rows(rows, make_console(), "Minutes: small budget, SmolLM2-135M, two cores.")
