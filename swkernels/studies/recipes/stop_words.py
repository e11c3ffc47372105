"""Stop words: how likely they are once the super weights are zero (arXiv 2411.07191)."""

from __future__ import annotations

import math

from swkernels.evidence.stop_words import STOP_WORDS as WORDS
from swkernels.train.figure import LINE, MUTED, log_where_wide

from ..data import TEXT
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..sets import SUPER_WEIGHTS
from . import edited
from .edited import Ratio, reading

# Llama-7B: times as likely without its super weight.
PUBLISHED = {"the": "×2", ".": "×5", ",": "×10"}


def run_of(plan: Plan, of: str | None) -> Run:
    """With the weights of a set zero, or the model as it is."""
    return reading(plan, of, asked=False, stop_words=WORDS)


def runs(plan: Plan) -> list[Run]:
    return [run_of(plan, None), run_of(plan, SUPER_WEIGHTS)]


def section(found: Found) -> Section | None:
    intact, gone = (found(run) for run in runs(found.plan))
    if intact is None or gone is None:
        return None
    before, after = intact["stop_words"], gone["stop_words"]
    ratios = _ratios(before, after)
    rows = [
        [
            f"`{word}`",
            before["probabilities"][word],
            after["probabilities"][word],
            str(ratio),
            PUBLISHED.get(word),
        ]
        for word, ratio in ratios.items()
    ]
    every = Ratio.of_sums(*([sum(sums) for sums in stops["windows"]] for stops in (after, before)))
    rows.append(["mean", before["mean"], after["mean"], str(every), None])
    left_out = ", ".join(f"`{word}`" for word in before["left_out"])
    return Section(
        edited.described(found.plan, asked=False),
        [
            Table(["word", "intact", "super weights zero", "times [95 %]", "Llama-7B"], rows),
            Figure("stop-words", _CAPTION, lambda figure: _draw(figure, ratios), height=4.6),
        ],
        [_likelier(every, ratios)],
        [
            f"The mean probability of each word over all {before['predictions']:,} predictions of "
            "the text; the paper has 500 prompts of Lambada. Perplexity without the weights: "
            f"{Ratio.of(gone, intact)}.",
            *([f"Not one token here, and left out: {left_out}."] if left_out else []),
        ],
    )


def _ratios(before: dict, after: dict) -> dict[str, Ratio]:
    """Of each word how many times as likely it is, by windows."""
    columns = (zip(*found["windows"]) for found in (after, before))
    return {
        word: Ratio.of_sums(ours, theirs)
        for word, ours, theirs in zip(before["probabilities"], *columns, strict=True)
    }


def _likelier(every: Ratio, ratios: dict[str, Ratio]) -> Verdict:
    more = [f"`{word}`" for word, ratio in ratios.items() if ratio.low > 1]
    less = [f"`{word}`" for word, ratio in ratios.items() if ratio.high < 1]
    return Verdict(
        "Stop words become likelier without the super weights.",
        True if every.low > 1 else False if every.high < 1 else None,
        f"all together {every}; clearly likelier: {', '.join(more) or 'none'}; clearly less "
        f"likely: {', '.join(less) or 'none'}.",
    )


_CAPTION = "How many times as likely each word is with the super weights zero (95 %)"


def _draw(figure, ratios: dict[str, Ratio]) -> None:
    axes = figure.subplots()
    for place, ratio in enumerate(ratios.values()):
        if ratio.bounded:
            axes.plot([ratio.low, ratio.high], [place, place], color=LINE, lw=1)
        if 0 < ratio.value < math.inf:  # others have no place on the axis
            axes.plot(ratio.value, place, "o", color=LINE, ms=5)
    axes.axvline(1, color=MUTED, lw=1, ls=":")
    log_where_wide(axes, "x", [1, *(r.value for r in ratios.values() if r.value > 0)])
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.set(xlabel="probability / intact")


STOP_WORDS = Recipe(
    "stop-words",
    "Stop words without the super weights",
    "section 3.2 and Figures 5 and 11 of arXiv 2411.07191",
    "Without its super weight Llama-7B says stop words more often.",
    (TEXT,),
    minutes=2,
    runs=runs,
    section=section,
)
