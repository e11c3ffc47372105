"""A study: which runs it takes and what it says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .book import Book
from .budget import Budget
from .run import Run


@dataclass(frozen=True)
class Plan:
    """What the runs of all studies of one call depend on.

    Attributes:
        budget: how much.
        seeds: of studies over seeds; the first is that of all others.
        task: "arc" or "winogrande": what is trained on.
    """

    budget: Budget
    seeds: tuple[int, ...]
    task: str = "arc"

    @property
    def seed(self) -> int:
        return self.seeds[0]


@dataclass(frozen=True)
class Table:
    """A table of a page: ``None`` cells are empty, numbers stand right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot of a page.

    Attributes:
        name: of its file, without a suffix, unique on the page.
        caption: below it.
        draw: called with a matplotlib figure.
        height: in inches.
    """

    name: str
    caption: str
    draw: Callable[[object], None]
    height: float = 3.4


@dataclass(frozen=True)
class Verdict:
    """Whether a published claim holds here.

    Attributes:
        claim: what was published, a sentence.
        holds: True, False, or None where these data cannot decide.
        why: the figures that say so, with their intervals.
    """

    claim: str
    holds: bool | None
    why: str


@dataclass
class Section:
    """What a page says about a study.

    Attributes:
        settings: what was run, in words.
        parts: tables and figures, in order.
        verdicts: the claims.
        notes: differences from what was published, and what to be careful about.
    """

    settings: str
    parts: list[Table | Figure] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Found:
    """The figures of a plan's runs, as far as they are done.

    Args:
        book: of the folder.
        plan: what was asked for.
    """

    def __init__(self, book: Book, plan: Plan):
        self._book = book
        self.plan = plan

    def __call__(self, run: Run) -> dict | None:
        """What a run found, or None where it has not been done."""
        return self._book.figures(run) if run in self._book else None

    def seconds(self, run: Run) -> float | None:
        """How long it took."""
        return self._book.record(run)["seconds"] if run in self._book else None


@dataclass(frozen=True)
class Recipe:
    """One study.

    Attributes:
        name: of the command.
        title: for the page.
        published: where the experiment was published: table and paper.
        shows: what one learns of it, a sentence.
        data: parts of ``data.PARTS`` that it needs; "{task}" stands for the task of the plan.
        minutes: an estimate of what the small budget takes on two cores with SmolLM2-135M.
        runs: the runs of a plan; what they need comes by itself.
        section: what the page says, of the runs that are done; None where that is nothing yet.
        needs_lora: it adapts attention projections, with the library peft.
        least_seeds: so many seeds it compares at least.
    """

    name: str
    title: str
    published: str
    shows: str
    data: Sequence[str]
    minutes: int
    runs: Callable[[Plan], Sequence[Run]]
    section: Callable[[Found], Section | None]
    needs_lora: bool = False
    least_seeds: int = 1

    def parts(self, plan: Plan) -> list[str]:
        """The parts of the data that it needs for a plan."""
        return [part.format(task=plan.task) for part in self.data]
