"""How much of the data and of the training a study takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from swkernels.errors import InvalidInput


@dataclass(frozen=True)
class Budget:
    """Sizes that studies share; the page states them.

    Attributes:
        name: for the page and the records.
        samples, length: texts of a consistency study, and tokens of each.
        tokens, window: of the text whose perplexity is measured, and of a window; tokens None
            takes all of it.
        questions: of each task that are evaluated, the first ones; None takes all.
        train_questions: of the training set, the first ones; None takes all.
        sweep_questions: the same, for studies that compare many runs.
        epochs: passes over them.
        held_out: questions of the validation set, for the loss along the way.
        points: how often that loss and a perplexity are measured during training.
        point_tokens: of the text, for the perplexity along the way.
        counts: k, how many weights are trained; the neighborhoods take the first three. The third,
            or the last of fewer, is the one whose random control was published.
        ranked: as many of the largest count as super weights: random controls avoid them, and
            masks lie on them.
        delta_top: as many of the largest updates of a LoRA are frozen in the next.
        seeds: of studies over seeds.
        prompts, inputs: texts for amplification, and for curvature and perturbation.
        top: super weights by magnitude that analyses look at, after those that were detected.
        trials: random draws of the numerical checks of ``subspace``.
        blocks: block sizes of the quantization study.
    """

    name: str
    samples: int
    length: int
    tokens: int | None
    window: int
    questions: int | None
    train_questions: int | None
    sweep_questions: int | None
    epochs: float
    held_out: int
    points: int
    point_tokens: int
    counts: tuple[int, ...]
    ranked: int
    delta_top: int
    seeds: tuple[int, ...]
    prompts: int
    inputs: int
    top: int
    trials: int
    blocks: tuple[int, ...]

    @property
    def control(self) -> int:
        """The k whose random control is compared with as many super weights: 4,096."""
        return self.counts[min(2, len(self.counts) - 1)]


COUNTS = (100, 1000, 4096, 8192)
RANKED = 10_000

SMALL = Budget(
    "small", samples=200, length=128, tokens=4096, window=1024, questions=200,
    train_questions=256, sweep_questions=128, epochs=3, held_out=48, points=3, point_tokens=2048,
    counts=COUNTS, ranked=RANKED, delta_top=1000, seeds=(42, 43, 44, 45, 46, 47), prompts=50,
    inputs=10, top=6, trials=200, blocks=(64, 256, 1024, 4096, 16384, 65536),
)  # fmt: skip
# As many steps as were published, for the claims that few steps cannot decide.
LONG = replace(
    SMALL, name="long", questions=500, train_questions=None, sweep_questions=None,
    counts=(100, 4096),
)  # fmt: skip
FULL = Budget(
    "full", samples=1000, length=128, tokens=None, window=2048, questions=None,
    train_questions=None, sweep_questions=None, epochs=3, held_out=500, points=10,
    point_tokens=16384, counts=COUNTS, ranked=RANKED, delta_top=1000, seeds=tuple(range(42, 52)),
    prompts=100, inputs=50, top=24, trials=1000,
    blocks=(64, 256, 1024, 4096, 16384, 65536, 262144, 1048576),
)  # fmt: skip
BUDGETS = {budget.name: budget for budget in (SMALL, LONG, FULL)}


def budget_named(name: str) -> Budget:
    """Return a budget, or raise InvalidInput."""
    if name not in BUDGETS:
        raise InvalidInput(f"expected a budget of {', '.join(BUDGETS)}, got {name!r:.100}")
    return BUDGETS[name]


_SEEDS = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?", re.ASCII)
_MOST_SEEDS = 1000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "42-51", "42,44" or both.

    Raises:
        InvalidInput: no seeds, one twice, or too many.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        if match is None:
            raise InvalidInput(f"expected seeds such as 42-51 or 42,43, got {text!r:.100}")
        low, high = int(match[1]), int(match[2] or match[1])
        if not low <= high < 2**31 or len(found) + high - low >= _MOST_SEEDS:
            raise InvalidInput(
                f"expected seeds from a smaller to a larger one, below 2^31 and at most 1,000 of "
                f"them, got {text!r:.100}"
            )
        found += range(low, high + 1)
    if len(set(found)) < len(found):
        raise InvalidInput(f"{text!r:.100} names a seed twice")
    return tuple(found)
