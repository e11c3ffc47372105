"""LoRA whose own largest updates are frozen in a new training run (Table 5)."""

from __future__ import annotations

from statistics import mean, stdev

from ..page import percent
from ..recipe import Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from .comparing import Accuracy
from .lora import adapter_of
from .lora import run_of as vanilla
from .lora_views import DROPOUT, agreement, same, short, why_same
from .settings import baseline, data_of, described, training
from .training_views import untrained

SEEDS = 3
MODELS = ("OLMo-1B", "OLMo-7B")
PUBLISHED = {  # ARC-Easy accuracy, mean and standard deviation over 3 seeds
    "LoRA": ("62.72 ± 0.62 %", "65.07 ± 1.46 %"),
    "frozen": ("62.77 ± 0.62 %", "64.09 ± 3.38 %"),
}


def run_of(plan: Plan, seed: int) -> Run:
    """Training LoRA with the rows of B and columns of A held that hold its largest updates.

    They are held at their first values, as hooks hold them that zero their gradients.
    """
    first = vanilla(plan, seed=seed, sweep=True)
    at = {"delta_top": plan.budget.delta_top, "of": first.key}
    masking = {"mask": "rows and columns", "scale": 0.0, "hold": True, "at": at}
    adapter = adapter_of("attention", {}) | masking
    return training(plan, adapter, seed=seed, sweep=True, needs=(first,))


def seeds_of(plan: Plan) -> tuple[int, ...]:
    return plan.seeds[:SEEDS]


def runs(plan: Plan) -> list[Run]:
    frozen = [run_of(plan, seed) for seed in seeds_of(plan)]
    return [baseline(plan), *(vanilla(plan, seed=s, sweep=True) for s in seeds_of(plan)), *frozen]


def section(found: Found) -> Section | None:
    plan = found.plan
    pairs = {
        seed: (found(vanilla(plan, seed=seed, sweep=True)), found(run_of(plan, seed)))
        for seed in seeds_of(plan)
    }
    pairs = {seed: pair for seed, pair in pairs.items() if all(pair)}
    if not pairs:
        return None
    return Section(
        described(plan, sweep=True),
        [_summary(plan, pairs), _each(pairs)],
        _no_effect(found, pairs),
        [
            "Frozen rows of B and columns of A keep their first values: 0 and random ones. The "
            "paper describes the second run as a fresh one in one place and as going on from the "
            "first in another; it is a fresh one here, with the same seed.",
            f"The {plan.budget.delta_top:,} positions are few, but their rows and columns are not: "
            "the table has the share of the values of B and A that is frozen.",
            "The published accuracies of LoRA here (62.72 % and 65.07 %) are 4 and 12 points below "
            "those of Table 4 for the same run; that of OLMo-7B lies below its baseline of 73.3 %.",
            DROPOUT,
            *short(found, next(iter(pairs.values()))[0]),
        ],
    )


def _summary(plan: Plan, pairs: dict) -> Table:
    frozen = f"{plan.budget.delta_top:,} positions"
    rows = []
    for n, (label, what) in enumerate((("LoRA", "none"), ("frozen", frozen))):
        values = [Accuracy.of(pair[n]["choices"]).value for pair in pairs.values()]
        published = PUBLISHED[label] if plan.task == "arc" else (None, None)
        rows.append([label, what, mean_and_deviation(values), *published])
    caption = f"Accuracy, mean and standard deviation over {len(pairs)} seeds."
    return Table(["method", "frozen", "accuracy", *MODELS], rows, caption)


def mean_and_deviation(values: list[float]) -> str:
    """As the paper has it; one value has no deviation."""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread} %"


def _each(pairs: dict) -> Table:
    rows = []
    for seed, (first, second) in pairs.items():
        a, b = (Accuracy.of(figures["choices"]) for figures in (first, second))
        touched = second["touched"]
        share = (touched["rows"] + touched["columns"]) / touched["parameters"]
        losses = [figures["curve"][-1]["held_out"] for figures in (first, second)]
        same_share = percent(agreement(first, second))
        rows.append(
            [str(seed), str(a), str(b), str(b.less(a)), same_share, *losses, percent(share)]
        )
    columns = ["seed", "LoRA [95 %]", "frozen [95 %]", "frozen minus LoRA", "same predictions"]
    columns += ["held-out loss, LoRA", "frozen", "values frozen"]
    return Table(columns, rows)


def _no_effect(found: Found, pairs: dict) -> list[Verdict]:
    if untrained(found) is None or len(pairs) < len(seeds_of(found.plan)):
        return []
    differences = {
        f"seed {seed}": Accuracy.of(second["choices"]).less(Accuracy.of(first["choices"]))
        for seed, (first, second) in pairs.items()
    }
    first = next(iter(pairs.values()))[0]
    return [
        Verdict(
            "Freezing the largest updates of a LoRA in a new run has no effect.",
            same(found, first, differences),
            why_same(found, first, differences),
        )
    ]


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
