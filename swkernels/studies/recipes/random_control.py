"""Random controls: as many weights, drawn at random from the same down projections (Table 6)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .settings import baseline, data_of, described, training
from .training_views import curves, training_table

PUBLISHED = {4096: ("64.18 %",)}


def run_of(plan: Plan, k: int) -> Run:
    """Training k weights at random places, none of them among the largest."""
    avoid = plan.budget.ranked
    return training(plan, {"kind": "sparse", "at": "random", "k": k, "avoid": avoid})


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), *(run_of(plan, k) for k in plan.budget.counts)]


def section(found: Found) -> Section:
    plan = found.plan
    labelled = {f"k = {k:,}": found(run_of(plan, k)) for k in plan.budget.counts}
    published = {f"k = {k:,}": value for k, value in PUBLISHED.items()}
    return Section(
        described(plan),
        [
            training_table(found, labelled, published, ("OLMo-1B",)),
            curves("random-control", "Loss of the training answers; perplexity", labelled),
        ],
    )


RANDOM_CONTROL = Recipe(
    "random-control",
    "Training as many random weights",
    "Table 6 of arXiv 2607.08733",
    "Random positions of the same matrices are trained; the paper finds a gain over the baseline.",
    data_of(),
    minutes=20,
    runs=runs,
    section=section,
)
