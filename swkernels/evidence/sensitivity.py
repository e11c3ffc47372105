"""What a small change of a single weight does to the loss, measured and foretold.

The training paper (arXiv 2607.08733, appendix I.3.3) moves weights by 1e-4 and measures. The exact
gradient g and curvature H say what that must give, to second order: g eps + H eps^2 / 2 (its
equation 18); where the two differ by no more than the noise, the measurement adds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from swkernels.train import Coordinates
from swkernels.train.figure import LINE, MARK, MUTED

from .probe import EPSILON, probe
from .probed import Probed, divided, label_entries
from .results import Progress, silent
from .spread import Spread

FORMULA = "measured |L(w + eps) - L(w)|;  foretold |g eps + H eps^2 / 2|"


@dataclass(frozen=True)
class Sensitivity(Probed):
    """By how much the loss changes when a weight moves by eps."""

    schema = "swkernels.sensitivity/1"

    @cached_property
    def measured(self) -> torch.Tensor:
        """float64 [N, Q]: |L(w + eps) - L(w)|, in nats."""
        return (self.probe.up - self.probe.losses[:, None]).abs()

    @cached_property
    def foretold(self) -> torch.Tensor:
        """float64 [N, Q]: |g eps + H eps^2 / 2|, with eps as it was after rounding."""
        step = self.probe.steps[0]
        return (self.probe.gradients * step + self.probe.curvatures * step**2 / 2).abs()

    @property
    def noise(self) -> torch.Tensor:
        """float64 [N]: standard deviation of a measured change, two losses' rounding."""
        return math.sqrt(2) * self.probe.rounding

    @cached_property
    def ratios(self) -> Spread:
        """Foretold change of the weight over that of its random position, all inputs and pairs."""
        return self.probe.ratios(self.foretold)

    @cached_property
    def measured_ratios(self) -> Spread:
        """The same of the measured changes, as published."""
        return self.probe.ratios(self.measured)

    @property
    def buried(self) -> float:
        """The share of all changes foretold to be smaller than the noise."""
        return float((self.foretold < self.noise[:, None]).double().mean())

    def rows(self) -> list[dict]:
        """A row for each weight: means over inputs; ``noise`` is that of one measurement."""
        rows = self.probe.rows({"foretold": self.foretold, "measured": self.measured})
        noise = float(self.noise.square().mean().sqrt())
        for row in rows:
            row["ratio"] = divided(row["foretold"], row["random_foretold"])
            row["noise"] = noise
        return rows

    def to_dict(self) -> dict:
        """The figures, and the losses that they are made of."""
        return {
            "schema": self.schema,
            "formula": FORMULA,
            "ratios": self.ratios.to_dict(),
            "measured_ratios": self.measured_ratios.to_dict(),
            "buried": self.buried,
            "rows": self.rows(),
            "measured": self.measured.tolist(),
            "foretold": self.foretold.tolist(),
            "noise": self.noise.tolist(),
            "probe": self.probe.to_dict(),
        }

    def draw(self, axes) -> None:
        rows = self.rows()
        shown = [rows[0]["noise"]]
        for who, prefix, color in (("weight", "", MARK), ("random", "random_", LINE)):
            for what, marker in (("foretold", "D"), ("measured", "x")):
                values = [row[f"{prefix}{what}"] for row in rows]
                axes.plot(values, marker, color=color, label=f"{who}, {what}")
                shown += values
        axes.axhline(rows[0]["noise"], color=MUTED, linewidth=0.8, label="noise")
        label_entries(axes, self.probe, shown)
        axes.set_ylabel(f"change of the loss (nats) for eps = {self.probe.eps:g}")
        axes.set_title(FORMULA.replace(";  ", "\n"), fontsize=8)


def sensitivity(
    model: nn.Module,
    coordinates: Coordinates,
    inputs: object,
    *,
    random: int = 1,
    eps: float = EPSILON,
    seed: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure and foretell what moving a weight by ``eps`` does to the loss.

    The passes are those of ``curvature``: ``Sensitivity(found.probe)`` has this for nothing.

    Args, Raises: see ``probe``.

    Returns:
        ``Sensitivity``.
    """
    return Sensitivity(
        probe(
            model, coordinates, inputs, random=random, eps=eps, seed=seed, progress=progress
        )
    )  # fmt: skip
