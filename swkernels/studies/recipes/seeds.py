"""LoRA with and without a mask over seeds (Table 11, Figure 3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from swkernels.train.figure import LINE, MARK, MUTED, legend_above

from ..page import percent
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from .comparing import Accuracy
from .lora import run_of as vanilla
from .lora_delta_freeze import mean_and_deviation
from .lora_mask import run_of as masked
from .lora_views import DROPOUT, INDICES, LEVEL, MARGIN, agreement, has_effect, short
from .settings import baseline, data_of, described
from .training_views import few_steps, untrained

METHODS = ("LoRA", "masked, s = 0")
# ARC-Easy accuracy over ten seeds: mean and deviation of both methods alike, seeds whose
# predictions were all the same, p-value.
PUBLISHED = {
    "OLMo-1B": ("62.90 ± 0.45 %", "8 of 10", "> 0.05"),
    "OLMo-7B": ("66.05 ± 1.14 %", "10 of 10", "1.0"),
}
PUBLISHED_SHARE = 0.8  # of the seeds, the smaller
DRAWS = 2000
_MICRO = 10**6  # of a nat, as integers


def pair_of(plan: Plan, seed: int) -> tuple[Run, Run]:
    """LoRA, and LoRA with the rows and columns of super weights at zero."""
    return vanilla(plan, seed=seed, sweep=True), masked(plan, "rows and columns", 0.0, seed)


def runs(plan: Plan) -> list[Run]:
    return [baseline(plan), *(run for seed in plan.seeds for run in pair_of(plan, seed))]


def section(found: Found) -> Section | None:
    plan = found.plan
    pairs = {seed: tuple(map(found, pair_of(plan, seed))) for seed in plan.seeds}
    pairs = {seed: pair for seed, pair in pairs.items() if all(pair)}
    if not pairs:
        return None
    whole = len(pairs) == len(plan.seeds) > 1 and untrained(found) is not None
    return Section(
        described(plan, sweep=True),
        [_summary(plan, pairs), _each(pairs), _figure(found, pairs)],
        [_no_difference(found, pairs), _identical(pairs)] if whole else [],
        [
            "The p-value is of the exact test that flips the signs of the differences of the "
            f"seeds: of {len(pairs)} it cannot be below {2 / 2 ** len(pairs):.2g}. The "
            "paper does not name its test.",
            "The interval of the mean difference comes from drawing seeds and questions anew, both "
            "with replacement, 2,000 times.",
            "The mask is that of rows of B and columns of A: the paper's count of frozen values is "
            "that of both. " + INDICES,
            DROPOUT,
            *short(found, next(iter(pairs.values()))[0]),
        ],
    )


def sign_flip(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of a mean difference, where each sign is a fair coin.

    Args:
        differences: of each pair, integers, such as numbers of right answers.
    """
    sums = Counter({0: 1})
    for difference in differences:
        flipped: Counter = Counter()
        for total, ways in sums.items():
            flipped[total + difference] += ways
            flipped[total - difference] += ways
        sums = flipped
    seen = abs(sum(differences))
    extreme = sum(ways for total, ways in sums.items() if abs(total) >= seen)
    return extreme / 2 ** len(differences)


