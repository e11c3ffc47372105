"""LoRA on the down projections, where the super weights lie (Table 6)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .lora import adapter_of
from .lora_views import DROPOUT, gain
from .settings import GAINS, baseline, data_of, described, training
from .training_views import curves, notes, training_table

LABEL = "LoRA, down projections"
PUBLISHED = {"arc": {LABEL: ("68.77 %",)}, "winogrande": {}}


def run_of(plan: Plan) -> Run:
    """Training LoRA on the down projections."""
    return training(plan, adapter_of("down_proj", {"change_at": list(plan.budget.counts)}))


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), run_of(plan)]


def section(found: Found) -> Section:
    done = {LABEL: found(run_of(found.plan))}
    claim = f"LoRA on the down projections {GAINS[found.plan.task]}."
    return Section(
        described(found.plan),
        [
            training_table(found, done, PUBLISHED[found.plan.task], ("OLMo-1B",)),
            curves("lora-down", found, done),
        ],
        gain(found, LABEL, done[LABEL], claim),
        [DROPOUT, *notes(found, done)],
    )


LORA_DOWN = Recipe(
    "lora-down",
    "LoRA on the down projections",
    "Table 6 of arXiv 2607.08733",
    "Low-rank updates of the matrices that hold the super weights; the paper finds a gain on "
    "ARC-Easy.",
    data_of(),
    minutes=6,
    runs=runs,
    section=section,
    needs_lora=True,
)
