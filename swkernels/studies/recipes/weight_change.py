"""How far training moved the super weights, and whether they still stand out (Tables 9, 10)."""

from __future__ import annotations

import math

from ..page import percent
from ..recipe import Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from . import direct, lora, lora_down
from .comparing import all_of
from .settings import data_of, described
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
            *(_stable(label, figures) for label, figures in adapted.items()),
            *(_decreasing(label, figures) for label, figures in adapted.items()),
        ],
        [
            "The change is |dW| / |W|. Of LoRA on attention it is that of the attention weights at "
            "the same (row, column) in the same layer, as the footnote of Table 10 has it: other "
            "weights than those that are trained directly. LoRA on down projections compares the "
            "same weights.",
            "Where a weight was exactly 0 its relative change is infinite, and so is the mean: "
            "these k do not count for the first verdict; the medians are of all.",
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
    columns = ["method", "mean |dW|", "weights", "mean", "median", "largest", "CV", "above 10 %"]
    return Table(columns, rows, "Relative change at the coordinates of the k largest weights.")


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
            "percentile rank": _both(summary["percentile"]),
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


def _groups(item: tuple[str, dict]) -> Table:
    label, figures = item
    rows = [
        [f"{10 * n} to {10 * n + 10} %", group["weight"], group["delta"], _share(group["relative"])]
        for n, group in enumerate(figures["update"]["groups"])
    ]
    columns = ["weights by |W|", "mean |W|", "mean |dW|", "median |dW| / |W|"]
    return Table(columns, rows, f"{label}: the adapted weights in ten groups, the smallest first.")


def _larger(found: Found, changes: list, trained: dict) -> list[Verdict]:
    """Whether direct training moves weights further than LoRA of attention, for every k.

    That it does not, after fewer steps than were published, decides nothing.
    """
    short = few_steps(found, trained)
    by_k = {(label, k): summary for label, k, summary in changes}
    states, said = [], []
    for k in found.plan.budget.counts:
        ours, theirs = by_k.get(("direct", k)), by_k.get((lora.LABEL, k))
        if ours is None or theirs is None:
            return []
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
            "Direct training changes weights far more than LoRA does, 55 times as published.",
            all_of(states) if states else None,
            f"mean relative change of direct training and of LoRA on attention: "
            f"{'; '.join(said)}. It is decided by the 95 % intervals of the means over the "
            f"weights; the factor itself is not tested{short}.",
        )
    ]


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
    return Verdict(
        f"Super weights keep their rank and stay local maxima under LoRA ({label}).",
        kept,
        f"of {summary['coordinates']} super weights: mean percentile rank {rank:.4g} → "
        f"{after:.4g}, local maxima {percent(local)} → {percent(local_after)}, mean magnitude "
        f"{_share(summary['magnitude']['change'])} different. These are all there are: nothing is "
        "estimated.",
    )


def _decreasing(label: str, figures: dict) -> Verdict:
    relative = [group["relative"] for group in figures["update"]["groups"]]
    falls = [a > b for a, b in zip(relative, relative[1:])]
    holds = True if all(falls) else None if relative[0] > relative[-1] else False
    return Verdict(
        f"The larger a weight, the smaller its relative change ({label}).",
        holds,
        f"median from {_share(relative[0])} in the tenth of the smallest to "
        f"{_share(relative[-1])} in that of the largest, falling in {sum(falls)} of "
        f"{len(falls)} steps.",
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
