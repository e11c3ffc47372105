"""How far training moved the super weights, and whether they still stand out (Tables 9, 10)."""

from __future__ import annotations

import math

from ..page import percent
from ..recipe import Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from . import direct, lora, lora_down
from .comparing import all_of
from .settings import LEARNING_RATE, PUBLISHED_STEPS, data_of, described
from .training_views import few_steps, notes

TOP = 99.0  # percentile rank of the largest percent
# OLMo-1B, Table 10: mean, median and largest relative change, coefficient of variation.
PUBLISHED = {
    "pruning": ("100 %", "100 %", "100 %", 0.0),
    "direct": ("8.19 %", "7.55 %", "30.89 %", 0.66),
    "LoRA, attention": ("0.15 %", "0.10 %", "5.56 %", 0.94),
}
PUBLISHED_ABOVE = "35.5 %"  # of the weights that were trained directly, more than 10 %
PUBLISHED_RATIO = 55  # direct over LoRA; 8.19 / 0.15
FACTOR = 2  # a ratio within this factor of the published one counts as the same
EVEN = 1.25  # the largest of ten means over the smallest, up to which they are about the same
# Table 9: before and after LoRA of attention.
STANDING = {
    "mean |W|": ("0.206", "0.206"),
    "percentile rank": ("100.0 %", "100.0 %"),
    "local maxima": ("100 %", "100 %"),
    "ratio to neighbours": ("58.4", "58.6"),
}
PRUNING = {"mean": 1.0, "median": 1.0, "max": 1.0, "cv": 0.0, "share_above": 1.0}  # by definition


def runs(plan: Plan) -> list[Run]:
    """Those of ``direct``, ``lora`` and ``lora-down``: none of its own."""
    return [
        *(direct.run_of(plan, k) for k in plan.budget.counts), lora.run_of(plan),
        lora_down.run_of(plan),
    ]  # fmt: skip


def section(found: Found) -> Section | None:
    plan = found.plan
    adapted = {
        lora.LABEL: found(lora.run_of(plan)), lora_down.LABEL: found(lora_down.run_of(plan)),
    }  # fmt: skip
    adapted = {label: figures for label, figures in adapted.items() if figures}
    trained = {k: found(direct.run_of(plan, k)) for k in plan.budget.counts}
    trained = {k: figures for k, figures in trained.items() if figures}
    if not adapted or not trained:
        return None
    changes = _changes(trained, adapted)
    return Section(
        described(plan),
        [_table(plan, changes), _standing(adapted), *map(_groups, adapted.items())],
        [
            *_larger(found, changes, trained),
            *_times_published(found, changes, trained, adapted),
            *(_stable(label, figures) for label, figures in adapted.items()),
            *(_decreasing(label, figures) for label, figures in adapted.items()),
        ],
        [
            "The change is |dW| / |W|. Of LoRA on attention it is that of the attention weights at "
            "the same (row, column) in the same layer, as the caption of Table 10 has it: other "
            "weights than those that are trained directly. That it is divided by the attention "
            "weight is assumed here; the paper does not say. LoRA on down projections compares the "
            "same weights.",
            "Where a weight was exactly 0 its relative change is infinite, and so is the mean: "
            "these k do not count for the verdicts on direct training; the medians are of all.",
            "LoRA on attention does not touch a super weight of a down projection: its magnitude, "
            "rank and neighbours are what they were, bit for bit. The published change of -0.03 % "
            "and of 58.4 to 58.6 cannot come from it.",
            "With weight decay 0 and AdamW a weight that is trained directly moves by about the "
            "learning rate in a step, whatever its gradient: its relative change says how many "
            "steps there were and how large it was.",
            *notes(found, {label: figures for label, figures in adapted.items()}),
        ],
    )


def _changes(trained: dict, adapted: dict) -> list[tuple[str, int, dict | None]]:
    """(method, k, summary of the change at the k largest)."""
    rows = [("direct", k, figures["change"]) for k, figures in trained.items()]
    for label, figures in adapted.items():
        rows += [(label, k, figures["change"][str(k)]) for k in trained]
    return rows


