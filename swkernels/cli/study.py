"""``swkernels study``: the published experiments, repeated on a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .measuring import DEVICE, TRUST
from .output import OutputDirectory, make_console

DATA = "SWKERNELS_DATA"  # the variable that names the folder
LIST, PAGE = "list", "page"

_NAMES = typer.Argument(
    metavar="NAME...",
    help="Of studies, or all. list says what there is; page writes the page of -o again.",
)
_MODEL = typer.Option(help="A directory, a .gguf file or a name on the Hugging Face hub.")
_DATA = typer.Option(
    help=f"Folder with wikitext2/, arc/ and winogrande/ (or {DATA}); see list.",
    show_default="Hugging Face data sets",
)
_SEEDS = typer.Option(help="Such as 42-51 or 42,43.", show_default="those of the budget")
_BUDGET = typer.Option(
    help="small (two cores), long (the same, trained as long as published) or full (a GPU).",
    show_default="small",
)
_TASK = typer.Option(help="What is trained on: arc or winogrande.", show_default="arc")
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
    budget: Annotated[str | None, _BUDGET] = None,
    task: Annotated[str | None, _TASK] = None,
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
    from swkernels.studies import study as studies
    from swkernels.studies.budget import parse_seeds
    from swkernels.studies.data import Data

    from . import studying
    from .inputs import load_model

    console = make_console()
    parsed = None if seeds is None else parse_seeds(seeds)
    if names == [LIST]:
        return studying.show_list(console)
    if names != [PAGE]:
        recipes = studies.chosen(names)
    if output is None:
        raise InvalidInput("give the folder for the results with -o")
    if names == [PAGE]:
        path = studies.page_again(output, budget, parsed, task)
        return console.print(f"wrote {path}", markup=False, soft_wrap=True)
    if model is None:
        raise InvalidInput("give the model with --model")
    plan = studies.make_plan(budget or "small", parsed, task or "arc")
    studies.check_seeds(recipes, plan)
    loading.check_device(device)
    loading.check_dtype(dtype)
    loading.source_of(model)
    found = Data(data or (Path(os.environ[DATA]) if os.environ.get(DATA) else None))
    listed = None if super_weights is None else read_super_weights(super_weights)

    def load():
        return load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    # Records go to others: a folder is known by its name, not by where it is on this machine.
    name = Path(model).resolve().name if Path(model).exists() else model
    with OutputDirectory(output), studying.kept(), studying.Shown(console) as shown:
        path = studies.study(
            names, studies.Model(name, load), output, plan, data=found, super_weights=listed,
            progress=shown.progress, on_run=shown.begin,
        )  # fmt: skip
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
