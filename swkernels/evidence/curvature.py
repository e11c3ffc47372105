"""How sharply the loss bends at single weights: d2L/dw2, exact and by finite differences.

Equation 15 of the training paper (arXiv 2607.08733, appendix I) expects it to grow with the square
of the amplification M. The paper estimates it by differences (I.3.2); here it is exact, and the
estimate stands beside it with the noise that rounding puts into it.
"""

from __future__ import annotations

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

FORMULA = "H = d2L/dw2;  differences (L(w + eps) - 2 L(w) + L(w - eps)) / eps^2"


@dataclass(frozen=True)
class Curvature(Probed):
    """The second derivative of the loss by some weights and by random ones of their matrices."""

    schema = "swkernels.curvature/1"

    @property
    def exact(self) -> torch.Tensor:
        """float64 [N, Q]: d2L/dw2 by automatic differentiation."""
        return self.probe.curvatures

    @cached_property
    def finite_differences(self) -> torch.Tensor:
        """float64 [N, Q]: the estimate, with the steps as they were after rounding."""
        up, down, both = self._weights
        losses = self.probe.losses[:, None]
        return up * (self.probe.up - losses) + down * (self.probe.down - losses)

    @cached_property
    def noise(self) -> torch.Tensor:
        """float64 [N, Q]: standard deviation of the estimate, from the rounding of the losses.

        Three losses with the rounding s enter it with the weights 1, -2 and 1 over eps^2, which
        gives sqrt(6) s / eps^2.
        """
        up, down, both = self._weights
        return self.probe.rounding[:, None] * torch.sqrt(up**2 + down**2 + both**2)

    @property
    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What L(w + step), L(w - step) and L(w) are weighed by, each [Q]."""
        above, below = self.probe.steps
        up, down = 2 / (above * (above + below)), 2 / (below * (above + below))
        return up, down, up + down

    @cached_property
    def ratios(self) -> Spread:
        """H_sw / H_random, exact, over all inputs and pairs, signs included."""
        return self.probe.ratios(self.exact)

    @cached_property
    def magnitude_ratios(self) -> Spread:
        """|H_sw| / |H_random|, exact."""
        return self.probe.ratios(self.exact.abs())

    @cached_property
    def difference_ratios(self) -> Spread:
        """H_sw / H_random of the finite differences, as published."""
        return self.probe.ratios(self.finite_differences)

    @property
    def buried(self) -> float:
        """The share of all estimates whose exact value is smaller than their noise."""
        return float((self.exact.abs() < self.noise).double().mean())

    def rows(self) -> list[dict]:
        """A row for each weight: means over inputs; ``noise`` is that of the mean estimate."""
        rows = self.probe.rows({"curvature": self.exact, "differences": self.finite_differences})
        noise = self.probe.own(self.noise).square().sum(0).sqrt() / len(self.noise)
        for row, one in zip(rows, noise.tolist()):
            row["ratio"] = divided(row["curvature"], row["random_curvature"])
            row["noise"] = one
        return rows

    def to_dict(self) -> dict:
        """The figures, and the losses that they are made of."""
        return {
            "schema": self.schema,
            "formula": FORMULA,
            "ratios": self.ratios.to_dict(),
            "magnitude_ratios": self.magnitude_ratios.to_dict(),
            "difference_ratios": self.difference_ratios.to_dict(),
            "buried": self.buried,
            "rows": self.rows(),
            "finite_differences": self.finite_differences.tolist(),
            "noise": self.noise.tolist(),
            "probe": self.probe.to_dict(),
        }

    def draw(self, axes) -> None:
        rows = self.rows()
        own = [abs(row["curvature"]) for row in rows]
        axes.plot(own, "D", color=MARK, label="weight, exact")
        random = [abs(row["random_curvature"]) for row in rows]
        axes.plot(random, "o", color=LINE, label="random, exact")
        estimated = [abs(row["differences"]) for row in rows]
        axes.plot(estimated, "x", color=MUTED, label="weight, finite differences")
        noise = [row["noise"] for row in rows]
        axes.plot(noise, "_", color=MUTED, markersize=14, label="noise of these")
        label_entries(axes, self.probe, [*own, *random, *estimated, *noise])
        axes.set_ylabel("|d2L/dw2|, mean over inputs")
        axes.set_title(FORMULA.replace(";  ", "\n"), fontsize=8)


def curvature(
    model: nn.Module,
    coordinates: Coordinates,
    inputs: object,
    *,
    random: int = 1,
    eps: float = EPSILON,
    seed: int = 0,
    progress: Progress = silent,
) -> Curvature:
    """Measure d2L/dw2 of the mean next-token loss at weights and at random positions.

    Costs, for each input and each of the Q weights and random positions, one backward pass through
    the backward pass and two forwards. No copy of the model or of a matrix is made.

    Args, Raises: see ``probe``.

    Returns:
        ``Curvature``.
    """
    return Curvature(
        probe(
            model, coordinates, inputs, random=random, eps=eps, seed=seed, progress=progress
        )
    )  # fmt: skip
