"""What an ``Evaluation`` looks like: the windows of a text, and the accuracy on each task."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from swkernels.detect.evaluate import exp
from swkernels.train.figure import INK, LINE, MARK, MUTED

from .choices import RULES

_COLORS = (LINE, MARK, MUTED, INK)
_WIDE = 10.0  # perplexities of windows that differ more than so many times need a log scale


def panels(evaluation) -> list[tuple[Callable, float]]:
    """What draws each panel, called with (axes, evaluation), and its height in inches."""
    text: list[tuple[Callable, float]] = [(_draw_windows, 3.0)]
    bars = len(RULES) * len(evaluation.conditions)
    return (text if evaluation.scores.perplexity is not None else []) + [
        (lambda axes, e, name=name: _draw_accuracy(axes, e, name), 0.8 + 0.22 * bars)
        for name in evaluation.scores.choices
    ]


def draw(figure, evaluation) -> None:
    """Fill a matplotlib figure; there is one panel at least."""
    drawn = panels(evaluation)
    heights = [inches for _, inches in drawn]
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for one, (fill, _) in zip(axes, drawn):
        fill(one, evaluation)


def _draw_windows(axes, evaluation) -> None:
    """The perplexity of each window, a line a model."""
    drawn: list[float] = []
    for number, condition in enumerate(evaluation.conditions):
        found, color = condition.scores.perplexity, _COLORS[number % len(_COLORS)]
        values = [exp(loss / count) for loss, count in zip(found.losses, found.tokens)]
        finite = [(at, value) for at, value in enumerate(values) if math.isfinite(value)]
        drawn += [value for _, value in finite]
        label = f"{condition.which}: {found.value:.5g}"
        xs, ys = [at for at, _ in finite], [value for _, value in finite]
        axes.plot(xs, ys, "o-", ms=3, lw=1, color=color, label=label)
        # No height of the scale is theirs: they stand at the upper edge.
        broken = [at for at, value in enumerate(values) if not math.isfinite(value)]
        axes.plot(broken, [0.97] * len(broken), "x", color=color,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    if drawn and max(drawn) > _WIDE * min(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("window")
    axes.set_ylabel("perplexity")
    axes.grid(True, color="#dde2e7", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)


def _draw_accuracy(axes, evaluation, task: str) -> None:
    """The accuracy on a task by each rule with its interval, a colour a model."""
    labels, place = [], 0
    for rule in RULES:
        for number, condition in enumerate(evaluation.conditions):
            scores = replace(condition.scores.choices[task], rule=rule)
            low, high = scores.interval
            color = _COLORS[number % len(_COLORS)]
            axes.plot([100 * low, 100 * high], [place, place], color=color, lw=2)
            axes.plot([100 * scores.accuracy], [place], "o", color=color)
            labels.append(f"{condition.which}, {rule}")
            place += 1
    axes.set_yticks(range(place), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{task}: % correct, with 95 % intervals")
    axes.grid(axis="x", color="#dde2e7", linewidth=0.8)


__all__ = ["draw", "panels"]
