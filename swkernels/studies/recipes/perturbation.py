"""What a small change of a super weight does to the loss (Figure 7, I.3.3)."""

from __future__ import annotations

import numpy as np

from swkernels.evidence.analyze import PUBLISHED
from swkernels.train.figure import LINE, MARK, MUTED, legend_above, log_where_wide

from ..data import TEXT
from ..page import percent
from ..recipe import Figure, Found, Plan, Recipe, Section, Table
from ..run import Run
from ..runs.analyze import DETECTED
from ..words import label
from .histogram import histogram
from .positions import EPSILON, Positions, bent, described, larger, ratio_table

_PALE = "#b4bdc6"


def runs(plan: Plan) -> list[Run]:
    return [bent(plan)]


def section(found: Found) -> Section:
    settings = (
        f"{described(found.plan)} Each is moved by {EPSILON:g}: the change of the loss as "
        "measured, and as the exact gradient and curvature foretell it (equation 18)."
    )
    figures = found(bent(found.plan))
    if figures is None:
        return Section(settings)
    foretold, measured = (Positions.of(figures, name) for name in ("foretold", "measured"))
    return Section(
        settings,
        [
            _ratios(foretold, measured),
            _weights(figures, foretold, measured),
            histogram(
                "perturbation",
                "Ratios of the change of the loss, weights over random positions: as foretold "
                "(exact), and as measured",
                foretold.ratios,
                measured.ratios,
                PUBLISHED["sensitivity"],
            ),
            Figure("perturbation-noise", "Changes as measured and as foretold, for each input and "
                   "position; below the line they are rounding", _agreement(figures)),
        ],
        larger("A perturbation costs more", foretold, "change of the loss"),
        [*NOTES, _noise(figures, foretold)],
    )  # fmt: skip


NOTES = [
    "Published: 5 candidates of each layer, chosen how is not said, 50 inputs, changes as "
    "measured; neither the model (I.3.1 has Qwen2.5-0.5B-Instruct) nor the dtype is said.",
    "A change of 1e-4 is foretold by the gradient almost alone: it says how large dL/dw is, not "
    "how sharply the loss bends.",
    "The verdicts go by what is foretold, which has no rounding in it.",
]


def noise_of(figures: dict) -> np.ndarray:
    """[N]: standard deviation of a measured change, of the rounding of two losses."""
    return np.sqrt(2) * np.array(figures["rounding"])


def _ratios(foretold: Positions, measured: Positions) -> Table:
    rows = {
        "foretold": foretold.ratios,
        "foretold, detected super weights": foretold.only(DETECTED).ratios,
        "measured": measured.ratios,
        "measured, detected super weights": measured.only(DETECTED).ratios,
    }
    return ratio_table(rows, PUBLISHED["sensitivity"], "published, measured")


def _weights(figures: dict, foretold: Positions, measured: Positions) -> Table:
    noise = float(np.sqrt((noise_of(figures) ** 2).mean()))
    rows = []
    for n, entry in enumerate(figures["entries"]):
        values = [
            float(part.mean())
            for found in (foretold, measured)
            for part in (found.own[:, n], found.random[:, n])
        ]
        rows.append([label(entry), entry["group"], *values, noise])
    columns = ["weight", "it is", "foretold", "foretold, random"]
    columns += ["measured", "measured, random", "noise of one"]
    return Table(columns, rows, "Means over inputs of |change of the loss|, in nats.")


def _noise(figures: dict, foretold: Positions) -> str:
    noise = noise_of(figures)
    own = float((foretold.own < noise[:, None]).mean())
    random = float((foretold.random < noise[:, None, None]).mean())
    return (
        f"{percent(own)} of the changes at weights and {percent(random)} of those at random "
        f"positions are smaller than the rounding noise of a measurement ({np.median(noise):.2g} "
        "nats): where a random position's change is noise, a measured ratio says how large the "
        "noise is, and comes out too small."
    )


def _agreement(figures: dict):
    def draw(figure) -> None:
        axes = figure.subplots()
        foretold, measured = (Positions.of(figures, name) for name in ("foretold", "measured"))
        special = np.array([group == DETECTED for group in foretold.groups])
        random = (part.random.reshape(len(part.own), -1) for part in (foretold, measured))
        drawn = {
            "random position": (*random, _PALE),
            "largest of a layer": (foretold.own[:, ~special], measured.own[:, ~special], LINE),
            "super weight": (foretold.own[:, special], measured.own[:, special], MARK),
        }
        for name, (x, y, color) in drawn.items():
            axes.plot(x.ravel(), y.ravel(), ".", color=color, ms=4, label=name)
        noise = float(np.median(noise_of(figures)))
        axes.axhline(noise, color=MUTED, lw=1, label="noise of a measurement")
        shown = np.concatenate([part.ravel() for x, y, _ in drawn.values() for part in (x, y)])
        shown = shown[shown > 0]
        for direction in "xy":
            log_where_wide(axes, direction, [*shown.tolist(), noise])
        ends = [shown.min(), shown.max()]
        axes.plot(ends, ends, color=MUTED, lw=1, ls=":", label="as foretold")
        axes.set(xlabel="foretold |change of the loss|, nats", ylabel="measured, nats")
        legend_above(axes)

    return draw


PERTURBATION = Recipe(
    "perturbation",
    "Perturbation of super weights",
    "Figure 7, I.3.3 of arXiv 2607.08733",
    "Whether a small change of a super weight costs more than one of a random weight.",
    (TEXT,),
    minutes=6,
    runs=runs,
    section=section,
)
