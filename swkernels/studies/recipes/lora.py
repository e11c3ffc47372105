"""LoRA on the attention projections (Table 6)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .lora_views import DROPOUT, gain
from .settings import ALPHA, GAINS, RANK, baseline, data_of, described, training
from .training_views import curves, notes, training_table

LABEL = "LoRA, attention"
MODELS = {"arc": ("OLMo-1B", "OLMo-7B"), "winogrande": ("OLMo-1B",)}
# Table 6; of Winogrande (Table 12) only ranks 1 and 2 were published.
PUBLISHED = {"arc": {LABEL: ("66.88 %", "77.3 %")}, "winogrande": {}}

TRAINED = (
    "Only the factors are trained: r (D + H) values for a matrix [D, H]; A is drawn at random by "
    "the seed, B is 0 at first, as PEFT makes them."
)


def run_of(plan: Plan, *, seed: int | None = None, sweep: bool = False) -> Run:
    """Training LoRA without a mask; as one of many, with its largest updates for the record."""
    if sweep:
        report = {"delta_top": plan.budget.delta_top}
    else:
        report = {"change_at": list(plan.budget.counts)}
    return training(plan, adapter_of("attention", report), seed=seed, sweep=sweep)


def adapter_of(targets: str, report: dict) -> dict:
    """The configuration of a LoRA without a mask."""
    return {
        "kind": "lora", "targets": targets, "r": RANK, "alpha": ALPHA, "mask": None,
        "report": report,
    }  # fmt: skip


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), run_of(plan)]


def section(found: Found) -> Section:
    task = found.plan.task
    done = {LABEL: found(run_of(found.plan))}
    claim = f"LoRA on the attention projections {GAINS[task]}."
    return Section(
        described(found.plan),
        [
            training_table(found, done, PUBLISHED[task], MODELS[task]),
            curves("lora", found, done),
        ],
        gain(found, LABEL, done[LABEL], claim),
        [DROPOUT, TRAINED, *notes(found, done)],
    )


LORA = Recipe(
    "lora",
    "LoRA on the attention projections",
    "Table 6 of arXiv 2607.08733",
    "Low-rank updates of whole attention layers; the paper finds a gain on ARC-Easy.",
    data_of(),
    minutes=6,
    runs=runs,
    section=section,
    needs_lora=True,
)
