"""LoRA of attention, masked at the indices of super weights (Table 4)."""

from __future__ import annotations

import numpy as np

from swkernels.train.figure import LINE, MARK, MUTED, legend_above

from ..page import percent
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from .comparing import Accuracy
from .lora import adapter_of
from .lora import run_of as vanilla
from .lora_views import DROPOUT, INDICES, agreement, lost_gain, same, short, why_same
from .settings import baseline, data_of, described, training
from .training_views import untrained

MASKS = ("rows", "columns", "rows and columns")
SCALES = (0.8, 0.5, 0.2, 0.1, 0.0)  # 1 is LoRA without a mask
MODELS = ("OLMo-1B", "OLMo-7B")
# ARC-Easy accuracy, and the share of the LoRA's values that s = 0 freezes.
PUBLISHED = {
    1.0: ("66.88 %", "77.3 %"), 0.8: ("66.54 %", "76.9 %"), 0.5: ("66.50 %", "78.0 %"),
    0.2: ("66.46 %", "76.6 %"), 0.1: ("66.50 %", "76.4 %"), 0.0: ("66.50 %", "76.7 %"),
}  # fmt: skip
TOUCHED = ("6.8 %", "0.5 %")


def run_of(plan: Plan, mask: str, scale: float, seed: int | None = None) -> Run:
    """Training LoRA whose updates at the indices of the largest super weights are scaled."""
    masking = {"mask": mask, "scale": scale, "hold": False, "at": {"top": plan.budget.ranked}}
    return training(plan, adapter_of("attention", {}) | masking, seed=seed, sweep=True)


def runs(plan: Plan) -> list[Run]:
    masked = [run_of(plan, mask, scale) for mask in MASKS for scale in reversed(SCALES)]
    return [baseline(plan), vanilla(plan, sweep=True), *masked]


def section(found: Found) -> Section | None:
    plan = found.plan
    first = found(vanilla(plan, sweep=True))
    masked = {(m, s): found(run_of(plan, m, s)) for m in MASKS for s in SCALES}
    masked = {key: figures for key, figures in masked.items() if figures}
    if first is None or not masked:
        return None
    parts = [_accuracies(found, first, masked), _losses(first, masked), _touched(masked)]
    return Section(
        described(plan, sweep=True),
        [*parts, _figure(found, first, masked)],
        _no_effect(found, first, masked),
        [
            "The paper tells of one mask, and its equation 1 scales single entries of B; here the "
            "rows of B, the columns of A, and both are masked, as it says elsewhere.",
            INDICES,
            DROPOUT,
            "The published accuracy of one seed, 66.88 % with OLMo-1B, lies nine standard "
            "deviations above the mean that the paper gives for ten seeds of the same run, "
            "62.90 ± 0.45 %; it does not say how they differ.",
            *short(found, first),
        ],
    )


def _accuracies(found: Found, first: dict, masked: dict) -> Table:
    vanilla_accuracy = Accuracy.of(first["choices"])
    published = PUBLISHED if found.plan.task == "arc" else {}
    rows = [["1 (no mask)", str(vanilla_accuracy), None, None, *published.get(1.0, (None, None))]]
    for scale in SCALES:
        cells = []
        for mask in MASKS:
            figures = masked.get((mask, scale))
            less = figures and Accuracy.of(figures["choices"]).less(vanilla_accuracy)
            cells.append(figures and f"{percent(_value(figures))} ({less})")
        rows.append([f"{scale:g}", *cells, *published.get(scale, (None, None))])
    caption = "Accuracy [95 %], and the difference from LoRA without a mask on the same questions."
    return Table(["s", *MASKS, *MODELS], rows, caption)


def _losses(first: dict, masked: dict) -> Table:
    rows = [["1 (no mask)", _held_out(first), None, None, None, None, None]]
    for scale in SCALES:
        there = [masked.get((mask, scale)) for mask in MASKS]
        losses = [figures and _held_out(figures) for figures in there]
        shares = [figures and percent(agreement(figures, first)) for figures in there]
        rows.append([f"{scale:g}", *losses, *shares])
    columns = ["s", *(f"loss, {mask}" for mask in MASKS), *(f"same, {mask}" for mask in MASKS)]
    caption = "Held-out loss in nats, and the share of predictions that are those without a mask."
    return Table(columns, rows, caption)


def _touched(masked: dict) -> Table:
    rows = []
    for mask in MASKS:
        figures = next((f for (m, _), f in masked.items() if m == mask), None)
        if figures:
            touched = figures["touched"]
            count = sum(touched[part] for part in ("rows", "columns") if part in mask)
            share = percent(count / touched["parameters"])
            listed = touched["positions"] + touched["outside"]
            inside = f"{touched['positions']:,} of {listed:,}"
            published = TOUCHED if mask == "rows and columns" else (None, None)
            rows.append([mask, count, touched["parameters"], share, inside, *published])
    columns = ["mask", "values masked", "of", "share", "indices inside", *MODELS]
    caption = (
        "What the masks touch: values of B and A. Inside: super weights whose indices lie inside "
        "an attention projection of their layer, over all projections."
    )
    return Table(columns, rows, caption)


def _figure(found: Found, first: dict, masked: dict) -> Figure:
    base = untrained(found)

    def draw(figure) -> None:
        axes = figure.subplots()
        for n, (mask, color) in enumerate(zip(MASKS, (LINE, MARK, "#7f9c3b"))):
            here = {scale: masked[mask, scale] for scale in SCALES if (mask, scale) in masked}
            here = {1.0: first} | here
            accuracies = [Accuracy.of(figures["choices"]) for figures in here.values()]
            middle = np.array([100 * accuracy.value for accuracy in accuracies])
            low, high = np.array([accuracy.interval for accuracy in accuracies]).T * 100
            places = [scale + 0.012 * (n - 1) for scale in here]  # beside each other
            axes.errorbar(
                places, middle, [middle - low, high - middle], color=color, marker="o", ms=4,
                lw=1.2, capsize=3, label=mask,
            )  # fmt: skip
        if base:
            axes.axhline(100 * base.value, color=MUTED, lw=1, ls="--", label="no training")
        axes.set(xlabel="scale s of the masked updates", ylabel="accuracy, %")
        legend_above(axes)

    return Figure("lora-mask", "Accuracy by scale and mask, with 95 % intervals", draw)


def _no_effect(found: Found, first: dict, masked: dict) -> list[Verdict]:
    verdicts = []
    for mask in MASKS:
        here = {f"s = {s:g}": masked.get((mask, s)) for s in SCALES}
        if untrained(found) is None or not all(here.values()):
            continue
        accuracy = Accuracy.of(first["choices"])
        differences = {s: Accuracy.of(f["choices"]).less(accuracy) for s, f in here.items()}
        verdicts.append(
            Verdict(
                f"Scaling the updates at the {mask} of super weights has no effect.",
                same(found, first, differences),
                why_same(found, first, differences) + lost_gain(found, first, here["s = 0"]),
            )
        )
    return verdicts


def _value(figures: dict) -> float:
    return Accuracy.of(figures["choices"]).value


def _held_out(figures: dict) -> float:
    return figures["curve"][-1]["held_out"]


LORA_MASK = Recipe(
    "lora-mask",
    "LoRA restricted at the indices of super weights",
    "Table 4 of arXiv 2607.08733",
    "Updates of attention at the rows and columns of super weights are scaled down; the paper "
    "finds no effect.",
    data_of(),
    minutes=35,
    runs=runs,
    section=section,
    needs_lora=True,
)
