"""Neighborhood training: super weights and all weights within one row and column (Table 3)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section, Verdict
from ..run import Run
from . import direct
from .comparing import Accuracy, all_of
from .settings import baseline, data_of, described, training
from .training_views import Runs, by_size, collapse, curves, few_steps, notes, training_table

# Accuracy after training (Tables 3 and 12), by k.
PUBLISHED = {
    "arc": {
        100: ("24.96 %", "26.3 %"),
        1000: ("25.59 %", "26.1 %"),
        4096: ("25.59 %", "26.1 %"),
    },
    "winogrande": {4096: ("50.6 %",)},
}
HELP = 0.05  # a share of the questions: less is called no help; the published gap is below 0.01


def run_of(plan: Plan, k: int) -> Run:
    """Training k super weights and what lies around each, 3 x 3 in all."""
    return training(plan, {"kind": "sparse", "at": "super weights", "k": k, "radius": 1})


def runs(plan: Plan) -> list[Run]:
    """The neighborhoods, and the super weights alone that they are compared with."""
    counts = plan.budget.counts[:3]
    alone = [direct.run_of(plan, k) for k in counts]
    return [baseline(plan), *(run_of(plan, k) for k in counts), *alone]


def section(found: Found) -> Section | None:
    plan = found.plan
    counts = plan.budget.counts[:3]
    around = {f"k = {k:,}": found(run_of(plan, k)) for k in counts}
    alone = {f"k = {k:,}": found(direct.run_of(plan, k)) for k in counts}
    if not any(around.values()):
        return None
    published = {f"k = {k:,}": there for k, there in PUBLISHED[plan.task].items()}
    return Section(
        described(plan),
        [
            training_table(found, around, published, direct.MODELS[plan.task]),
            by_size(
                "neighborhood-sizes",
                "Accuracy by the number of values trained, with 95 % intervals",
                {"super weights alone": alone, "and their neighbors": around},
                found,
            ),
            curves("neighborhood", found, around),
        ],
        collapse(found, around, "Training neighborhoods drops accuracy to chance, however large")
        + no_help(found, around, alone),
        [direct.RANKING, *notes(found, around)],
    )


def no_help(found: Found, around: Runs, alone: Runs) -> list[Verdict]:
    """Whether neighborhoods score no higher than the super weights alone."""
    if not all(around.values()) or not all(alone.values()):
        return []
    gaps = {
        label: Accuracy.of(around[label]["choices"]).less(Accuracy.of(alone[label]["choices"]))
        for label in around
    }
    # After fewer steps than were published neither has had the time to help.
    enough = not few_steps(found, around)
    states = [
        False if gap.is_gain else True if enough and gap.gains_less_than(HELP) else None
        for gap in gaps.values()
    ]
    why = "; ".join(f"{label} {gap}" for label, gap in gaps.items())
    return [
        Verdict(
            f"Neighborhoods gain less than {100 * HELP:g} points over isolated weights.",
            all_of(states),
            f"with neighbors minus without, on the same questions: {why}"
            f"{few_steps(found, around)}.",
        )
    ]


NEIGHBORHOOD = Recipe(
    "neighborhood",
    "Training super weights and what lies around them",
    "Tables 3 and 12 and Figure 2 of arXiv 2607.08733",
    "The neighbors within one row and column are trained too; the paper finds no help in it.",
    data_of(),
    minutes=30,
    runs=runs,
    section=section,
)
