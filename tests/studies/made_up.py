"""Made-up figures of runs, for what a page says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from swkernels.studies.recipe import Found, Plan, Section, Verdict
from swkernels.studies.recipes.settings import baseline
from swkernels.studies.run import Run
from tests.studies import tiny

QUESTIONS = 400
CHANCE, BASE = 100, 240  # right answers of 400: 25 %, 60 %
# Budgets whose sizes are the published ones, so that labels are.
PLAN = Plan(replace(tiny.TINY, counts=(100, 1000, 4096, 8192), epochs=3), (42, 43, 44))
WINOGRANDE = replace(PLAN, task="winogrande")


class MadeUp(Found):
    """The figures of runs as they are given."""

    def __init__(self, plan: Plan, figures: Mapping[Run, dict]):
        self.plan = plan
        self._figures = dict(figures)

    def __call__(self, run: Run) -> dict | None:
        return self._figures.get(run)


def found(figures: Mapping[Run, dict], *, right: int = BASE, of: int = QUESTIONS, plan=PLAN):
    """Those, and the model as it is with so many right answers and a perplexity of 20."""
    name = {"arc": "ARC-Easy", "winogrande": "Winogrande"}[plan.task]
    intact = {
        "perplexity": {"perplexity": 20.0},
        "choices": {name: choices(right, of)},
        "held_out": {f"{plan.task}/dev": 4.5},
    }
    return MadeUp(plan, {baseline(plan): intact} | dict(figures))


def choices(right: int, of: int = QUESTIONS) -> dict:
    """The first ``right`` questions are right."""
    return {"answers": [0] * of, "predictions": [0] * right + [1] * (of - right)}


def trained(
    right: int,
    of: int = QUESTIONS,
    *,
    steps: int = 422,
    losses=None,
    perplexity: float = 20.0,
    values: int = 4,
    diverged: int | None = None,
) -> dict:
    """Figures of a training run; the losses fall from 4 to 2 by themselves."""
    if losses is None:
        losses = [4 - 2 * n / steps + 0.1 * (-1) ** n for n in range(steps)]
    return {
        "parameters": values,
        "steps": steps,
        "losses": losses,
        "curve": [
            {"step": steps // 2, "held_out": 4.4, "perplexity": (perplexity + 20) / 2},
            {"step": steps, "held_out": 4.25, "perplexity": perplexity},
        ],
        "choices": choices(right, of),
        "change": {"relative": {"mean": 0.0123}},
        "diverged": diverged,
    }


def verdict(section: Section | list[Verdict], words: str) -> Verdict:
    """The only verdict whose claim has these words."""
    verdicts = section if isinstance(section, list) else section.verdicts
    (one,) = [verdict for verdict in verdicts if re.search(words, verdict.claim)]
    return one
