"""Run studies: what is missing in the folder is measured, then the page is written."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

from .book import RUNS, Book
from .budget import budget_named
from .data import Data
from .kinds import KINDS
from .lab import Lab, NotInModel
from .lock import locked
from .page import write_page
from .recipe import Plan, Recipe
from .recipes import RECIPES
from .run import Run, in_order
from .runs.quantize import check_text
from .words import describe, seconds_left

WORK = "work"
ALL = "all"
TASKS = ("arc", "winogrande")


@dataclass(frozen=True)
class Model:
    """The model that is studied.

    Attributes:
        name: for the page.
        load: returns a new copy of (model in eval mode, tokenizer, fingerprint or None).
    """

    name: str
    load: Callable[[], tuple[nn.Module, object, str | None]]


@dataclass(frozen=True)
class Step:
    """The run that begins.

    Attributes:
        number, total: it is this one, from 1, of those that are missing.
        study: the smallest that needs it.
        text: what it is, in words.
        seconds_left: an estimate for all that are missing, or None.
    """

    number: int
    total: int
    study: str
    text: str
    seconds_left: float | None


def make_plan(budget: str = "small", seeds: Sequence[int] | None = None, task: str = "arc") -> Plan:
    """A plan from names; None takes the seeds of the budget.

    Raises:
        InvalidInput: a budget or a task that is none.
    """
    if task not in TASKS:
        raise InvalidInput(f"expected a task of {', '.join(TASKS)}, got {task!r:.100}")
    size = budget_named(budget)
    return Plan(size, size.seeds if seeds is None else tuple(seeds), task)


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
    on_run: Callable[[Step], None] = lambda step: None,
) -> Path:
    """Run studies and return the path of their page.

    What an earlier call has measured in the folder is not measured again; a run that was
    interrupted goes on where it stopped and ends with the same figures.

    Args:
        names: of studies, or "all".
        model: what is studied.
        output: a folder for ``runs.jsonl``, the page and its figures; made where it is not there.
            One process at a time works in it.
        plan: how much, which seeds.
        data: None takes the Hugging Face data sets.
        super_weights: None lets a scan find them.
        progress: called with (stage, done, total) within a run.
        on_run: called before each run.

    Raises:
        InvalidInput: a study, data or a model that cannot be used, before anything is measured; a
            folder with runs of another model or other data, or one that another process works in;
            or, when everything else is done, runs for which the model has no super weights.
    """
    recipes = chosen(names)
    check_seeds(recipes, plan)
    data = data or Data()
    parts = list(dict.fromkeys(part for recipe in recipes for part in recipe.parts(plan)))
    data.check(parts)
    with _at_work(output) as work:
        progress("loading the model", 0, 1)
        loaded, tokenizer, fingerprint = model.load()
        progress("loading the model", 1, 1)
        _check_model(loaded, recipes)
        identity = {
            "model": fingerprint or model.name,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "super weights": "detected" if super_weights is None else _digest(super_weights),
        }
        identity |= {part: data.digest(part) for part in parts}
        book = Book(output / RUNS, identity)
        lab = Lab(
            lambda: model.load()[0], data, book, work, loaded, tokenizer, super_weights, progress,
            model.name,
        )  # fmt: skip
        about = {
            "model": model.name,
            "identity": identity,
            "device": str(next(loaded.parameters()).device),
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "transformers", "peft"),
            "budget": plan.budget.name,
            "seeds": list(plan.seeds),
            "task": plan.task,
        }
        _check_text(lab, recipes, plan)
        failed = _perform_all(lab, recipes, plan, about, on_run)
        path = write_page(output, list(RECIPES.values()), book, plan)
    if failed:
        raise InvalidInput(
            f"{len(failed)} runs could not be made ({next(iter(failed.values()))}); what the "
            f"others found is in {path}"
        )
    return path


def page_again(
    output: Path,
    budget: str | None = None,
    seeds: Sequence[int] | None = None,
    task: str | None = None,
) -> Path:
    """Write the page of a folder from its runs alone, also while a study works in it.

    Args:
        output: a folder of ``study``.
        budget, task: of the runs that it shows; those of the last run where they are None.
        seeds: None takes those that these runs were made with.

    Raises:
        InvalidInput: there are no such runs, or the file of them is damaged.
    """
    book = Book(output / RUNS)
    made = [
        record
        for record in book
        if budget in (None, record["budget"]) and task in (None, record.get("task", TASKS[0]))
    ]
    if not made:
        raise InvalidInput(
            f"{output / RUNS} holds no such runs: give the folder, the budget and the task of a "
            "study"
        )
    last = made[-1]
    plan = make_plan(last["budget"], seeds or last.get("seeds"), last.get("task", TASKS[0]))
    return write_page(output, list(RECIPES.values()), book, plan)


def check_seeds(recipes: Sequence[Recipe], plan: Plan) -> None:
    """Refuse a plan with fewer seeds than a study compares.

    Raises:
        InvalidInput: so it is.
    """
    for recipe in recipes:
        if len(plan.seeds) < recipe.least_seeds:
            raise InvalidInput(
                f"{recipe.name} needs {recipe.least_seeds} seeds at least, got "
                f"{len(plan.seeds)}: give more with --seeds"
            )


@contextmanager
def _at_work(output: Path) -> Iterator[Path]:
    """A folder below ``output`` for what is interrupted; this process alone works there."""
    work = output / WORK
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"cannot make {output}: {error.strerror or error}; give another folder with -o"
        ) from error
    with locked(output):
        work.mkdir(exist_ok=True)
        try:
            yield work
        finally:
            with suppress(OSError):  # something waits there to be gone on with
                work.rmdir()


def _perform_all(
    lab: Lab, recipes: Sequence[Recipe], plan: Plan, about: dict, on_run: Callable[[Step], None]
) -> dict[Run, NotInModel]:
    """Perform what is missing; return the runs that this model has no super weights for."""
    studies: dict[Run, tuple[str, str]] = {}  # the smallest study of it, and what it is there
    for recipe in sorted(recipes, key=lambda recipe: len(recipe.runs(plan)), reverse=True):
        runs = in_order(recipe.runs(plan))
        studies |= {run: (recipe.name, describe(run, runs)) for run in runs}
    runs = in_order(run for recipe in recipes for run in recipe.runs(plan))
    missing = [run for run in runs if run not in lab.book]
    failed: dict[Run, NotInModel] = {}
    for number, run in enumerate(missing, 1):
        reason = next((failed[needed] for needed in run.needs if needed in failed), None)
        if reason is None:
            left = seconds_left(missing[number - 1 :], lab.book)
            on_run(Step(number, len(missing), *studies[run], left))
            try:
                _perform(lab, run, about)
            except NotInModel as error:
                reason = error
        if reason is not None:
            failed[run] = reason
    return failed


def _perform(lab: Lab, run: Run, about: dict) -> None:
    began = time.perf_counter()
    path = lab.work / run.key
    figures = KINDS[run.kind](lab, dict(run.config), path)
    spent = {
        "seconds": round(time.perf_counter() - began, 1),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    lab.book.add(run, about | spent, figures)
    for left in lab.work.iterdir():  # only now: the run is on the disk
        if run.key in left.name:  # also what a kill has left of a file that was written aside
            left.unlink()


def _digest(coordinates: Coordinates) -> str:
    listed = {str(site): pairs.tolist() for site, pairs in coordinates.weights.items()}
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _check_text(lab: Lab, recipes: Sequence[Recipe], plan: Plan) -> None:
    """Refuse a text that is too short for one of the runs before the first of them."""
    runs = [run for recipe in recipes for run in recipe.runs(plan) if run.kind == "quantize"]
    first = max((run.config["clip_tokens"] for run in runs), default=None)
    if first is not None:
        check_text(lab.tokens(first + 2), first)


def _check_model(model: nn.Module, recipes: Sequence[Recipe]) -> None:
    if model.config.is_encoder_decoder:
        raise InvalidInput(
            f"{type(model).__name__} is an encoder and a decoder: the studies are of models that "
            "go on with a text"
        )
    find_down_projections(model)
    if any(recipe.needs_lora for recipe in recipes):
        from .adapters import check_attention

        check_attention(model)
