"""What the training studies show: accuracies, curves, and what became of the published claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from swkernels.detect.evaluate import exp
from swkernels.train.figure import LINE, MARK, MUTED, legend_above, log_where_wide

from ..page import percent
from ..recipe import Figure, Found, Table, Verdict
from .comparing import Accuracy, all_of, fell_to_chance
from .settings import BASELINE, CHANCE, LEARNING_RATE, PUBLISHED_STEPS, baseline

_FLAT = 1.02  # a ratio of perplexities
COLORS = (LINE, MARK, MUTED, "#7f9c3b", "#b58900", "#6c71c4")
EXPLODED, CALM = 10.0, 2.0  # perplexity over that before: no less has exploded, no more has not

Runs = Mapping[str, dict | None]  # what a run is called: its figures, or None


def untrained(found: Found) -> Accuracy | None:
    """The accuracy of the model as it is."""
    before = found(baseline(found.plan))
    return None if before is None else Accuracy.of(next(iter(before["choices"].values())))


def training_table(
    found: Found,
    runs: Runs,
    published: Mapping[str, Sequence[str]],
    models: Sequence[str],
) -> Table:
    """Accuracy, losses and perplexity of training runs beside the published accuracies."""
    before, base = found(baseline(found.plan)), untrained(found)
    columns = ["trained", "values", "accuracy [95 %]", "against no training", "training loss"]
    columns += ["held-out loss", "perplexity", *models]
    rows = []
    if base:
        (held_out,) = before["held_out"].values()
        perplexity = before["perplexity"]["perplexity"]
        there = [BASELINE[found.plan.task].get(model) for model in models]
        rows.append(["nothing", 0, str(base), None, None, held_out, perplexity, *there])
    for label, figures in runs.items():
        if figures is None:
            continue
        accuracy = Accuracy.of(figures["choices"])
        last = figures["curve"][-1]
        rows.append(
            [
                label + _end(figures),
                figures["parameters"],
                str(accuracy),
                str(accuracy.less(base)) if base else None,
                _change(figures, found.plan.budget.epochs),
                last["held_out"],
                last["perplexity"],
                *published.get(label, [None] * len(models)),
            ]
        )
    caption = (
        "Losses in nats: of training, the means of the first and of the last pass over the same "
        "questions, or of the first and of the last step where there are no two; held out and "
        "perplexity (of the text) after the last step."
    )
    return Table(columns, rows, caption)


def curves(name: str, found: Found, runs: Runs) -> Figure:
    """Training loss by step, and the perplexity of the text along the way from before training."""
    done = {label: figures for label, figures in runs.items() if figures}
    colors = {label: COLORS[n % len(COLORS)] for n, label in enumerate(done)}
    before = found(baseline(found.plan))
    start = [before["perplexity"]["perplexity"]] if before else []

    def draw(figure) -> None:
        left, right = figure.subplots(1, 2)
        reached = list(start)
        for label, figures in done.items():
            losses, points = figures["losses"], figures["curve"]
            left.plot(range(1, len(losses) + 1), losses, color=colors[label], lw=1.2, label=label)
            values = start + [point["perplexity"] for point in points]
            steps = [0] * len(start) + [point["step"] for point in points]
            right.plot(steps, values, color=colors[label], marker="o", ms=3.5, lw=1.2)
            reached += values
        left.set(xlabel="step", ylabel="training loss, nats")
        right.set(xlabel="step", ylabel="perplexity of the text")
        finite = [value for value in reached if math.isfinite(value)]
        if finite and max(finite) < _FLAT * min(finite):  # less is no change to look at
            right.set_ylim(min(finite) / _FLAT, max(finite) * _FLAT)
        log_where_wide(right, "y", reached)
        if done:
            legend_above(left)

    return Figure(name, "Loss of the training answers; perplexity of the text", draw)


def by_size(name: str, caption: str, series: Mapping[str, Runs], found: Found) -> Figure:
    """Accuracy by the number of values that were trained, with chance and the baseline."""
    base, chance = untrained(found), CHANCE[found.plan.task]

    def draw(figure) -> None:
        axes = figure.subplots()
        sizes = []
        for (label, runs), color in zip(series.items(), COLORS):
            done = [figures for figures in runs.values() if figures]
            if not done:
                continue
            found_here = [Accuracy.of(figures["choices"]) for figures in done]
            counts = [figures["parameters"] for figures in done]
            middle = [100 * accuracy.value for accuracy in found_here]
            low, high = np.array([accuracy.interval for accuracy in found_here]).T * 100
            reach = [middle - low, high - middle]
            axes.errorbar(
                counts, middle, reach, color=color, marker="o", ms=4, lw=1.2, capsize=3, label=label
            )
            sizes += counts
        if base:
            axes.axhline(100 * base.value, color=MUTED, lw=1, ls="--", label="no training")
        axes.axhline(100 * chance, color=MUTED, lw=1, ls=":", label="chance")
        log_where_wide(axes, "x", sizes)
        axes.set(xlabel="values trained", ylabel="accuracy, %")
        legend_above(axes)

    return Figure(name, caption, draw)


def collapsed(found: Found, figures: dict) -> bool | None:
    """Whether a run fell to chance.

    A run that has not, after fewer steps than were published, might have later: None.
    """
    fell = fell_to_chance(
        Accuracy.of(figures["choices"]), untrained(found), CHANCE[found.plan.task]
    )
    short = len(figures["losses"]) < PUBLISHED_STEPS[found.plan.task]
    return None if fell is False and short else fell


def collapse(found: Found, runs: Runs, claim: str) -> list[Verdict]:
    """Whether every run fell to chance; one that did not decides before all are done."""
    done = {label: figures for label, figures in runs.items() if figures}
    if untrained(found) is None or not done:
        return []
    holds = all_of(collapsed(found, figures) for figures in done.values())
    if holds is not False and len(done) < len(runs):
        return []
    return [Verdict(f"{claim}.", holds, f"{accuracies(found, done)}{few_steps(found, done)}.")]


def explosion(found: Found, runs: Runs) -> list[Verdict]:
    """Whether the training loss fell in every run while the perplexity exploded.

    One run in which they did not decides before all are done.
    """
    before = found(baseline(found.plan))
    done = {label: figures for label, figures in runs.items() if figures}
    if before is None or not done:
        return []
    intact = before["perplexity"]["perplexity"]
    (held_out,) = before["held_out"].values()
    whole = PUBLISHED_STEPS[found.plan.task]
    states, said = [], []
    for label, figures in done.items():
        last = figures["curve"][-1]
        ratios = last["perplexity"] / intact, exp(last["held_out"] - held_out)
        # Written so that a ratio that is NaN has exploded.
        calm = all(ratio < CALM for ratio in ratios)
        little = all(ratio < EXPLODED for ratio in ratios)
        grown = False if calm else None if little else True
        grown = None if grown is False and len(figures["losses"]) < whole else grown
        states += [loss_falls(figures, found.plan.budget.epochs), grown]
        fall = _change(figures, found.plan.budget.epochs)
        said.append(
            f"{label} loss {fall or 'of one step'}, perplexity of the text × {ratios[0]:.4g}, of "
            f"held-out answers × {ratios[1]:.4g}"
        )
    holds = all_of(states)
    if holds is not False and len(done) < len(runs):
        return []
    why = f"{'; '.join(said)} (exploded: {EXPLODED:g}-fold or more){few_steps(found, done)}."
    return [
        Verdict("The training loss falls while the validation perplexity explodes.", holds, why)
    ]


def loss_falls(figures: dict, epochs: float) -> bool | None:
    """Whether the last pass has a lower loss than the first, by the 95 % interval over steps.

    Both passes see the same questions. None where that cannot be told, or there are no two passes.
    """
    passes = _passes(figures, epochs)
    if passes is None:
        return None
    first, last = passes
    reach = 1.96 * math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / len(first))
    change = last.mean() - first.mean()
    return None if abs(change) <= reach else bool(change < 0)


def _passes(figures: dict, epochs: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The losses of the first and of the last pass; None where there are no two."""
    losses = np.array(figures["losses"])
    steps = int(figures["steps"] / epochs)  # of a pass
    return None if steps < 2 or len(losses) < 2 * steps else (losses[:steps], losses[-steps:])


