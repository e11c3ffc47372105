"""Consistency: how many positions spike in how many texts (Table 1)."""

from __future__ import annotations

from swkernels.detect.consistency import TIERS
from swkernels.train.figure import LINE, MARK, MUTED, legend_above

from ..data import TEXT
from ..lab import DETECT
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..words import label, place
from .edited import HARMLESS, Ratio

# Tier: positions of OLMo-1B, and in how many of 1,000 samples those spike that it adds.
PUBLISHED = {"100 %": (9, "1000"), ">= 50 %": (13, "500 to 633"), ">= 20 %": (24, "200 to 498")} | {
    "any": (58, None)
}
SETTLED = 100  # samples, as published
_TIERS = {"all": "100 %", "half": ">= 50 %", "fifth": ">= 20 %", "any": "any"}  # of ``settling``
_CONFIDENT, _ENOUGH = 0.05, 0.95  # of a position that spikes in all samples, in how many texts
_MIDDLE = ("half", "fifth")  # more texts can only shrink the tier of all, and only widen "any"
_MOVES = 1  # positions by which a tier that has settled may still change
MOST = 24  # positions that are zeroed, each alone
_AFTER = 5  # times as many samples as it settles in say whether it has


def run_of(plan: Plan) -> Run:
    return Run("consistency", {"samples": plan.budget.samples, "length": plan.budget.length})


def zeroed(plan: Plan) -> Run:
    """Without the positions that spike in every text, those that are no super weights."""
    config = {"of": run_of(plan).key, "most": MOST}
    config |= {"tokens": plan.budget.tokens, "window": plan.budget.window}
    return Run("spikes", config, (DETECT, run_of(plan)))


def section(found: Found) -> Section | None:
    figures = found(run_of(found.plan))
    if figures is None:
        return None
    detected = (found(DETECT) or {}).get("super_weights")  # None too where they were given
    without = found(zeroed(found.plan))
    spiked = without is not None and without["each"]
    return Section(
        f"{figures['samples']:,} pieces of {found.plan.budget.length} tokens of the WikiText-2 "
        "test set, one after the other.",
        [
            _tiers(figures),
            _always(figures, detected),
            Figure("consistency", _CAPTION, _draw(figures)),
            *([_without(without)] if spiked else []),
        ],
        [_in_every(figures), _settles(figures), *([_inert(without)] if spiked else [])],
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
    columns = ["spikes in", "positions", "texts in which those added here spike"]
    columns += ["OLMo-1B", "OLMo-1B: texts of 1,000"]
    return Table(columns, rows)


def _always(figures: dict, detected: list[dict] | None) -> Table:
    """Positions that spike in every piece; ``detected``: the super weights, where known."""
    verdicts = {place(one): one["verdict"] for one in detected or ()}
    always = [p for p in figures["positions"] if p["count"] == figures["samples"]]
    always.sort(key=lambda p: (p["layer"], p["row"], p["column"]))
    rows = [[p["layer"], p["expert"], p["row"], p["column"]] for p in always]
    columns, caption = ["layer", "expert", "row", "column"], "Positions that spike in every piece."
    if detected:
        columns.append("detected as")
        rows = [[*row, verdicts.get(place(p))] for row, p in zip(rows, always)]
        among = sum(place(p) in verdicts for p in always)
        caption += (
            f" Of the {len(detected)} detected super weights {among} are among these "
            f"{len(always)}: {len(always) - among} spike in every piece and were not detected."
        )
    return Table(columns, rows, caption)


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
    claim, samples = "Some positions spike in every text.", figures["samples"]
    always, any_ = figures["tiers"]["100 %"], figures["tiers"]["any"]
    if not always:
        return Verdict(claim, False, f"none of {any_} does in all {samples:,}.")
    # A smaller share would seldom be seen in all of them, for any of those that spike at all.
    least = (_CONFIDENT / any_) ** (1 / samples)
    return Verdict(
        claim,
        True if least >= _ENOUGH else None,
        f"{always} do in all {samples:,}; each of these spikes in at least {100 * least:.1f} % of "
        f"all texts, with 95 % confidence for all together: they were selected among the {any_} "
        f"that spike in any text, so that each has {_CONFIDENT:g} / {any_} of the error.",
    )


def _settles(figures: dict) -> Verdict:
    from_there = [point for point in figures["settling"] if point["samples"] >= SETTLED]
    claim = f"The tiers of consistent positions change no more after about {SETTLED} texts."
    if len(from_there) < 2 or from_there[0]["samples"] != SETTLED:
        return Verdict(claim, None, f"there are {figures['samples']} only.")
    first, last = from_there[0], from_there[-1]
    sizes = {key: [point[key] for point in from_there] for key in _MIDDLE}
    same = all(max(seen) - min(seen) <= _MOVES for seen in sizes.values())
    most = _AFTER * SETTLED
    long_enough = last["samples"] >= most
    middle, others = (
        ", ".join(f"{_TIERS[key]}: {first[key]} → {last[key]}" for key in keys)
        for keys in (_MIDDLE, [key for key in _TIERS if key not in _MIDDLE])
    )
    why = (
        f"from {SETTLED} to {last['samples']:,} texts the middle tiers change so: {middle} (a "
        f"change by {_MOVES} counts as none). The two others do not decide, as with more texts "
        f"that of 100 % can only shrink and any can only grow: {others}"
    )
    why += "; too few to say that it is over" if same and not long_enough else ""
    return Verdict(claim, False if not same else True if long_enough else None, f"{why}.")


def _ratio(perplexity: dict, without: dict) -> Ratio:
    return Ratio.of({"perplexity": perplexity}, {"perplexity": without["intact"]})


def _without(without: dict) -> Table:
    rows = [
        [one["weight"]["layer"], one["weight"]["expert"], one["weight"]["row"],
         one["weight"]["column"], one["weight"]["value"], str(_ratio(one["perplexity"], without))]
        for one in without["each"]
    ]  # fmt: skip
    if len(rows) > 1:
        rows.append([f"all {len(rows)}", *[None] * 4, str(_ratio(without["together"], without))])
    columns = ["layer", "expert", "row", "column", "value", "perplexity when zeroed [95 %]"]
    return Table(columns, rows, "Positions that spike in every piece and are no super weights.")


def _inert(without: dict) -> Verdict:
    """Whether spikes that are no super weights can be zeroed."""
    ratios = {label(one["weight"]): _ratio(one["perplexity"], without) for one in without["each"]}
    harmful = {name: ratio for name, ratio in ratios.items() if ratio.low > HARMLESS}
    harmless = sum(ratio.high < HARMLESS for ratio in ratios.values())
    why = f"of {len(ratios)} zeroed alone {harmless} cost less than {HARMLESS - 1:.0%}"
    if harmful:
        why += "; more cost " + ", ".join(f"{name} {ratio}" for name, ratio in harmful.items())
    if len(ratios) > 1:
        why += f"; all together {_ratio(without['together'], without)}"
    if without["positions"] > len(ratios):
        why += f"; {without['positions'] - len(ratios)} more were not looked at"
    whole = harmless == without["positions"] > 0
    return Verdict(
        "Positions that spike in every text but are no super weights are harmless when zeroed.",
        False if harmful else True if whole else None,
        f"perplexity: {why}.",
    )


CONSISTENCY = Recipe(
    "consistency",
    "The same positions spike whatever the text",
    "Table 1 of arXiv 2607.08733",
    "Super weights are found by spikes; the paper finds some positions that spike in every text.",
    (TEXT,),
    minutes=6,
    runs=lambda plan: [run_of(plan), zeroed(plan)],
    section=section,
)
