"""Direct training: the k largest super weights alone, everything else frozen (Table 2)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .settings import baseline, data_of, described, training
from .training_views import Runs, collapse, curves, explosion, notes, training_table

# Accuracy after training (Tables 2 and 12), by k.
MODELS = {"arc": ("OLMo-1B", "OLMo-7B"), "winogrande": ("OLMo-1B",)}
PUBLISHED = {
    "arc": {
        100: ("25.30 %", "26.3 %"),
        1000: ("~25 %", "26.1 %"),
        4096: ("26.30 %", "26.1 %"),
        8192: ("~25 %", "~25 %"),
    },
    "winogrande": {100: ("53.2 %",), 1000: ("50.7 %",)},
}
RANKING = (
    "Section 3.1 of the paper ranks the weights of all matrices by magnitude; section 5.1 says "
    "that the trained coordinates are those of activation spikes, of which OLMo-1B has two. Here "
    "the k are the super weights that were detected, and then the largest of the down projections."
)


def run_of(plan: Plan, k: int, seed: int | None = None) -> Run:
    """Training k super weights."""
    return training(plan, {"kind": "sparse", "at": "super weights", "k": k, "radius": 0}, seed=seed)


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), *(run_of(plan, k) for k in plan.budget.counts)]


def section(found: Found) -> Section:
    plan = found.plan
    runs_done = {f"k = {k:,}": found(run_of(plan, k)) for k in plan.budget.counts}
    published = {f"k = {k:,}": there for k, there in PUBLISHED[plan.task].items()}
    claim = "Training super weights alone drops accuracy to chance, however many"
    return Section(
        described(plan),
        [
            training_table(found, runs_done, published, MODELS[plan.task]),
            curves("direct", found, runs_done),
        ],
        collapse(found, runs_done, claim) + explosion(found, runs_done),
        [RANKING, *_moved(runs_done), *notes(found, runs_done)],
    )


def _moved(runs_done: Runs) -> list[str]:
    """How far the weights went: the published rate moves small weights by more of their size."""
    means = {k: f["change"]["relative"]["mean"] for k, f in runs_done.items() if f}
    each = "; ".join(f"{label} {100 * mean:.2g} %" for label, mean in means.items())
    return [
        f"Mean |dW| / |W| of the trained weights: {each}. Published for OLMo-1B are 8.19 % "
        "(Table 10): a step of AdamW is about the learning rate, however large the weight is."
    ] * bool(means)


DIRECT = Recipe(
    "direct",
    "Training super weights alone",
    "Tables 2 and 12 of arXiv 2607.08733",
    "Only the k largest super weights are trained; the paper finds accuracy at chance.",
    data_of(),
    minutes=20,
    runs=runs,
    section=section,
)
