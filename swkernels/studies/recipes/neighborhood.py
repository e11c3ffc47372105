"""Neighborhood training: super weights and all weights within one row and column (Table 3)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .settings import baseline, data_of, described, training
from .training_views import collapse, curves, training_table

PUBLISHED = {100: ("24.96 %", "26.3 %"), 1000: ("25.59 %", "26.1 %"), 4096: ("25.59 %", "26.1 %")}


def run_of(plan: Plan, k: int) -> Run:
    """Training k super weights and what lies around each, 3 x 3 in all."""
    return training(plan, {"kind": "sparse", "at": "super weights", "k": k, "radius": 1})


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), *(run_of(plan, k) for k in plan.budget.counts[:3])]


def section(found: Found) -> Section:
    plan = found.plan
    labelled = {f"k = {k:,}": found(run_of(plan, k)) for k in plan.budget.counts[:3]}
    published = {f"k = {k:,}": value for k, value in PUBLISHED.items()}
    return Section(
        described(plan),
        [
            training_table(found, labelled, published, ("OLMo-1B", "OLMo-7B")),
            curves("neighborhood", "Loss of the training answers; perplexity", labelled),
        ],
        collapse(found, labelled, "Training neighborhoods drops accuracy to chance"),
    )


NEIGHBORHOOD = Recipe(
    "neighborhood",
    "Training super weights and what lies around them",
    "Table 3 and Figure 2 of arXiv 2607.08733",
    "The neighbors within one row and column are trained too; the paper finds no help in it.",
    data_of(),
    minutes=15,
    runs=runs,
    section=section,
)
