"""The loss of a training run as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from .figure import LINE, MARK, MUTED, render


def loss_png(losses: Sequence[float], evaluated: tuple[float, float] | None = None) -> bytes:
    """Draw the loss of every step, its running mean, and a held-out loss before and after.

    Args:
        losses: nats, one per step.
        evaluated: before and after training, nats, or None.
    """

    def draw(figure) -> None:
        axes = figure.subplots()
        steps = range(1, len(losses) + 1)
        marker = "o" if len(losses) == 1 else None
        axes.plot(steps, losses, color=MUTED, linewidth=0.8, alpha=0.6, marker=marker, label="loss")
        axes.plot(steps, running_mean(losses), color=LINE, linewidth=1.8, label="running mean")
        if evaluated is not None:
            ends = [0, len(losses)]
            axes.plot(ends, evaluated, "D--", color=MARK, linewidth=0.8, label="evaluation text")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(True, color="#dde2e7", linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)

    return render(draw, "png", height=3.8)


def running_mean(losses: Sequence[float], weight: float = 0.1) -> list[float]:
    """An exponential mean without the bias of its start."""
    means, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = (1 - weight) * mean + weight * loss
        means.append(mean / (1 - (1 - weight) ** step))
    return means
