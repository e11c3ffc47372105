"""How sharply the loss bends at super weights: d2L/dw2 (Figure 6, I.3.2)."""

from __future__ import annotations

import numpy as np

from swkernels.evidence.analyze import PUBLISHED
from swkernels.train.figure import LINE, MARK, MUTED, legend_above, log_where_wide

from ..data import TEXT
from ..page import percent
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..runs.analyze import DETECTED
from ..words import label
from .histogram import histogram
from .positions import (
    CANNOT,
    EPSILON,
    Positions,
    above,
    bent,
    described,
    exponent,
    larger,
    ratio_table,
    share,
)


def runs(plan: Plan) -> list[Run]:
    return [bent(plan), bent(plan, row=True)]


def section(found: Found) -> Section:
    plan = found.plan
    settings = (
        f"{described(plan)} Exact second derivatives, beside finite differences with "
        f"eps = {EPSILON:g}; and the same with random positions of the weight's own row."
    )
    done = Section(settings)
    figures, in_row = (found(run) for run in runs(plan))
    if figures is not None:
        exact = Positions.of(figures, "curvature")
        estimated = Positions.of(figures, "differences")
        done.parts += [
            _ratios(exact, estimated, in_row),
            _weights(figures),
            histogram(
                "curvature",
                "Ratios of |H|, weights over random positions: exact, and seen by differences",
                exact.ratios,
                estimated.ratios,
                PUBLISHED["curvature"],
            ),
        ]
        done.verdicts += larger("The curvature is higher", exact, "curvature")
        done.verdicts += _shown(figures)
    if in_row is not None:
        done.parts.append(
            Figure("curvature-scaling", "Curvature of weights over that of a random position of "
                   "the same row, for each input, against the ratio of their M", _scaling(in_row))
        )  # fmt: skip
        done.verdicts += _squares(in_row)
    done.notes += NOTES
    return done


NOTES = [
    "Published: 3 candidates of each layer, chosen how is not said, 50 inputs, finite differences; "
    "neither eps nor the dtype is said. Section I.3.2 names no model; I.3.1 has "
    "Qwen2.5-0.5B-Instruct, whose 24 layers do not give the 240 pairs it counts. Here derivatives "
    "are exact, and one weight of some layers is looked at.",
    "Equation 15 compares positions of one row, which share d2L/dy2. A random position of the "
    "matrix, as published, lies in another row: its ratio holds the rows' difference as well, so "
    "the exponent of M is taken in one row.",
    "Mean and maximum of such ratios are decided by the few random positions nearest to 0.",
]


def _ratios(exact: Positions, estimated: Positions, in_row: dict | None) -> Table:
    rows = {
        "exact": exact.ratios,
        "exact, magnitudes": np.abs(exact.ratios),
        "exact, magnitudes, detected super weights": np.abs(exact.only(DETECTED).ratios),
        f"differences, eps = {EPSILON:g}": estimated.ratios,
    }
    if in_row is not None:
        ratios = Positions.of(in_row, "curvature").ratios
        rows["exact, magnitudes, random position in the same row"] = np.abs(ratios)
    return ratio_table(rows, PUBLISHED["curvature"], "published, differences")


def _weights(figures: dict) -> Table:
    """A row for each weight: means over inputs."""
    at = {
        name: Positions.of(figures, name)
        for name in ("amplification", "curvature", "differences", "differences_noise")
    }
    inputs = len(figures["loss"])
    rows = []
    for n, entry in enumerate(figures["entries"]):
        noise = np.sqrt((at["differences_noise"].own[:, n] ** 2).sum()) / inputs
        rows.append(
            [
                label(entry),
                entry["group"],
                float(at["amplification"].own[:, n].mean()),
                float(at["curvature"].own[:, n].mean()),
                float(at["curvature"].random[:, n].mean()),
                float(at["differences"].own[:, n].mean()),
                float(noise),
            ]
        )
    columns = [
        "weight",
        "it is",
        "M",
        "H, exact",
        "H, random position",
        "by differences",
        "± noise",
    ]
    return Table(columns, rows, "Means over inputs; H in nats; noise: of the mean of differences.")


def _shown(figures: dict) -> list[Verdict]:
    """Whether differences with this eps can show the curvature of the weights."""
    exact, noise = (Positions.of(figures, name) for name in ("curvature", "differences_noise"))
    sizes = exact.map(np.abs)
    seen = [sizes.own > noise.own, (sizes.random > noise.random).reshape(len(noise.own), -1)]
    own, random = (percent(float(part.mean())) for part in seen)
    found = share(np.concatenate(seen, 1))
    why = (
        f"{own} of the estimates at weights and {random} of those at random positions are of a "
        f"curvature above their rounding noise (in all a share of {found}); medians: |H| "
        f"{np.median(sizes.own):.2g} at weights, {np.median(sizes.random):.2g} at random "
        f"positions, noise {np.median(noise.own):.2g}."
    )
    claim = f"Finite differences with eps = {EPSILON:g} in this dtype show most of the curvatures."
    return [Verdict(claim, above(found, 0.5) if exact.decides else None, why)]


def _squares(in_row: dict) -> list[Verdict]:
    bases, values, decides = _pairs(in_row)
    found = exponent(bases, values)
    if found is None:
        return []
    holds = None
    if decides and above(found, 1) and found.low <= 2 <= found.high < 3:
        holds = True
    elif decides and not found.low <= 2 <= found.high:
        holds = False
    factor = float(np.nanmedian(np.abs(values) / bases**2))
    why = (
        f"|H| goes with M to the power {found} in one row; the median of |H| ratios over squared M "
        f"ratios is {factor:.2g}{'' if decides else f'; {CANNOT}'}."
    )
    return [Verdict("The curvature grows with M^2 (equation 15).", holds, why)]


def _pairs(in_row: dict) -> tuple[np.ndarray, np.ndarray, bool]:
    """Ratios of M and of H, each [N, pairs], and whether there are enough."""
    curvature = Positions.of(in_row, "curvature")
    ratios = [
        part.ratios.reshape(len(part.own), -1)
        for part in (Positions.of(in_row, "amplification"), curvature)
    ]
    return *ratios, curvature.decides


def _scaling(in_row: dict):
    def draw(figure) -> None:
        axes = figure.subplots()
        bases, values, _ = _pairs(in_row)
        sizes = np.abs(values)
        groups = Positions.of(in_row, "curvature").groups
        each = bases.shape[1] // len(groups)
        special = np.repeat([group == DETECTED for group in groups], each)
        for which, color, name in (
            (~special, LINE, "largest of a layer"), (special, MARK, "super weight")
        ):  # fmt: skip
            axes.plot(bases[:, which], sizes[:, which], ".", color=color, ms=4)
            axes.plot([], [], ".", color=color, label=name)
        ends = np.array([np.nanmin(bases), np.nanmax(bases)])
        axes.plot(ends, ends**2, color=MUTED, lw=1, label="its square")
        axes.set(xlabel="ratio of M", ylabel="ratio of |d2L/dw2|")
        for direction, shown in (("x", bases), ("y", sizes)):
            log_where_wide(axes, direction, shown[shown > 0].tolist())
        legend_above(axes)

    return draw


CURVATURE = Recipe(
    "curvature",
    "Curvature at super weights",
    "Figure 6, I.3.2 of arXiv 2607.08733",
    "Whether the loss bends more sharply at super weights, and by the square of M.",
    (TEXT,),
    minutes=12,
    runs=runs,
    section=section,
)