def accuracies(found: Found, runs: Runs) -> str:
    """The accuracy before and after each run, with the differences on the same questions."""
    base = untrained(found)
    each = []
    for label, figures in runs.items():
        accuracy = Accuracy.of(figures["choices"])
        each.append(f"{label} {percent(accuracy.value)} ({accuracy.less(base)})")
    chance = percent(CHANCE[found.plan.task])
    return f"chance {chance}, no training {base}; {'; '.join(each)}"


def few_steps(found: Found, runs: Runs) -> str:
    """That the runs were shorter than the published ones, where they were."""
    whole = PUBLISHED_STEPS[found.plan.task]
    steps = min(len(figures["losses"]) for figures in runs.values() if figures)
    return f"; {steps} steps of {whole} that were published" if steps < whole else ""


def notes(found: Found, runs: Runs) -> list[str]:
    """What to be careful about in every training study."""
    whole = PUBLISHED_STEPS[found.plan.task]
    steps = max((figures["steps"] for figures in runs.values() if figures), default=whole)
    if steps >= whole:
        return []
    far, published = (LEARNING_RATE * (count + 1) / 2 for count in (steps, whole))
    return [
        f"{steps} steps where the published settings make {whole}. AdamW moves a value by about "
        f"the learning rate in a step, at most: by {far:.2g} in all here, by {published:.2g} with "
        "the same schedule there. What has not happened here may still happen there: `--budget "
        "long` has all the steps."
    ]


def _end(figures: dict) -> str:
    return "" if figures["diverged"] is None else f" (diverged in step {figures['diverged']})"


def _change(figures: dict, epochs: float) -> str | None:
    """The mean loss of the first and of the last pass, or of steps where there are no passes."""
    losses = np.array(figures["losses"])
    if len(losses) < 2:
        return None
    first, last = _passes(figures, epochs) or (losses[:1], losses[-1:])
    return f"{first.mean():.4g} → {last.mean():.4g}"
