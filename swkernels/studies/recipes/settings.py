"""Settings that recipes share: those of the training paper (arXiv 2607.08733, section 3.1)."""

from __future__ import annotations

from ..data import NAMES, TEXT
from ..lab import DETECT
from ..recipe import Plan
from ..run import Run

CHANCE = {"arc": 0.25, "winogrande": 0.5}
# Published accuracies without training (Table 7; 60.65 % in the caption of Table 2), and the steps
# that the published settings make: 3 passes over 2,251 and 9,248 questions.
BASELINE = {
    "arc": {"OLMo-1B": "60.65 %", "OLMo-7B": "73.3 %"},
    "winogrande": {"OLMo-1B": "61.6 %", "OLMo-7B": "67.5 %"},
}
PUBLISHED_STEPS = {"arc": 422, "winogrande": 1734}
LEARNING_RATE, BATCH, ACCUMULATE = 1e-4, 4, 4
RANK, ALPHA = 8, 16
# What the paper says of full layers and of random positions; on Winogrande (section 5.1) that no
# method improves over the baseline.
GAINS = {
    "arc": "improves over the baseline",
    "winogrande": "improves over the baseline (as published, no method does on Winogrande)",
}
TRAINING = (
    "AdamW, learning rate 1e-4 falling to 0, weight decay 0, gradients clipped at 1, effective "
    "batch 16, the loss of the answers"
)


def data_of() -> tuple[str, ...]:
    """The parts of the data that a training study needs, for ``Recipe.data``."""
    return (TEXT, "{task}/train", "{task}/dev", "{task}/test")


def baseline(plan: Plan) -> Run:
    """The model as it is, by what training runs are measured by."""
    budget = plan.budget
    config = {
        "tasks": {f"{plan.task}/test": budget.questions},
        "tokens": budget.point_tokens,
        "window": budget.window,
        "held_out": {f"{plan.task}/dev": budget.held_out},
    }
    return Run("evaluate", config)


def training(
    plan: Plan,
    adapter: dict,
    *,
    seed: int | None = None,
    sweep: bool = False,
    needs: tuple[Run, ...] = (),
) -> Run:
    """A training run with the published settings.

    Args:
        adapter: see ``adapters``.
        seed: None takes the plan's.
        sweep: one of many that are compared among themselves: on fewer questions where the budget
            is small, and measured at the end only.
        needs: runs beside the detection that its adapter reads.
    """
    budget = plan.budget
    config = {
        "task": plan.task,
        "adapter": adapter,
        "seed": plan.seed if seed is None else seed,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH,
        "accumulate": ACCUMULATE,
        "epochs": budget.epochs,
        "train_questions": budget.sweep_questions if sweep else budget.train_questions,
        "held_out": budget.held_out,
        "questions": budget.questions,
        "points": 1 if sweep else budget.points,
        "point_tokens": budget.point_tokens,
        "window": budget.window,
    }
    return Run("train", config, (DETECT, *needs))


def described(plan: Plan, sweep: bool = False) -> str:
    """How a training study was run, for its section."""
    budget = plan.budget
    count = budget.sweep_questions if sweep else budget.train_questions
    some = "all" if count is None else f"the first {count}"
    asked = "all" if budget.questions is None else f"the first {budget.questions}"
    name = NAMES[f"{plan.task}/test"]
    return (
        f"{TRAINING}; {budget.epochs} passes over {some} training questions of {name}, evaluated "
        f"on {asked} test questions by the lowest perplexity of an answer. The perplexity is of "
        f"the first {budget.point_tokens:,} tokens of WikiText-2, the held-out loss of "
        f"{budget.held_out} validation questions."
    )
