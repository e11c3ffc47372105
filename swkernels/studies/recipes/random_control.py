"""Random controls: as many weights, drawn at random from the same down projections (Table 6)."""

from __future__ import annotations

from ..recipe import Found, Plan, Recipe, Section, Verdict
from ..run import Run
from . import direct
from .comparing import Accuracy, all_of, stands_above_chance
from .settings import CHANCE, GAINS, PUBLISHED_STEPS, baseline, data_of, described, training
from .training_views import (
    Runs,
    accuracies,
    collapsed,
    curves,
    few_steps,
    notes,
    training_table,
    untrained,
)

PUBLISHED = {"arc": {4096: ("64.18 %",)}, "winogrande": {}}


def run_of(plan: Plan, k: int) -> Run:
    """Training k weights at random places, none of them among the largest."""
    avoid = plan.budget.ranked
    return training(plan, {"kind": "sparse", "at": "random", "k": k, "avoid": avoid})


def runs(plan: Plan) -> list[Run]:
    """The controls, and the super weights that the published one is compared with."""
    own = [run_of(plan, k) for k in plan.budget.counts]
    return [baseline(plan), *own, direct.run_of(plan, plan.budget.control)]


def section(found: Found) -> Section | None:
    plan = found.plan
    k = plan.budget.control
    drawn = {f"k = {count:,}": found(run_of(plan, count)) for count in plan.budget.counts}
    if not any(drawn.values()):
        return None
    published = {f"k = {count:,}": there for count, there in PUBLISHED[plan.task].items()}
    pair = {
        f"{k:,} random": drawn[f"k = {k:,}"],
        f"{k:,} super weights": found(direct.run_of(plan, k)),
    }
    return Section(
        described(plan),
        [
            training_table(found, drawn, published, ("OLMo-1B",)),
            curves("random-control", found, drawn),
        ],
        no_collapse(found, drawn) + specific(found, *pair.items()),
        [
            f"The random weights avoid the {plan.budget.ranked:,} largest of the down projections; "
            "the paper says of them that super-weight coordinates are excluded.",
            *notes(found, drawn),
        ],
    )


def no_collapse(found: Found, drawn: Runs) -> list[Verdict]:
    """Whether no control fell to chance, and whether the published one gained."""
    base, k = untrained(found), found.plan.budget.control
    whole = PUBLISHED_STEPS[found.plan.task]
    if base is None or not all(drawn.values()):
        return []
    states = []
    for figures in drawn.values():
        stands = _stands(found, figures) and len(figures["losses"]) >= whole
        states.append(True if stands else False if collapsed(found, figures) else None)
    gain = Accuracy.of(drawn[f"k = {k:,}"]["choices"]).less(base)
    short = few_steps(found, drawn)
    return [
        Verdict(
            "Training random positions does not collapse.",
            all_of(states),
            f"{accuracies(found, drawn)}{short}.",
        ),
        Verdict(
            f"Training {k:,} random positions {GAINS[found.plan.task]}.",
            True if gain.is_gain else False if gain.is_loss else None,
            f"against no training, on the same questions: {gain}{short}.",
        ),
    ]


def specific(
    found: Found, drawn: tuple[str, dict | None], largest: tuple[str, dict | None]
) -> list[Verdict]:
    """Whether super weights collapse and as many random positions, trained alike, do not.

    Args:
        drawn, largest: what each of the two runs is called, and its figures.
    """
    runs = dict([drawn, largest])
    if untrained(found) is None or not all(runs.values()):
        return []
    random, super_weights = (Accuracy.of(figures["choices"]) for figures in runs.values())
    gap = random.less(super_weights)
    fell = collapsed(found, largest[1])
    if fell is False or collapsed(found, drawn[1]):
        holds = False
    else:
        holds = True if fell and _stands(found, drawn[1]) and gap.is_gain else None
    return [
        Verdict(
            "The collapse is specific to super-weight coordinates.",
            holds,
            f"{accuracies(found, runs)}; random minus super weights {gap}{few_steps(found, runs)}.",
        )
    ]


def _stands(found: Found, figures: dict) -> bool:
    accuracy = Accuracy.of(figures["choices"])
    return stands_above_chance(accuracy, untrained(found), CHANCE[found.plan.task])


RANDOM_CONTROL = Recipe(
    "random-control",
    "Training as many random weights",
    "Table 6 of arXiv 2607.08733",
    "Random positions of the same matrices are trained; the paper finds a gain on ARC-Easy.",
    data_of(),
    minutes=25,
    runs=runs,
    section=section,
)
