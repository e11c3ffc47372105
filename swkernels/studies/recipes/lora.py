"""LoRA on the attention projections (Table 6)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .settings import ALPHA, RANK, baseline, data_of, described, training
from .training_views import curves, training_table

LABEL = "LoRA, attention"
PUBLISHED = {LABEL: ("66.88 %", "77.3 %")}


def run_of(plan: Plan, *, seed: int | None = None, sweep: bool = False) -> Run:
    """Training LoRA without a mask."""
    adapter = adapter_of(plan, "attention")
    adapter["report"]["delta_top"] = plan.budget.delta_top
    return training(plan, adapter, seed=seed, sweep=sweep)


def adapter_of(plan: Plan, targets: str) -> dict:
    """The configuration of a LoRA without a mask."""
    return {
        "kind": "lora",
        "targets": targets,
        "r": RANK,
        "alpha": ALPHA,
        "mask": None,
        "report": {"change_at": list(plan.budget.counts)},
    }


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), run_of(plan)]


def section(found: Found) -> Section:
    labelled = {LABEL: found(run_of(found.plan))}
    return Section(
        described(found.plan),
        [
            training_table(found, labelled, PUBLISHED, ("OLMo-1B", "OLMo-7B")),
            curves("lora", "Loss of the training answers; perplexity", labelled),
        ],
    )


LORA = Recipe(
    "lora",
    "LoRA on the attention projections",
    "Table 6 of arXiv 2607.08733",
    "Low-rank updates of whole attention layers; the paper finds a gain over the baseline.",
    data_of(),
    minutes=6,
    runs=runs,
    section=section,
    needs_lora=True,
)
