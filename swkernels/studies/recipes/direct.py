"""Direct training: the k largest super weights alone, everything else frozen (Table 2)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .settings import baseline, data_of, described, training
from .training_views import collapse, curves, training_table

# ARC-Easy accuracy after training, OLMo-1B and OLMo-7B; the baselines are 60.65 % and 73.3 %.
PUBLISHED = {100: ("25.30 %", "26.3 %"), 1000: ("~25 %", "26.1 %")} | {
    4096: ("26.30 %", "26.1 %"), 8192: ("~25 %", "~25 %")
}  # fmt: skip


def run_of(plan: Plan, k: int, seed: int | None = None) -> Run:
    """Training k super weights."""
    return training(plan, {"kind": "sparse", "at": "super weights", "k": k, "radius": 0}, seed=seed)


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), *(run_of(plan, k) for k in plan.budget.counts)]


def section(found: Found) -> Section:
    plan = found.plan
    done = {k: found(run_of(plan, k)) for k in plan.budget.counts}
    labelled = {f"k = {k:,}": figures for k, figures in done.items()}
    published = {f"k = {k:,}": value for k, value in PUBLISHED.items()}
    return Section(
        described(plan),
        [
            training_table(found, labelled, published, ("OLMo-1B", "OLMo-7B")),
            curves(
                "direct", "Loss of the training answers, and perplexity of WikiText-2", labelled
            ),
        ],
        collapse(found, labelled, "Training super weights alone drops accuracy to chance"),
    )


DIRECT = Recipe(
    "direct",
    "Training super weights alone",
    "Table 2 of arXiv 2607.08733",
    "Only the k largest super weights are trained; the paper finds accuracy at chance.",
    data_of(),
    minutes=20,
    runs=runs,
    section=section,
)
