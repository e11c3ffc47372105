"""LoRA on the down projections, where the super weights lie (Table 6)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .lora import adapter_of
from .settings import baseline, data_of, described, training
from .training_views import curves, training_table

LABEL = "LoRA, down projections"
PUBLISHED = {LABEL: ("68.77 %",)}


def run_of(plan: Plan) -> Run:
    """Training LoRA on the down projections."""
    return training(plan, adapter_of(plan, "down_proj"))


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), run_of(plan)]


def section(found: Found) -> Section:
    labelled = {LABEL: found(run_of(found.plan))}
    return Section(
        described(found.plan),
        [
            training_table(found, labelled, PUBLISHED, ("OLMo-1B",)),
            curves("lora-down", "Loss of the training answers; perplexity", labelled),
        ],
    )


LORA_DOWN = Recipe(
    "lora-down",
    "LoRA on the down projections",
    "Table 6 of arXiv 2607.08733",
    "Low-rank updates of the matrices that hold the super weights; the paper finds a gain.",
    data_of(),
    minutes=6,
    runs=runs,
    section=section,
    needs_lora=True,
)
