"""Run studies: what is missing in the folder is measured, then the page is written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from swkernels.detect.report import versions
from swkernels.errors import InvalidInput
from swkernels.evidence.results import Progress, silent
from swkernels.models import find_down_projections
from swkernels.train import Coordinates

from .book import Book
from .data import Data
from .kinds import KINDS
from .lab import Lab
from .page import write_page
from .recipe import Plan, Recipe
from .recipes import RECIPES
from .run import Run, in_order

RUNS = "runs.jsonl"
WORK = "work"
ALL = "all"


@dataclass(frozen=True)
class Model:
    """The model that is studied.

    Attributes:
        name: for the page.
        load: returns a new copy of (model in eval mode, tokenizer, fingerprint or None).
    """

    name: str
    load: Callable[[], tuple[nn.Module, object, str | None]]


def chosen(names: Sequence[str]) -> list[Recipe]:
    """The studies of these names; "all" means every one.

    Raises:
        InvalidInput: a name that is none.
    """
    unknown = [name for name in names if name != ALL and name not in RECIPES]
    if unknown:
        raise InvalidInput(
            f"there is no study {unknown[0]!r:.100}: expected one of {', '.join(RECIPES)} or {ALL}"
        )
    return [r for r in RECIPES.values() if r.name in names or ALL in names]


def study(
    names: Sequence[str],
    model: Model,
    output: Path,
    plan: Plan,
    *,
    data: Data | None = None,
    super_weights: Coordinates | None = None,
    progress: Progress = silent,
    on_run: Callable[[Run, int, int], None] = lambda run, number, total: None,
) -> Path:
    """Run studies and return the path of their page.

    What an earlier call has measured in the folder is not measured again; a run that was
    interrupted goes on where it stopped and ends with the same figures.

    Args:
        names: of studies, or "all".
        model: what is studied.
        output: a folder for ``runs.jsonl``, the page and its figures; made where it is not there.
        plan: how much, which seeds.
        data: None takes the Hugging Face data sets.
        super_weights: None lets a scan find them.
        progress: called with (stage, done, total) within a run.
        on_run: called before each run with its number, from 1, and how many are missing.

    Raises:
        InvalidInput: a study, data or a model that cannot be used, before anything is trained; or
            a folder with runs of another model or other data.
    """
    recipes = chosen(names)
    data = data or Data()
    parts = list(dict.fromkeys(part for recipe in recipes for part in recipe.parts(plan)))
    data.check(parts)
    progress("loading the model", 0, 1)
    loaded, tokenizer, fingerprint = model.load()
    progress("loading the model", 1, 1)
    _check_model(loaded, recipes)
    identity = {
        "model": fingerprint or model.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "super weights": "detected" if super_weights is None else _digest(super_weights),
    }
    digests = {part: data.digest(part) for part in parts}
    book = Book(output / RUNS, identity | digests)
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    lab = Lab(
        lambda: model.load()[0], data, book, work, loaded, tokenizer, super_weights, progress,
        model.name,
    )  # fmt: skip
    about = {
        "model": model.name,
        "identity": identity | digests,
        "device": str(next(loaded.parameters()).device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "peft"),
    }
    missing = [
        run
        for run in in_order(r for recipe in recipes for r in recipe.runs(plan))
        if run not in book
    ]
    for number, run in enumerate(missing, 1):
        on_run(run, number, len(missing))
        _perform(lab, run, about | {"budget": plan.budget.name})
    return write_page(output, list(RECIPES.values()), book, plan, _head(about, plan))


def _perform(lab: Lab, run: Run, about: dict) -> None:
    began = time.perf_counter()
    path = lab.work / run.key
    figures = KINDS[run.kind](lab, dict(run.config), path)
    spent = {
        "seconds": round(time.perf_counter() - began, 1),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    lab.book.add(run, about | spent, figures)
    for left in lab.work.glob(f"{run.key}.*"):  # only now: the run is on the disk
        left.unlink()


def _digest(coordinates: Coordinates) -> str:
    listed = {str(site): pairs.tolist() for site, pairs in coordinates.weights.items()}
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _check_model(model: nn.Module, recipes: Sequence[Recipe]) -> None:
    find_down_projections(model)
    if any(recipe.needs_lora for recipe in recipes):
        from .adapters import check_attention

        check_attention(model)


def _head(about: dict, plan: Plan) -> str:
    kinds = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['model']}, {about['identity']['dtype']}, on {about['device']} with "
        f"{about['threads']} threads; budget `{plan.budget.name}`, seeds "
        f"{', '.join(map(str, plan.seeds))}. {kinds}. Made by `swkernels study`; every figure is "
        f"in `{RUNS}`."
    )
