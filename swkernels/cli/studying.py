"""What ``swkernels study`` shows: the list of studies, and how far the runs are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .output import Interrupted

KEPT = "the runs that are done are kept, and the same command goes on"


@contextmanager
def kept() -> Iterator[None]:
    """Let Ctrl-C say that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(KEPT) from error


class Shown:
    """A context that shows runs: two bars on a terminal, else a line a run.

    Args:
        console: of ``make_console``.
    """

    def __init__(self, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        live = console.is_terminal and not console.quiet
        self._bars = Progress(*columns, console=console, disable=not live)
        self._runs = self._stage = None
        self._began = time.monotonic()

    def __enter__(self) -> Shown:
        self._bars.start()
        return self

    def __exit__(self, *error) -> None:
        self._bars.stop()

    def begin(self, step) -> None:
        """A run begins: a ``Step`` of ``swkernels.studies.study``."""
        from swkernels.studies.words import duration

        spent = duration(time.monotonic() - self._began)
        left = "" if step.seconds_left is None else f", about {duration(step.seconds_left)} left"
        line = f"{step.study}: {step.text}"
        if self._bars.disable:
            text = f"run {step.number} of {step.total}, {line} ({spent} so far{left})"
            return self._console.print(text, markup=False, soft_wrap=True)
        if self._runs is None:
            self._runs = self._bars.add_task("runs", total=step.total)
        self._bars.update(
            self._runs, completed=step.number - 1, description=f"runs ({spent}{left})"
        )
        self._console.print(f"run {step.number} of {step.total}, {line}", markup=False)

    def progress(self, stage: str, done: int, total: int) -> None:
        """How far a stage of the run is."""
        if self._stage is None:
            self._stage = self._bars.add_task(stage, total=total)
        self._bars.update(self._stage, description=stage, completed=done, total=total)


def show_list(console) -> None:
    """Print what each study shows, what it costs and what data it needs; then where those are."""
    from rich.table import Table

    from swkernels.studies.data import PARTS
    from swkernels.studies.recipes import RECIPES
    from swkernels.studies.study import make_plan

    plan = make_plan()
    table = Table(box=None, pad_edge=False)
    table.add_column("study", no_wrap=True)
    table.add_column("published, and what it shows", ratio=1)
    table.add_column("minutes", justify="right", no_wrap=True)
    table.add_column("data", no_wrap=True)
    for recipe in RECIPES.values():
        shows = f"{recipe.published}. {recipe.shows}"
        table.add_row(recipe.name, shows, str(recipe.minutes), _grouped(recipe.parts(plan)))
    console.print(table)
    console.print(
        "\nMinutes, an estimate: SmolLM2-135M on two cores with --budget small. Studies share "
        "runs, so that several take less than their sum. Without --data the data are read from "
        "Hugging Face (pip install 'swkernels[datasets]'). With --data DIR they are these files, "
        "the first of a row that is there:\n",
        markup=False,
    )
    places = Table(box=None, pad_edge=False)
    for title in ("data", "file in DIR", "Hugging Face data set"):
        places.add_column(title, no_wrap=title == "data", overflow="fold")
    for part, (files, dataset) in PARTS.items():
        places.add_row(part, ", ".join(files), dataset)
    console.print(places)
    console.print(
        "\nARC-Easy is published by AI2 (allenai.org/data/arc), Winogrande 1.1 too "
        "(winogrande.allenai.org); text is the raw test set of WikiText-2.",
        markup=False,
    )


def _grouped(parts: list[str]) -> str:
    """Parts as "text" and "arc (train, test)", a line each."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        name, _, split = part.partition("/")
        groups.setdefault(name, []).append(split)
    return "\n".join(
        f"{name} ({', '.join(splits)})" if any(splits) else name for name, splits in groups.items()
    )
