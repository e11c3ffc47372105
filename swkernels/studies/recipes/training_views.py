"""What the training studies show: a table of accuracies, curves, and whether they collapsed."""

from __future__ import annotations

from swkernels.train.figure import LINE, MARK, MUTED

from ..page import percent
from ..recipe import Figure, Found, Table, Verdict
from .comparing import Accuracy
from .settings import CHANCE, baseline


def training_table(
    found: Found,
    runs: dict[str, dict | None],
    published: dict[str, tuple[str, ...]],
    models: tuple[str, ...],
) -> Table:
    """Accuracy, losses and perplexity of training runs beside the published accuracies."""
    before = found(baseline(found.plan))
    base = before and Accuracy.of(next(iter(before["choices"].values())))
    columns = ["trained", "values", "accuracy [95 %]", "against no training", "training loss"]
    columns += ["held-out loss", "perplexity", *models]
    blank = [None] * len(models)
    rows = []
    if base:
        (held_out,) = before["held_out"].values()
        perplexity = before["perplexity"]["perplexity"]
        rows.append(["nothing", 0, str(base), None, None, held_out, perplexity, *blank])
    for label, figures in runs.items():
        if figures is None:
            continue
        accuracy = Accuracy.of(figures["choices"])
        last = figures["curve"][-1]
        rows.append(
            [
                label,
                figures["parameters"],
                str(accuracy),
                str(accuracy.less(base)) if base else None,
                _change(*_ends(figures["losses"])),
                last["held_out"],
                last["perplexity"],
                *published.get(label, blank),
            ]
        )
    return Table(columns, rows)


def curves(name: str, caption: str, runs: dict[str, dict | None]) -> Figure:
    """Training loss by step, and the perplexity along the way."""
    done = {label: figures for label, figures in runs.items() if figures}
    colors = dict(zip(done, (LINE, MARK, MUTED, "#7f9c3b", "#b58900", "#6c71c4") * 4))

    def draw(figure) -> None:
        left, right = figure.subplots(1, 2)
        for label, figures in done.items():
            losses = figures["losses"]
            left.plot(range(1, len(losses) + 1), losses, color=colors[label], lw=1.2, label=label)
            steps = [point["step"] for point in figures["curve"]]
            values = [point["perplexity"] for point in figures["curve"]]
            right.plot(steps, values, color=colors[label], marker="o", ms=3.5, lw=1.2)
        left.set(xlabel="step", ylabel="training loss, nats")
        right.set(xlabel="step", ylabel="perplexity of the text")
        left.legend(frameon=False, fontsize=8)

    return Figure(name, caption, draw)


def collapse(found: Found, runs: dict[str, dict | None], claim: str) -> list[Verdict]:
    """Whether every run fell to chance."""
    before = found(baseline(found.plan))
    done = {label: Accuracy.of(f["choices"]) for label, f in runs.items() if f}
    if before is None or len(done) < len(runs):
        return []
    base = Accuracy.of(next(iter(before["choices"].values())))
    chance = CHANCE[found.plan.task]
    at_chance = [label for label, accuracy in done.items() if accuracy.interval[0] <= chance]
    fell = [label for label, a in done.items() if a.less(base).high < 0]
    why = "; ".join(f"{label} {percent(a.value)} ({a.less(base)})" for label, a in done.items())
    holds = True if len(at_chance) == len(done) else None if fell and at_chance else False
    return [Verdict(f"{claim}.", holds, f"{percent(base.value)} before; {why}.")]


def _ends(losses: list[float]) -> tuple[float, float]:
    """The mean loss of the first and of the last eighth of the steps."""
    part = max(1, len(losses) // 8)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


def _change(first: float, last: float) -> str:
    return f"{first:.4g} → {last:.4g}"
