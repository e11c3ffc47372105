"""The frame of what is read off a probe: ``Curvature`` and ``Sensitivity``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swkernels.train.figure import log_where_wide

from .probe import Probe
from .results import Result


@dataclass(frozen=True)
class Probed(Result):
    """Figures of some weights and of random ones of their matrices.

    With N inputs, P weights, R random positions each and Q = P + P R; see ``Probe``.

    Attributes:
        probe: what was measured.
    """

    probe: Probe

    height = 4.2

    def _draw(self, figure) -> None:
        self.draw(figure.subplots())

    def draw(self, axes) -> None:
        """Fill matplotlib axes."""
        raise NotImplementedError


def divided(one: float, other: float) -> float:
    """one / other; NaN where the other is 0."""
    return one / other if other else math.nan


def label_entries(axes, probe: Probe, values: list[float]) -> None:
    """What the panels of entries share: the scale of ``values``, and the entries' names below."""
    log_where_wide(axes, "y", [value for value in values if value > 0])
    axes.grid(True, axis="y", color="#dde2e7", linewidth=0.8)
    axes.margins(x=0.15)
    if len(probe.entries) <= 12:
        labels = [entry.label for entry in probe.entries]
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=7)
    else:
        axes.set_xlabel("weight")
    axes.legend(frameon=False, fontsize=7)
