"""LoRA of attention, masked at the indices of super weights (Table 4)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .lora import adapter_of
from .lora import run_of as vanilla
from .settings import baseline, data_of, described, training
from .training_views import training_table

MASKS = ("rows", "columns", "rows and columns")
SCALES = (0.8, 0.5, 0.2, 0.1, 0.0)  # 1 is LoRA without a mask
# ARC-Easy accuracy of OLMo-1B and OLMo-7B.
PUBLISHED = {
    1.0: ("66.88 %", "77.3 %"), 0.8: ("66.54 %", "76.9 %"), 0.5: ("66.50 %", "78.0 %"),
    0.2: ("66.46 %", "76.6 %"), 0.1: ("66.50 %", "76.4 %"), 0.0: ("66.50 %", "76.7 %"),
}  # fmt: skip


def run_of(plan: Plan, mask: str, scale: float, seed: int | None = None) -> Run:
    """Training LoRA whose updates at the indices of the largest super weights are scaled."""
    masking = {"mask": mask, "scale": scale, "hold": False, "at": {"top": plan.budget.ranked}}
    return training(plan, adapter_of(plan, "attention") | masking, seed=seed, sweep=True)


def runs(plan: Plan) -> list[Run]:
    masked = [run_of(plan, mask, scale) for mask in MASKS for scale in reversed(SCALES)]
    return [baseline(plan), vanilla(plan, sweep=True), *masked]


def section(found: Found) -> Section:
    plan = found.plan
    labelled = {"no mask (s = 1)": found(vanilla(plan, sweep=True))}
    labelled |= {
        f"{mask}, s = {scale}": found(run_of(plan, mask, scale))
        for mask in MASKS
        for scale in SCALES
    }
    published = {f"{mask}, s = {scale}": PUBLISHED[scale] for mask in MASKS for scale in SCALES}
    published["no mask (s = 1)"] = PUBLISHED[1.0]
    return Section(
        described(plan, sweep=True),
        [training_table(found, labelled, published, ("OLMo-1B", "OLMo-7B"))],
    )


LORA_MASK = Recipe(
    "lora-mask",
    "LoRA restricted at the indices of super weights",
    "Table 4 of arXiv 2607.08733",
    "Updates of attention at the rows and columns of super weights are scaled down; the paper "
    "finds no effect.",
    data_of(),
    minutes=35,
    runs=runs,
    section=section,
    needs_lora=True,
)