def _table(plan: Plan, changes: list) -> Table:
    cells = _cells(PRUNING)
    rows: list = [["pruning, by definition", None, None, *cells]]
    for label, k, summary in changes:
        if summary is None:
            rows.append([f"{label}, k = {k:,}", None, 0, *[None] * 5])
            continue
        relative = summary["relative"]
        absolute = summary["absolute"]["mean"]
        rows.append([f"{label}, k = {k:,}", absolute, summary["coordinates"], *_cells(relative)])
    for label, there in PUBLISHED.items() if plan.task == "arc" else ():
        above = PUBLISHED_ABOVE if label == "direct" else None
        rows.append([f"published, OLMo-1B: {label}", None, None, *there, above])
    columns = ["method", "mean |dW|", "entries compared"]
    columns += [
        f"relative change: {name}" for name in ("mean", "median", "largest", "CV", "above 10 %")
    ]
    caption = (
        "At the positions of the k largest weights of the down projections. For LoRA on attention "
        "these are entries of up to 4 matrices per position: those of its layer in which the "
        "position lies."
    )
    return Table(columns, rows, caption)


def _cells(relative: dict) -> list:
    shares = [_share(relative[name]) for name in ("mean", "median", "max")]
    return [*shares, relative["cv"], _share(relative["share_above"])]


