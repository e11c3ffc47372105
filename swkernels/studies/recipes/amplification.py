"""How far the inputs of super weights stand out: M (Figure 5, I.3.1)."""

from __future__ import annotations

import statistics

from swkernels.evidence.amplification import FORMULA, Amplification, Amplified

from ..data import TEXT
from ..lab import DETECT
from ..recipe import Figure, Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..runs.analyze import DETECTED, LARGEST, RANDOM
from .positions import LEAST, Estimate, above, mean_of

# Qwen2.5-0.5B-Instruct, 100 prompts: layer, mean and maximum.
PUBLISHED = ((2, 40.6, 177.8), (3, 52.0, 226.5), (21, 49.5, 233.2))
TYPICAL = (5, 10)  # the mean of most layers
_RANDOM = 4  # random positions for each weight


def run_of(plan: Plan) -> Run:
    budget = plan.budget
    config = {
        "prompts": budget.prompts,
        "length": budget.length,
        "top": budget.top,
        "random": _RANDOM,
        "seed": plan.seed,
    }
    return Run("amplify", config, (DETECT,))


def runs(plan: Plan) -> list[Run]:
    return [run_of(plan)]


def section(found: Found) -> Section:
    budget = found.plan.budget
    settings = (
        f"{budget.prompts} prompts of {budget.length} tokens of the text. {FORMULA}: of any "
        "channel of a layer's down projection, and at the columns of weights."
    )
    figures = found(run_of(found.plan))
    if figures is None:
        return Section(settings)
    read = Amplification(
        tuple(map(_read, figures["layers"])),
        tuple(_read(one) for one in figures["columns"] if one["group"] != RANDOM),
        figures["prompts"],
        figures["tokens"],
    )
    return Section(
        settings,
        [_layers(read), _columns(figures), Figure("amplification", FORMULA, _drawn(read))],
        _verdicts(read, figures),
        NOTES,
    )


NOTES = [
    "Published: Qwen2.5-0.5B-Instruct; `high-magnitude activation dimensions` of each layer, which "
    "the paper does not name, nor how tokens are put together. Here the largest channel counts, of "
    "which M > 1 holds by definition, and each column of a weight by itself.",
    "M of a prompt is the largest over its tokens, so that it is above 1 at most columns, random "
    "ones too: what tells a super weight is by how much. By a mean over tokens M would be smaller.",
]


def _read(entry: dict) -> Amplified:
    names = ("layer", "module", "expert", "column", "prompt", "token", "channel")
    return Amplified(values=tuple(entry["values"]), **{name: entry[name] for name in names})


def _layers(read: Amplification) -> Table:
    rows = []
    for one in read.by_layer():
        spread = one.spread
        rows.append(
            [f"layer {one.layer}", str(mean_of(one.values)), spread.median, spread.maximum,
             one.channel]
        )  # fmt: skip
    rows += [
        [f"published, layer {layer}", f"{mean:g}", None, largest, None]
        for layer, mean, largest in PUBLISHED
    ]
    columns = ["largest channel of", "mean [95 %]", "median", "maximum", "channel of the maximum"]
    return Table(columns, rows)


def _columns(figures: dict) -> Table:
    rows = []
    for one in figures["columns"]:
        if one["group"] != RANDOM and one["values"]:
            mean = str(mean_of(one["values"]))
            where = f"layer {one['layer']}, column {one['column']}"
            rows.append([where, one["group"], mean, one["median"], one["maximum"]])
    random = _random(figures)
    if random:
        means = [one["mean"] for one in random]
        value = f"{statistics.mean(means):.3g} (of columns: {min(means):.3g} to {max(means):.3g})"
        middle = statistics.median(one["median"] for one in random)
        most = max(one["maximum"] for one in random)
        rows.append([f"{len(random)} random columns", RANDOM, value, middle, most])
    return Table(["M at", "of", "mean [95 %]", "median", "maximum"], rows)


def _random(figures: dict) -> list[dict]:
    return [one for one in figures["columns"] if one["group"] == RANDOM and one["values"]]


def _drawn(read: Amplification):
    return lambda figure: read.draw(figure.subplots())


def _verdicts(read: Amplification, figures: dict) -> list[Verdict]:
    verdicts = []
    enough = figures["prompts"] >= LEAST
    random = [one["mean"] for one in _random(figures)]
    highest = max(random, default=None)
    for group, name in ((DETECTED, "super weights"), (LARGEST, "the largest weights of layers")):
        means = [mean_of(c["values"]) for c in figures["columns"] if c["group"] == group]
        if not means:
            continue
        why = "; ".join(map(str, means))
        beyond = sum(mean.low > highest for mean in means) if random else None
        why += "" if beyond is None else (
            f". {sum(mean > 1 for mean in random)} of {len(random)} random columns are above 1 as "
            f"well; {beyond} of these {len(means)} are above all of them"
        )  # fmt: skip
        if random and min(random) > 1:
            why += ". So M > 1 is true of nearly any column and tells nothing by itself"
        holds = _all(means, 1) if enough else None
        verdicts.append(Verdict(f"M > 1 at {name}.", holds, f"{why}."))
    layers = [mean_of(one.values) for one in read.by_layer()]
    low, high = TYPICAL
    inside = sum(low <= mean.low and mean.high <= high for mean in layers)
    below, beyond = sum(m.high < low for m in layers), sum(m.low > high for m in layers)
    half = len(layers) / 2
    # What lies above refutes nothing: see the reason that is given. Half of them are not most.
    holds = (True if inside > half else False if below >= half else None) if enough else None
    middle = statistics.median(mean.value for mean in layers)
    why = (
        f"{inside} of {len(layers)} layers are in it with their whole interval, {below} below and "
        f"{beyond} above; the median of the layers' means is {middle:.3g}"
    )
    if beyond:
        why += (
            ". Layers above decide nothing: M here is the largest over channels and over the "
            "tokens of a prompt, the paper names neither, and by a mean over tokens M would be "
            "smaller"
        )
    verdicts.append(Verdict(f"The mean M of most layers is {low} to {high}.", holds, f"{why}."))
    return verdicts


def _all(means: list[Estimate], bound: float) -> bool | None:
    """Whether all lie above a bound: False where one is clearly below."""
    sides = [above(mean, bound) for mean in means]
    return False if False in sides else None if None in sides else True


AMPLIFICATION = Recipe(
    "amplification",
    "Activation amplification",
    "Figure 5, I.3.1 of arXiv 2607.08733",
    "How far the input that a super weight multiplies stands out; Theorem 1 rests on M >> 1.",
    (TEXT,),
    minutes=2,
    runs=runs,
    section=section,
)
