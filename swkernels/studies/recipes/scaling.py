"""Scaling: the super weights times a factor (arXiv 2411.07191)."""

from __future__ import annotations

from swkernels.evidence.scale import FACTORS
from swkernels.train.figure import LINE, MARK, MUTED, legend_above, log_where_wide

from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..sets import SUPER_WEIGHTS
from . import edited
from .comparing import Accuracy, Difference
from .edited import Ratio, guessed_notes, reading, together

# Perplexity over the intact model's: OLMo-1B's first super weight, by a replication's notes.
PUBLISHED = {0.25: "×279", 0.5: "×8.3", 0.75: "×1.03"}


def run_of(plan: Plan, factor: float) -> Run:
    return reading(plan, None) if factor == 1 else reading(plan, SUPER_WEIGHTS, factor)


def section(found: Found) -> Section | None:
    done = {factor: found(run_of(found.plan, factor)) for factor in FACTORS}
    done = {factor: figures for factor, figures in done.items() if figures is not None}
    intact = done.get(1)
    if intact is None:
        return None
    rows = [
        [f"×{factor:g}", *edited.cells(figures, intact), PUBLISHED.get(factor)]
        for factor, figures in done.items()
    ]
    columns = ["factor", *edited.columns(), "OLMo-1B, times"]
    verdicts = []
    if len(done) == len(FACTORS):
        verdicts = [_best_accuracy(done), _best_perplexity(done), _shrinking(done)]
    return Section(
        edited.described(found.plan),
        [
            Table(columns, rows, _TABLE),
            Figure("scaling", _CAPTION, lambda figure: _draw(figure, done)),
        ],
        verdicts,
        [
            "Published for Llama-7B is a gain in the average over zero-shot tasks of 0.39 points "
            "(Table 5; the authors' notebook has 0.43, at ×2): the questions here are far too few "
            "to see such a gain.",
            "The column of OLMo-1B is of one super weight, layer 1 [1764, 1710]; here all detected "
            "ones are scaled at once. It is from the notes of a replication by others, which were "
            "not published as a paper, over 32 windows of 2,048 tokens of the same text.",
            "The best of several factors is chosen among them after the fact: its p-value is "
            "multiplied by their number, and the interval of its perplexity is as much wider.",
            *guessed_notes(intact),
        ],
    )


_TABLE = (
    "All super weights times a factor. Times: the perplexity over the intact model's, in percent "
    "where it is nearly 1. All questions: those of both tasks. Against intact: on those, in pairs."
)
_CAPTION = "Perplexity over the intact model's, and accuracy, by factor (95 %)"


def _draw(figure, done: dict[float, dict]) -> None:
    left, right = figure.subplots(1, 2)
    ratios = {factor: Ratio.of(figures, done[1]) for factor, figures in done.items()}
    shown = [factor for factor, ratio in ratios.items() if ratio.bounded]
    values = [ratios[factor].value for factor in shown]
    ends = [
        [ratios[f].value - ratios[f].low for f in shown],
        [ratios[f].high - ratios[f].value for f in shown],
    ]
    left.errorbar(shown, values, yerr=ends, color=LINE, marker="o", ms=4, lw=1.2, elinewidth=1)
    log_where_wide(left, "y", values)
    left.axhline(1, color=MUTED, lw=1, ls=":")
    left.set(xlabel="factor", ylabel="perplexity / intact")
    for task, color in zip(done[1]["choices"], (LINE, MARK)):
        scores = [Accuracy.of(figures["choices"][task]) for figures in done.values()]
        middles = [100 * score.value for score in scores]
        ends = [
            [max(0, m - 100 * score.interval[0]) for m, score in zip(middles, scores)],
            [max(0, 100 * score.interval[1] - m) for m, score in zip(middles, scores)],
        ]
        right.errorbar(
            list(done), middles, yerr=ends, color=color, marker="o", ms=4, lw=1.2, elinewidth=1,
            label=task,
        )  # fmt: skip
    right.set(xlabel="factor", ylabel="right answers, %")
    legend_above(right)


def _best_accuracy(done: dict[float, dict]) -> Verdict:
    intact = together(done[1])
    gains: dict[float, Difference] = {
        factor: together(figures).less(intact) for factor, figures in done.items() if factor > 1
    }
    best = max(gains, key=lambda factor: gains[factor].value)
    p_value = min(1.0, len(gains) * gains[best].p_value)
    if gains[best].value > 0 and p_value < 0.05:
        holds = True
    else:
        holds = False if all(gain.is_loss for gain in gains.values()) else None
    return Verdict(
        "A factor above 1 is best for the accuracy.",
        holds,
        f"with ×{best:g}, the best above 1, {gains[best]}; times {len(gains)} factors p = "
        f"{p_value:.2g}.",
    )


def _best_perplexity(done: dict[float, dict]) -> Verdict:
    above = [factor for factor in done if factor > 1]
    ratios = {factor: Ratio.of(done[factor], done[1], len(above)) for factor in above}
    best = min(ratios, key=lambda factor: ratios[factor].value)
    if ratios[best].high < 1:
        holds = True
    else:
        holds = False if all(ratio.low > 1 for ratio in ratios.values()) else None
    return Verdict(
        "A factor above 1 is best for the perplexity.",
        holds,
        f"with ×{best:g}, the best above 1, perplexity {ratios[best]}, an interval for the best of "
        f"{len(above)}.",
    )


def _shrinking(done: dict[float, dict]) -> Verdict:
    ratios = {
        factor: Ratio.of(figures, done[1]) for factor, figures in done.items() if 0 < factor < 1
    }
    if all(ratio.low > 1 for ratio in ratios.values()):
        holds = True
    else:
        harmless = all(ratio.high < edited.HARMLESS for ratio in ratios.values())
        holds = False if harmless or any(ratio.high < 1 for ratio in ratios.values()) else None
    why = "; ".join(f"×{factor:g}: {ratio}" for factor, ratio in ratios.items())
    return Verdict("Shrinking the super weights hurts.", holds, f"perplexity with {why}.")


SCALING = Recipe(
    "scaling",
    "Scaling the super weights",
    "Figure 6 of arXiv 2411.07191",
    "Super weights a little larger than they are help a little, smaller ones hurt.",
    edited.DATA,
    minutes=8,
    runs=lambda plan: [run_of(plan, factor) for factor in FACTORS],
    section=section,
)
