"""LoRA whose own largest updates are frozen in a new training run (Table 5)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from .lora import adapter_of
from .lora import run_of as vanilla
from .settings import baseline, data_of, described, training
from .training_views import training_table

SEEDS = 3


def run_of(plan: Plan, seed: int) -> Run:
    """Training LoRA with the rows of B and columns of A held that hold its largest updates.

    They are held at their first values, as hooks hold them that zero their gradients.
    """
    first = vanilla(plan, seed=seed, sweep=True)
    at = {"delta_top": plan.budget.delta_top, "of": first.key}
    masking = {"mask": "rows and columns", "scale": 0.0, "hold": True, "at": at}
    adapter = adapter_of(plan, "attention") | masking
    return training(plan, adapter, seed=seed, sweep=True, needs=(first,))


def seeds_of(plan: Plan) -> tuple[int, ...]:
    return plan.seeds[:SEEDS]


def runs(plan: Plan) -> list[Run]:
    frozen = [run_of(plan, seed) for seed in seeds_of(plan)]
    return [baseline(plan), *(vanilla(plan, seed=s, sweep=True) for s in seeds_of(plan)), *frozen]


def section(found: Found) -> Section:
    plan = found.plan
    labelled = {}
    for seed in seeds_of(plan):
        labelled[f"LoRA, seed {seed}"] = found(vanilla(plan, seed=seed, sweep=True))
        labelled[f"frozen, seed {seed}"] = found(run_of(plan, seed))
    return Section(described(plan, sweep=True), [training_table(found, labelled, {}, ())])


LORA_DELTA_FREEZE = Recipe(
    "lora-delta-freeze",
    "LoRA without its own largest updates",
    "Table 5 of arXiv 2607.08733",
    "The largest entries of a trained update are frozen in a new run; the paper finds no effect.",
    data_of(),
    minutes=15,
    runs=runs,
    section=section,
    needs_lora=True,
)
