"""What the study of quantization shows: tables, a plot, and whether the published claims hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from swkernels.train.figure import INK, LINE, MARK, MUTED, legend_above, log_where_wide

from ..page import cell, percent
from ..recipe import Figure, Table, Verdict
from ..runs.quantize import CLIP, PLAIN, PRESERVE
from .comparing import Accuracy
from .edited import Ratio

TENSOR = "tensor"
Cells = dict[tuple[int, "int | str", str], dict]  # figures by bits, block and method
Activations = dict[tuple["str | None", bool], dict]  # by what shares a scale; keeping

USABLE = 2.0  # times the perplexity of the original: with more, a model is not used
# Average zero-shot accuracy in %, 4 bits: rounded to nearest, and with the super weight kept.
FIGURE_7 = {
    "Llama-7B": {
        16384: (66.21, 66.21), 65536: (63.41, 63.41), 262144: (50.51, 57.85),
        1048576: (27.55, 45.40),
    },
    "Mistral-7B": {
        16384: (70.29, 72.26), 65536: (64.46, 65.37), 262144: (36.88, 45.28),
        1048576: (28.13, 33.82),
    },
}  # fmt: skip
# Perplexity of WikiText-2 (Tables 3 and 4): FP16, naive W8A8, SmoothQuant, theirs.
TABLES_3_4 = {
    "Llama-7B": (5.68, 5.83, 5.71, 5.74),
    "OLMo-1B": (10.12, 10.79, None, 10.23),
    "OLMo-7B": (7.51, 8.70, None, 7.80),
    "Mistral-7B": (5.25, 5.32, None, 5.31),
}


def contrast(*terms: tuple[float, dict]) -> Ratio:
    """A product of perplexities of the same windows, each to a power: (power, figures).

    All are NaN if a loss is not finite, so that nothing is decided by it.
    """
    counts = terms[0][1]["perplexity"]["tokens"]
    losses = [figures["perplexity"]["losses"] for _, figures in terms]
    sums = [sum(p * loss for (p, _), loss in zip(terms, each)) for each in zip(*losses)]
    if not all(map(math.isfinite, sums)):
        return Ratio(math.nan, math.nan, math.nan)
    n, total = len(counts), sum(counts)
    mean = sum(sums) / total
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.inf
    return Ratio.of_logarithm(mean, error, n)


def above(ratio: Ratio, bound: float = 1.0) -> bool | None:
    """Whether a ratio is above a bound, by its interval."""
    return True if ratio.low > bound else False if ratio.high < bound else None


def block_table(cells: Cells, blocks: Sequence[int | str], intact: dict) -> Table:
    """Perplexity and accuracy by block, beside the published accuracies."""
    columns = ["bits", "block", "plain", "clipped", "super weights kept", "plain over kept [95 %]"]
    columns += ["accuracy, plain", "kept", "kept minus plain", *FIGURE_7]
    (accuracy,) = map(Accuracy.of, intact["choices"].values())
    first = [None, "original", _perplexity(intact), None, None, None, str(accuracy), None, None]
    rows = [first + [None] * len(FIGURE_7)]
    published = {block for model in FIGURE_7.values() for block in model}
    for bits in sorted({bits for bits, _, _ in cells}):
        more = sorted(published - set(blocks)) if bits == 4 else []
        for block in [*(b for b in blocks if b != TENSOR), *more, TENSOR]:
            plain, clipped, kept = (cells.get((bits, block, m)) for m in (PLAIN, CLIP, PRESERVE))
            both = plain and kept
            row = [bits, _named(block), *map(_perplexity, (plain, clipped, kept))]
            row += [both and str(contrast((1, plain), (-1, kept)))]
            asked = [f and f["choices"] and _accuracy(f) for f in (plain, kept)]
            row += [a and str(a) for a in asked] + [all(asked) and str(asked[1].less(asked[0]))]
            there = [model.get(block) if bits == 4 else None for model in FIGURE_7.values()]
            if plain or clipped or kept or any(there):
                row += [t and f"{t[0]:.2f} → {t[1]:.2f} %" for t in there]
                rows.append([value or None for value in row])
    caption = "Perplexity, and the accuracy of answers; published: plain → kept, average zero-shot."
    return Table(columns, rows, caption)


def activation_table(found: Activations, intact: dict) -> Table:
    """W8A8 beside the published perplexities."""
    columns = ["weights, activations", "perplexity", "over original [95 %]", "loss recovered"]
    published = list(zip(*TABLES_3_4.values()))
    rows: list[list[object]] = [["original", _perplexity(intact), None, None, *published[0]]]
    labels = {
        (None, False): ("int8, as they are", None),
        ("token", False): ("int8, int8 a token", 1),
        ("token", True): ("int8, int8 a token, super activations kept", 3),
        ("tensor", False): ("int8, int8 a tensor", None),
        ("tensor", True): ("int8, int8 a tensor, super activations kept", None),
    }
    for (per, keep), (label, at) in labels.items():
        figures = found.get((per, keep))
        if figures is None:
            continue
        naive = found.get((per, False))
        share = _recovered(intact, naive, figures) if keep and naive else None
        there = [None] * len(TABLES_3_4) if at is None else published[at]
        over = str(contrast((1, figures), (-1, intact)))
        rows.append([label, _perplexity(figures), over, percent(share), *there])
    rows.append(["SmoothQuant", None, None, None, *published[2]])
    return Table([*columns, *TABLES_3_4], rows, "W8A8; weights have one scale a matrix.")


def block_figure(cells: Cells, blocks: Sequence[int | str], intact: dict) -> Figure:
    """Perplexity by block, and the gap between plain and kept."""
    styles = {PLAIN: (MARK, "plain"), CLIP: (MUTED, "clipped"), PRESERVE: (LINE, "kept")}

    def draw(figure) -> None:
        left, right = figure.subplots(1, 2)
        for bits, dash in ((4, "-"), (8, ":")):
            for method, (color, label) in styles.items():
                points = [
                    (_size(block, found), _perplexity(found))
                    for block in blocks
                    if (found := cells.get((bits, block, method)))
                ]
                label = f"{bits} bits, {label}"
                _line(left, points, f"o{dash}", color=color, label=label)
            gaps = [
                (_size(block, plain), contrast((1, plain), (-1, kept)))
                for block in blocks
                if (plain := cells.get((bits, block, PLAIN)))
                and (kept := cells.get((bits, block, PRESERVE)))
            ]
            points = [(size, gap.value) for size, gap in gaps]
            _line(right, points, f"o{dash}", color=INK, label=f"{bits} bits")
            for size, gap in gaps:
                right.plot([size, size], [gap.low, gap.high], color=INK, lw=1.2)
        left.axhline(_perplexity(intact), color=INK, lw=0.8, ls="--")
        right.axhline(1, color=INK, lw=0.8, ls="--")
        left.set(ylabel="perplexity")
        right.set(ylabel="perplexity, plain over kept")
        for axes in (left, right):
            axes.set(xlabel="elements of a block")
            lines = axes.lines[:-1]  # without the dashed one
            log_where_wide(axes, "x", [size for line in lines for size in line.get_xdata()])
            log_where_wide(axes, "y", [v for line in lines for v in line.get_ydata() if v > 0])
            if axes.get_legend_handles_labels()[0]:
                legend_above(axes)

    caption = "Perplexity by block size (dashed: the original), and plain over kept with 95 %."
    return Figure("quantization", caption, draw)


def _line(axes, points: Sequence[tuple[float, float]], style: str, **options) -> None:
    if points:
        axes.plot(*zip(*points), style, ms=3.5, lw=1.2, **options)


def gap_grows(cells: Cells, blocks: Sequence[int | str]) -> Verdict | None:
    """Whether plain over kept grows with the block: by its slope, a factor for each doubling."""
    pairs = [(cells.get((4, b, PLAIN)), cells.get((4, b, PRESERVE))) for b in blocks]
    if not all(plain and kept for plain, kept in pairs):
        return None
    sizes = [math.log2(_size(b, plain)) for b, (plain, _) in zip(blocks, pairs)]
    middle = sum(sizes) / len(sizes)
    spread = sum((size - middle) ** 2 for size in sizes)
    terms = []
    for size, (plain, kept) in zip(sizes, pairs):
        power = (size - middle) / spread  # of least squares
        terms += [(power, plain), (-power, kept)]
    slope = contrast(*terms)
    first, last = (contrast((1, plain), (-1, kept)) for plain, kept in (pairs[0], pairs[-1]))
    return Verdict(
        "The gap between keeping and not keeping the super weights grows with the block.",
        above(slope),
        f"with 4 bits, plain over kept grows {slope} with each doubling; it is {first} in the "
        f"smallest block and {last} in the largest.",
    )


def large_blocks_usable(cells: Cells, blocks: Sequence[int | str], intact: dict) -> Verdict | None:
    """Whether a block is usable with the super weights kept, and is not without."""
    over: dict[int | str, tuple[Ratio, Ratio]] = {}
    for block in blocks:
        pair = [cells.get((4, block, method)) for method in (PLAIN, PRESERVE)]
        if not all(pair):
            return None
        over[block] = tuple(contrast((1, figures), (-1, intact)) for figures in pair)
    unusable = {b: tuple(above(ratio, USABLE) for ratio in pair) for b, pair in over.items()}
    gained = [b for b, state in unusable.items() if state == (True, False)]
    lost = [b for b, state in unusable.items() if state == (True, True)]
    doubtful = [b for b in blocks if unusable[b][0] is not False and unusable[b][1] is not True]
    shown = gained[-1] if gained else lost[0] if lost else blocks[-1]
    plain, kept = over[shown]
    return Verdict(
        "Keeping the super weights makes large blocks usable that are not without.",
        True if gained else False if lost and not doubtful else None,
        f"usable is a perplexity below {USABLE:g} times the original's; with 4 bits and blocks of "
        f"{_named(shown)} it is {plain} plain and {kept} kept"
        f"{_listed('; usable only when kept', gained)}{_listed('; unusable either way', lost)}"
        f"{_listed('; not clear', [b for b in doubtful if b not in gained])}.",
    )


def loss_recovered(found: Activations, per: str, intact: dict) -> Verdict | None:
    """Whether keeping super activations recovers more than half of what W8A8 loses."""
    naive, kept = found.get((per, False)), found.get((per, True))
    if naive is None or kept is None:
        return None
    loss = contrast((1, naive), (-1, intact))
    beyond_half = contrast((0.5, naive), (-1, kept), (0.5, intact))
    share = _recovered(intact, naive, kept)
    why = f"with a scale a {per}, naive W8A8 has {loss} of the original's perplexity"
    if share is None:
        why += ", which is no loss that these windows can tell"
    else:
        over = contrast((1, kept), (-1, intact))
        why += f", and {over} with the activations kept: {percent(share)} of the loss in nats"
    return Verdict(
        "Setting super activations aside recovers more than half of what naive W8A8 loses.",
        None if share is None else above(beyond_half),
        f"{why}.",
    )


def _recovered(intact: dict, naive: dict, kept: dict) -> float | None:
    """The share of the loss in nats; None where there is no clear one."""
    loss = contrast((1, naive), (-1, intact))
    if not above(loss):
        return None
    return math.log(contrast((1, naive), (-1, kept)).value) / math.log(loss.value)


def _perplexity(figures: dict | None) -> float | None:
    return figures and figures["perplexity"]["perplexity"]


def _accuracy(figures: dict) -> Accuracy:
    (choices,) = figures["choices"].values()
    return Accuracy.of(choices)


def _size(block: int | str, figures: dict) -> int:
    """Elements of a block, at most those of the largest matrix."""
    most = figures["weights"]["elements"]
    return most if block == TENSOR else min(block, most)


def _named(block: int | str) -> str:
    return "a whole matrix" if block == TENSOR else cell(block)


def _listed(words: str, blocks: Iterable[int | str]) -> str:
    named = ", ".join(map(_named, blocks))
    return f"{words}: {named}" if named else ""
