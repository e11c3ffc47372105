"""Consistency: how many positions spike in how many texts (Table 1)."""

from __future__ import annotations

from swkernels.detect.consistency import TIERS
from swkernels.train.figure import LINE, MARK, MUTED, legend_above

from ..data import TEXT
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run

# Tier: positions of OLMo-1B, and in how many of 1,000 samples those spike that it adds.
PUBLISHED = {"100 %": (9, "1000"), ">= 50 %": (13, "500 to 633"), ">= 20 %": (24, "200 to 498")} | {
    "any": (58, None)
}
SETTLED = 100  # samples, as published
_TIERS = {"all": "100 %", "half": ">= 50 %", "fifth": ">= 20 %", "any": "any"}  # of ``settling``
_CONFIDENT, _ENOUGH = 0.05, 0.95  # of a position that spikes in all samples, in how many texts
_AFTER = 5  # times as many samples as it settles in say whether it has


def run_of(plan: Plan) -> Run:
    return Run("consistency", {"samples": plan.budget.samples, "length": plan.budget.length})


def section(found: Found) -> Section | None:
    figures = found(run_of(found.plan))
    if figures is None:
        return None
    return Section(
        f"{figures['samples']:,} pieces of {found.plan.budget.length} tokens of the WikiText-2 "
        "test set, one after the other.",
        [_tiers(figures), _always(figures), Figure("consistency", _CAPTION, _draw(figures))],
        [_in_every(figures), _settles(figures)],
        [
            "A position counts as spiking by the rule of `docs/detection.md`: its output channel "
            "stands out of the layer, and the product of the position makes it or would stand out "
            "by itself. The paper counts positions with the largest spikes and names no threshold.",
            "Counts are cumulative, as published. The paper draws its samples at random.",
        ],
    )


def _tiers(figures: dict) -> Table:
    samples, rows, above = figures["samples"], [], figures["samples"] + 1
    counts = [position["count"] for position in figures["positions"]]
    for tier, share in TIERS.items():
        added = [count for count in counts if share * samples <= count < above]
        above = min(above, share * samples)
        covered = None if not added else f"{min(added)} to {max(added)} of {samples}"
        rows.append([tier, figures["tiers"][tier], covered, *PUBLISHED[tier]])
    columns = ["spikes in", "positions", "samples of the added ones", "OLMo-1B", "of 1,000 samples"]
    return Table(columns, rows)


def _always(figures: dict) -> Table:
    rows = [
        [p["layer"], p["expert"], p["row"], p["column"]]
        for p in sorted(figures["positions"], key=lambda p: (p["layer"], p["row"], p["column"]))
        if p["count"] == figures["samples"]
    ]
    return Table(["layer", "expert", "row", "column"], rows, "Positions that spike in every piece.")


_CAPTION = "How many positions are in each tier, as pieces of text are added"


def _draw(figures: dict):
    def draw(figure) -> None:
        axes = figure.subplots()
        samples = [point["samples"] for point in figures["settling"]]
        for (key, tier), color in zip(_TIERS.items(), (MARK, LINE, "#7f9c3b", MUTED)):
            sizes = [point[key] for point in figures["settling"]]
            axes.plot(samples, sizes, color=color, marker="o", ms=3.5, lw=1.2, label=tier)
        axes.axvline(SETTLED, color=MUTED, lw=1, ls=":")
        axes.set(xscale="log", xlabel="pieces of text", ylabel="positions", ylim=(0, None))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        legend_above(axes)

    return draw


def _in_every(figures: dict) -> Verdict:
    samples, always = figures["samples"], figures["tiers"]["100 %"]
    least = _CONFIDENT ** (1 / samples)  # a smaller share would seldom be seen in all of them
    holds = False if not always else True if least >= _ENOUGH else None
    return Verdict(
        "Some positions spike in every text.",
        holds,
        f"{always} do in all {samples:,}; such a position spikes in at least {100 * least:.1f} % "
        f"of all texts, with 95 % confidence.",
    )


def _settles(figures: dict) -> Verdict:
    from_there = [point for point in figures["settling"] if point["samples"] >= SETTLED]
    claim = f"The tiers of consistent positions change no more after about {SETTLED} texts."
    if len(from_there) < 2 or from_there[0]["samples"] != SETTLED:
        return Verdict(claim, None, f"there are {figures['samples']} only.")
    first, last = from_there[0], from_there[-1]
    keys = [key for key in _TIERS if key != "any"]  # which grows with every rare position
    same = all(point[key] == last[key] for key in keys for point in from_there)
    long_enough = last["samples"] >= _AFTER * SETTLED
    said = ", ".join(f"{_TIERS[key]}: {first[key]} → {last[key]}" for key in _TIERS)
    return Verdict(
        claim,
        False if not same else True if long_enough else None,
        f"from {SETTLED} to {last['samples']:,} texts the tiers change so: {said}.",
    )


CONSISTENCY = Recipe(
    "consistency",
    "The same positions spike whatever the text",
    "Table 1 of arXiv 2607.08733",
    "Super weights are found by spikes; the paper finds some positions that spike in every text.",
    (TEXT,),
    minutes=2,
    runs=lambda plan: [run_of(plan)],
    section=section,
)
