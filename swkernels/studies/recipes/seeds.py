"""LoRA with and without a mask over seeds (Table 11, Figure 3)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .lora import run_of as vanilla
from .lora_mask import run_of as masked
from .settings import baseline, data_of, described
from .training_views import training_table


def pair_of(plan: Plan, seed: int) -> tuple[Run, Run]:
    """LoRA, and LoRA with the rows of super weights at zero."""
    return vanilla(plan, seed=seed, sweep=True), masked(plan, "rows", 0.0, seed)


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), *(run for seed in plan.seeds for run in pair_of(plan, seed))]


def section(found: Found) -> Section:
    plan = found.plan
    labelled = {}
    for seed in plan.seeds:
        first, second = map(found, pair_of(plan, seed))
        labelled |= {f"LoRA, seed {seed}": first, f"masked, seed {seed}": second}
    return Section(described(plan, sweep=True), [training_table(found, labelled, {}, ())])


SEEDS = Recipe(
    "seeds",
    "LoRA with and without a mask over seeds",
    "Table 11 and Figure 3 of arXiv 2607.08733",
    "Vanilla LoRA against LoRA with the rows of super weights at zero; the paper finds no "
    "difference.",
    data_of(),
    minutes=25,
    runs=runs,
    section=section,
    needs_lora=True,
)