def _share(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "∞"


def _standing(adapted: dict) -> Table:
    rows = []
    for label, figures in adapted.items():
        summary = figures["super_weights"]
        magnitude = summary["magnitude"]
        values = {
            "mean |W|": (magnitude["before"], magnitude["after"]),
            "percentile rank": tuple(map(_rank, _both(summary["percentile"]))),
            "local maxima": tuple(map(percent, _both(summary["local_maximum"]))),
            "ratio to neighbours": _both(summary["neighbor_ratio"]),
        }
        for name, (before, after) in values.items():
            there = STANDING[name] if label == lora.LABEL else (None, None)
            rows.append([f"{label}: {name}", before, after, *there])
    count = next(iter(adapted.values()))["super_weights"]["coordinates"]
    columns = ["", "before", "after", "OLMo-1B, before", "after"]
    return Table(columns, rows, f"The {count} super weights in their down projections.")


def _both(values: dict) -> tuple[float, float]:
    return values["before"], values["after"]


def _rank(percentile: float) -> str:
    return percent(percentile / 100)


def _groups(item: tuple[str, dict]) -> Table:
    label, figures = item
    rows = [
        [f"{10 * n} to {10 * n + 10} %", group["weight"], group["delta"], _share(group["relative"])]
        for n, group in enumerate(figures["update"]["groups"])
    ]
    columns = ["weights by |W|", "mean |W|", "mean |dW|", "median |dW| / |W|"]
    return Table(columns, rows, f"{label}: the adapted weights in ten groups, the smallest first.")


def _pairs(found: Found, changes: list, label: str) -> dict[int, tuple[dict, dict]]:
    """The summaries of direct training and of a LoRA by k; empty where one of them is not there."""
    by_k = {(method, k): summary for method, k, summary in changes}
    pairs = {k: (by_k.get(("direct", k)), by_k.get((label, k))) for k in found.plan.budget.counts}
    return {} if any(None in pair for pair in pairs.values()) else pairs


def _larger(found: Found, changes: list, trained: dict) -> list[Verdict]:
    """Whether direct training moves weights further than LoRA moves the same ones, for every k.

    That it does not, after fewer steps than were published, decides nothing.
    """
    pairs = _pairs(found, changes, lora_down.LABEL)
    if not pairs:
        return []
    short = few_steps(found, trained)
    states, said = [], []
    for k, (ours, theirs) in pairs.items():
        a, b = ours["relative"]["mean"], theirs["relative"]["mean"]
        said.append(f"k = {k:,}: {_share(a)} and {_share(b)}, {_times(a, b)}")
        if not (math.isfinite(a) and math.isfinite(b)):
            continue  # a weight among them was 0
        (low, high), (other_low, other_high) = _interval(ours), _interval(theirs)
        states.append(
            True if low > other_high else False if high < other_low and not short else None
        )
    return [
        Verdict(
            f"Direct training changes the same weights more than LoRA does ({lora_down.LABEL}).",
            all_of(states) if states else None,
            f"mean relative change of direct training and of LoRA: {'; '.join(said)}. It is "
            f"decided by the 95 % intervals of the means over the weights{short}.",
        )
    ]


def _times_published(found: Found, changes: list, trained: dict, adapted: dict) -> list[Verdict]:
    """Whether direct training changes weights as many times as much as was published.

    Fewer steps than were published decide it only where no more of them could lead there.
    """
    pairs = _pairs(found, changes, lora.LABEL)
    if not pairs:
        return []
    whole = PUBLISHED_STEPS[found.plan.task]
    reach = LEARNING_RATE * (whole + 1) / 2  # the learning rate falls to 0
    least, most = PUBLISHED_RATIO / FACTOR, PUBLISHED_RATIO * FACTOR
    short = few_steps(found, trained | {lora.LABEL: adapted[lora.LABEL]})
    said, ratios, ceilings = [], [], []
    for k, (ours, theirs) in pairs.items():
        a, b = ours["relative"]["mean"], theirs["relative"]["mean"]
        said.append(f"k = {k:,}: {_share(a)} and {_share(b)}, {_times(a, b)}")
        if not (math.isfinite(a) and math.isfinite(b) and min(a, b) > 0):
            continue  # no ratio
        ratios.append(a / b)
        # Not by the steps alone: a weight that went back and forth may go straight.
        growth = max(1.0, reach / ours["absolute"]["mean"])
        ceilings.append(growth * a / b)
        if short:
            said[-1] += f", at most {growth:.3g} x {a / b:.3g} = {ceilings[-1]:.3g} times"
    inside = [least <= ratio <= most for ratio in ratios]
    if short or not ratios:
        holds = False if ratios and max(ceilings) < least else None
    else:
        holds = True if all(inside) else None if any(inside) else False
    why = (
        f"mean relative change of direct training and of LoRA: {'; '.join(said)}. From "
        f"{least:g} to {most:g} times, within a factor of {FACTOR}, counts as {PUBLISHED_RATIO}"
    )
    if short:
        why += (
            f"{short}. AdamW without weight decay moves a value by at most about the learning "
            f"rate in a step: with {whole} steps of the same schedule by {LEARNING_RATE:g} x "
            f"({whole} + 1) / 2 = {reach:.3g}. That over the mean |dW| of direct training "
            "is how many times as far it can get, large weights as small ones; LoRA's change is "
            "taken as it already is"
        )
    claim = f"Direct training changes weights {PUBLISHED_RATIO} times as much as LoRA on attention"
    return [Verdict(f"{claim} does.", holds, f"{why}.")]


def _interval(summary: dict) -> tuple[float, float]:
    """Of the mean relative change over the coordinates, 95 %."""
    mean, cv = summary["relative"]["mean"], summary["relative"]["cv"]
    reach = 1.96 * cv * mean / math.sqrt(summary["coordinates"])
    return mean - reach, mean + reach


def _times(a: float, b: float) -> str:
    return f"{a / b:.3g} times" if b > 0 and max(a, b) < math.inf else "no ratio"


def _stable(label: str, figures: dict) -> Verdict:
    summary = figures["super_weights"]
    (rank, after), (local, local_after) = (
        _both(summary[name]) for name in ("percentile", "local_maximum")
    )
    kept = after >= TOP and local_after >= local if rank >= TOP else None
    why = (
        f"of {summary['coordinates']} super weights: mean percentile rank {_rank(rank)} → "
        f"{_rank(after)}, local maxima {percent(local)} → {percent(local_after)}, mean magnitude "
        f"{_share(summary['magnitude']['change'])} different. These are all there are: nothing is "
        "estimated."
    )
    if kept and label == lora.LABEL:
        why += (
            " It holds by definition: LoRA on attention does not touch the down projections, in "
            "which they lie."
        )
    return Verdict(
        f"Super weights keep their rank and stay local maxima under LoRA ({label}).",
        kept,
        why,
    )


def _decreasing(label: str, figures: dict) -> Verdict:
    relative = [group["relative"] for group in figures["update"]["groups"]]
    falls = [a > b for a, b in zip(relative, relative[1:])]
    holds = True if all(falls) else None if relative[0] > relative[-1] else False
    deltas = [group["delta"] for group in figures["update"]["groups"]]
    smallest, largest = min(deltas), max(deltas)
    itself = f"The mean |dW| itself is {smallest:.4g} to {largest:.4g} in the ten groups"
    if relative[0] > relative[-1] and largest <= EVEN * smallest:
        itself += ", about the same: the fall is the division by |W|, and no protection"
    return Verdict(
        f"The larger a weight, the smaller its relative change ({label}).",
        holds,
        f"median from {_share(relative[0])} in the tenth of the smallest to "
        f"{_share(relative[-1])} in that of the largest, falling in {sum(falls)} of "
        f"{len(falls)} steps. {itself}.",
    )


WEIGHT_CHANGE = Recipe(
    "weight-change",
    "How far training moves super weights",
    "Tables 9 and 10 of arXiv 2607.08733",
    "Direct training against LoRA at the same coordinates, and whether super weights stand out "
    "after it; the paper finds 55 times larger changes by direct training.",
    data_of(),
    minutes=30,
    runs=runs,
    section=section,
    needs_lora=True,
)
