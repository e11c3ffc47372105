"""The summary of all training methods (Table 6): where it fails and where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..data import NAMES
from ..recipe import Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..sets import SUPER_WEIGHTS
from . import direct, edited, lora, lora_delta_freeze, lora_down, lora_mask, neighborhood
from . import random_control as random
from .comparing import Accuracy, Difference, all_of
from .settings import BASELINE, GAINS, baseline, data_of, described
from .training_views import accuracies, collapse, few_steps, notes, untrained

MODELS = ("OLMo-1B", "OLMo-7B")
LEAST = 3  # methods that are done: fewer are no summary


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: what it does.
        run: the run that it is.
        update: which entries of a matrix it changes.
        published: accuracies of MODELS by task (Tables 6 and 12), None where there is none.
    """

    name: str
    run: Run
    update: str
    published: Mapping[str, tuple[str | None, str | None]]


def groups(plan: Plan) -> dict[str, list[Method]]:
    """The methods, as the paper groups them."""
    few, many = plan.budget.counts[0], plan.budget.control
    seed = plan.seed
    return {
        "at super weights": [
            Method(
                "the super weights set to 0", edited.reading(plan, SUPER_WEIGHTS), "remove",
                {"arc": ("26.98 %", "60.5 %")},
            ),
            Method(
                f"direct, k = {few:,}", direct.run_of(plan, few), "sparse",
                {"arc": ("25.30 %", "26.3 %"), "winogrande": ("53.2 %", None)},
            ),
            Method(
                f"direct, k = {many:,}", direct.run_of(plan, many), "sparse",
                {"arc": ("26.30 %", "26.1 %")},
            ),
            Method(
                f"neighborhood, k = {few:,}", neighborhood.run_of(plan, few), "sparse",
                {"arc": ("24.96 %", "26.3 %")},
            ),
            Method(
                f"neighborhood, k = {many:,}", neighborhood.run_of(plan, many), "sparse",
                {"arc": ("25.59 %", "26.1 %"), "winogrande": ("50.6 %", None)},
            ),
        ],
        "controls on down_proj": [
            Method(
                f"random, k = {many:,}", random.run_of(plan, many), "sparse",
                {"arc": ("64.18 %", None)},
            ),
            Method(
                "LoRA on down_proj", lora_down.run_of(plan), "full layer",
                {"arc": ("68.77 %", None)},
            ),
        ],
        "LoRA on attention": [
            Method(
                "LoRA", lora.run_of(plan), "full layer", {"arc": ("66.88 %", "77.3 %")}
            ),
            Method(
                "LoRA, rows and columns of super weights at 0",
                lora_mask.run_of(plan, "rows and columns", 0.0), "full layer",
                {"arc": ("66.50 %", "76.7 %")},
            ),
            Method(
                "LoRA without its own largest updates",
                lora_delta_freeze.run_of(plan, seed), "full layer",
                {"arc": ("62.77 %", "64.09 %")},
            ),
        ],
    }  # fmt: skip


def runs(plan: Plan) -> list[Run]:
    methods = [method for group in groups(plan).values() for method in group]
    return [baseline(plan), *(method.run for method in methods)]


def section(found: Found) -> Section | None:
    plan = found.plan
    grouped = groups(plan)
    done = [m for group in grouped.values() for m in group if found(m.run)]
    if len(done) < LEAST:
        return None
    at, control, full = grouped.values()
    trained = {method.name: found(method.run) for method in at[1:]}
    others = {method.name: found(method.run) for method in control + full}
    claim = "Every training at super-weight coordinates drops accuracy to chance"
    return Section(
        described(plan),
        [_table(found, grouped)],
        collapse(found, trained, claim) + _gains(found, others),
        [
            "What is compared with more than the baseline has a study of its own below. Runs with "
            "fewer steps than the others saw fewer training questions.",
            "The published accuracy of LoRA without its own largest updates is a mean over three "
            f"seeds; here it is that of seed {plan.seed}. The mask of rows and columns is the one "
            "whose count of frozen values is the paper's.",
            "The paper says of every LoRA that it gains. Of OLMo-7B its means over seeds, 64.09 % "
            "to 66.05 %, lie below its own baseline of 73.3 %.",
            *notes(found, trained | others),
        ],
    )


def _table(found: Found, grouped: Mapping[str, list[Method]]) -> Table:
    task, base = found.plan.task, untrained(found)
    columns = ["method", "values trained", "update", "steps", "accuracy [95 %]"]
    columns += ["against no training", *MODELS]
    rows = []
    if base:
        there = [BASELINE[task][model] for model in MODELS]
        rows.append(["no training", 0, None, None, str(base), None, *there])
    for group, methods in grouped.items():
        done = [(method, figures) for method in methods if (figures := found(method.run))]
        if done:
            rows.append([f"*{group}*", *[None] * (len(columns) - 1)])
        for method, figures in done:
            accuracy = _accuracy(method, figures, task)
            rows.append(
                [
                    method.name,
                    figures.get("parameters", 0),
                    method.update,
                    figures.get("steps"),
                    str(accuracy),
                    str(accuracy.less(base)) if base else None,
                    *method.published.get(task, (None, None)),
                ]
            )
    return Table(columns, rows)


def _accuracy(method: Method, figures: dict, task: str) -> Accuracy:
    choices = figures["choices"]
    # An edited model answers every task, a trained one that of its training.
    return Accuracy.of(choices[NAMES[f"{task}/test"]] if method.run.kind == "edit" else choices)


def _gains(found: Found, trained: Mapping[str, dict | None]) -> list[Verdict]:
    """Whether everything else gained over the baseline."""
    base = untrained(found)
    if base is None or not all(trained.values()):
        return []
    gains = [Accuracy.of(figures["choices"]).less(base) for figures in trained.values()]
    return [
        Verdict(
            f"Training random positions, and every LoRA, {GAINS[found.plan.task]}.",
            all_of(_gained(gain) for gain in gains),
            f"{accuracies(found, trained)}{few_steps(found, trained)}.",
        )
    ]


def _gained(gain: Difference) -> bool | None:
    return True if gain.is_gain else False if gain.is_loss else None


SUMMARY = Recipe(
    "summary",
    "All methods",
    "Table 6 of arXiv 2607.08733",
    "Training at super weights beside as many random weights and whole layers, on one task.",
    tuple(dict.fromkeys((*data_of(), *edited.DATA))),
    minutes=40,
    runs=runs,
    section=section,
    needs_lora=True,
)