def mean_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over seeds and questions [S, Q], both drawn with replacement."""
    generator = np.random.default_rng(seed)
    S, Q = differences.shape
    means = []
    for _ in range(DRAWS):
        rows, columns = generator.integers(S, size=S), generator.integers(Q, size=Q)
        means.append(differences[rows][:, columns].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _differences(pairs: dict) -> np.ndarray:
    """Masked less vanilla, right answers: int [seeds, questions]."""
    right = np.array(
        [[Accuracy.of(figures["choices"]).correct for figures in pair] for pair in pairs.values()],
        dtype=int,
    )  # [S, 2, Q]
    return right[:, 1] - right[:, 0]


def _summary(plan: Plan, pairs: dict) -> Table:
    values = [[Accuracy.of(pair[n]["choices"]).value for pair in pairs.values()] for n in (0, 1)]
    p_value = sign_flip(_differences(pairs).sum(1).tolist())
    identical = sum(agreement(*pair) == 1 for pair in pairs.values())
    rows = [
        [METHODS[0], mean_and_deviation(values[0]), None, None],
        [METHODS[1], mean_and_deviation(values[1]), f"{identical} of {len(pairs)}", p_value],
    ]
    if plan.task == "arc":
        rows += [[f"published, {model}, both", *cells] for model, cells in PUBLISHED.items()]
    columns = ["method", "accuracy", "seeds with identical predictions", "p-value"]
    return Table(columns, rows, f"Mean and standard deviation over seeds: {len(pairs)}.")


def _each(pairs: dict) -> Table:
    rows = []
    for seed, (first, second) in pairs.items():
        a, b = (Accuracy.of(figures["choices"]) for figures in (first, second))
        losses = [figures["curve"][-1]["held_out"] for figures in (first, second)]
        rows.append(
            [str(seed), str(a), str(b), str(b.less(a)), percent(agreement(first, second)), *losses]
        )
    columns = ["seed", "LoRA [95 %]", "masked [95 %]", "masked minus LoRA", "same predictions"]
    return Table([*columns, "held-out loss, LoRA", "masked"], rows)


def _figure(found: Found, pairs: dict) -> Figure:
    base = untrained(found)

    def draw(figure) -> None:
        axes = figure.subplots()
        for n, (method, color) in enumerate(zip(METHODS, (LINE, MARK))):
            values = [100 * Accuracy.of(pair[n]["choices"]).value for pair in pairs.values()]
            places = np.arange(len(pairs)) + 0.36 * (n - 0.5)
            axes.bar(places, values, 0.34, color=color, label=method)
        if base:
            axes.axhline(100 * base.value, color=MUTED, lw=1, ls="--", label="no training")
        axes.set_xticks(range(len(pairs)), [str(seed) for seed in pairs])
        axes.set(xlabel="seed", ylabel="accuracy, %")
        legend_above(axes)

    return Figure("seeds", "Accuracy by seed", draw)


def _no_difference(found: Found, pairs: dict) -> Verdict:
    differences = _differences(pairs)
    p_value, (low, high) = sign_flip(differences.sum(1).tolist()), mean_interval(differences)
    first = next(iter(pairs.values()))[0]
    effect = has_effect(found, first)
    holds = False if p_value < LEVEL else None
    near = max(-low, high) < MARGIN and enough_questions(differences.shape[1])
    if holds is None and near and effect:
        holds = True
    why = (
        f"masked minus LoRA {100 * differences.mean():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] "
        f"points over {len(pairs)} seeds, p = {p_value:.2g}; the margin is {100 * MARGIN:g} points"
        f"{few_steps(found, {'': first})}."
    )
    if not effect:
        why += " The accuracy of LoRA itself does not differ clearly from that of no training."
    why += f" {_by_loss(pairs)}"
    return Verdict(
        "Masking the rows and columns of super weights makes no difference over seeds.", holds, why
    )


def _by_loss(pairs: dict) -> str:
    """What the mask costs in held-out loss, which few questions show better than accuracies."""
    costs = [
        masked["curve"][-1]["held_out"] - vanilla["curve"][-1]["held_out"]
        for vanilla, masked in pairs.values()
    ]
    p_value = sign_flip([round(_MICRO * cost) for cost in costs])
    higher = sum(cost > 0 for cost in costs)
    return (
        f"In held-out loss it costs {np.mean(costs):+.3g} nats, more than 0 in {higher} of "
        f"{len(costs)} seeds, p = {p_value:.2g}."
    )


def _identical(pairs: dict) -> Verdict:
    n = len(pairs)
    k = sum(agreement(*pair) == 1 for pair in pairs.values())
    most = 1 - at_most(k - 1, n, 0.5)  # chance of so many where half of all seeds are identical
    asked = len(next(iter(pairs.values()))[0]["choices"]["predictions"])
    if at_most(k, n, PUBLISHED_SHARE) < LEVEL:
        holds = False
    else:  # of a few questions any two runs may predict the same
        holds = True if most < LEVEL and enough_questions(asked) else None
    shares = ", ".join(percent(agreement(*pair)) for pair in pairs.values())
    return Verdict(
        "Most seeds give identical predictions with and without the mask.",
        holds,
        f"{k} of {n} seeds do on the {asked:,} questions here (8 of 10 and 10 of 10 were "
        f"published, of 2,376); by question the same: {shares}.",
    )


def enough_questions(count: int) -> bool:
    """Whether what none of so many questions shows is rarer than the margin (rule of three).

    The interval over seeds and questions is a bootstrap's, which does not know it.
    """
    return count * MARGIN >= 3


def at_most(k: int, n: int, share: float) -> float:
    """The chance of k or fewer of n, each with chance ``share``."""
    return sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k + 1))


SEEDS = Recipe(
    "seeds",
    "LoRA with and without a mask over seeds",
    "Table 11 and Figure 3 of arXiv 2607.08733",
    "Vanilla LoRA against LoRA with the rows and columns of super weights at zero; the paper finds "
    "no difference.",
    data_of(),
    minutes=25,
    runs=runs,
    section=section,
    needs_lora=True,
    least_seeds=2,
)
