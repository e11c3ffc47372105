"""Rounding to nearest in growing blocks, with and without the super weights; W8A8 (2411.07191)."""

from __future__ import annotations

from ..data import NAMES, TEXT
from ..lab import DETECT
from ..recipe import Found, Plan, Recipe, Section
from ..run import Run
from ..runs.quantize import CLIP, PLAIN, PRESERVE
from .quantization_views import (
    TENSOR,
    Cells,
    activation_table,
    block_figure,
    block_table,
    gap_grows,
    large_blocks_usable,
    loss_recovered,
)

BITS = (4, 8)
Z = (9.0, 15.0, 20.0, None)  # the range of the authors' code, and no clip
PER = ("token", "tensor")


NOTES = [
    "Figure 7 shows the average accuracy of zero-shot tasks and prints no numbers: those beside it "
    "are of the authors' notebook. Here the perplexity decides, with the accuracy on one task "
    "beside it. What is usable is this study's criterion; the paper says that blocks can grow "
    "slightly more gracefully.",
    "Of what naive W8A8 loses in perplexity, Tables 3 and 4 recover 14 % (Mistral-7B) to 84 % "
    "(OLMo-1B).",
    "Weights: integers with a zero point in each block of consecutive elements, 2^bits - 1 steps "
    "as in the authors' code. A kept weight does not count for the range of its block; in the "
    "paper it is clipped with the others and restored afterwards. The paper chooses the clip by "
    "the error of reconstruction on WikiText-2's training set; here it is the best of z = "
    f"{', '.join(f'{z:g}' for z in Z[:-1])} and none on other windows of the text.",
    "Activations: symmetric int8, scales found in each call, as SmoothQuant has them; the paper "
    "prints an asymmetric form. The products of attention stay as they are; the paper quantizes "
    "them too. A super activation is the largest magnitude in a sequence of each channel that "
    "feeds a super weight or is written by one. The paper puts the median in its place meanwhile: "
    "what does not count for the scale and comes back exactly may be anything. SmoothQuant itself "
    "is not measured here.",
]


def blocks_of(plan: Plan) -> tuple[int | str, ...]:
    return (*plan.budget.blocks, TENSOR)


def methods_of(bits: int) -> tuple[str, ...]:
    """Clipping alone is told from keeping with 4 bits only, which are the published ones."""
    return (PLAIN, CLIP, PRESERVE) if bits == 4 else (PLAIN, PRESERVE)


def original(plan: Plan) -> Run:
    """The model as it is, on the same windows."""
    return _cell(plan, asked=True)


def rounded(plan: Plan, bits: int, block: int | str, method: str) -> Run:
    """Weights of so many bits, activations as they are."""
    weights = {"bits": bits, "symmetric": False, "block": block, "method": method}
    return _cell(plan, weights, asked=bits == 4 and method != CLIP)


def with_activations(plan: Plan, per: str | None, keep: bool = False) -> Run:
    """Weights of 8 bits with a scale a matrix, and activations of 8 bits unless ``per`` is None."""
    weights = {"bits": 8, "symmetric": True, "block": TENSOR, "method": PLAIN}
    return _cell(plan, weights, None if per is None else {"per": per, "keep": keep})


def _cell(
    plan: Plan, weights: dict | None = None, activations: dict | None = None, asked: bool = False
) -> Run:
    budget = plan.budget
    method = PLAIN if weights is None else weights["method"]
    config = {
        "weights": weights,
        "activations": activations,
        "z": [None] if method == PLAIN else list(Z),
        "clip_tokens": budget.point_tokens,
        "tokens": budget.tokens,
        "window": budget.window,
        "tasks": {f"{plan.task}/test": budget.questions} if asked else {},
    }
    keeps = method == PRESERVE or (activations is not None and activations["keep"])
    return Run("quantize", config, (DETECT,) if keeps else ())


def runs(plan: Plan) -> list[Run]:
    return [
        original(plan),
        *(
            rounded(plan, bits, block, method)
            for bits in BITS
            for block in blocks_of(plan)
            for method in methods_of(bits)
        ),
        with_activations(plan, None),
        *(with_activations(plan, per, keep) for per in PER for keep in (False, True)),
    ]


def section(found: Found) -> Section | None:
    plan = found.plan
    intact = found(original(plan))
    if intact is None:
        return None
    cells: Cells = {
        (bits, block, method): figures
        for bits in BITS
        for block in blocks_of(plan)
        for method in methods_of(bits)
        if (figures := found(rounded(plan, bits, block, method)))
    }
    activations = {
        (per, keep): figures
        for per, keep in [(None, False), *((per, keep) for per in PER for keep in (False, True))]
        if (figures := found(with_activations(plan, per, keep)))
    }
    verdicts = [
        gap_grows(cells, blocks_of(plan)),
        large_blocks_usable(cells, blocks_of(plan), intact),
        loss_recovered(activations, "token", intact),
    ]
    return Section(
        _described(plan),
        [
            block_table(cells, blocks_of(plan), intact),
            block_figure(cells, blocks_of(plan), intact),
            activation_table(activations, intact),
        ],
        [verdict for verdict in verdicts if verdict is not None],
        NOTES,
    )


def _described(plan: Plan) -> str:
    budget = plan.budget
    tokens = "all" if budget.tokens is None else f"{budget.tokens:,}"
    asked = "all" if budget.questions is None else f"the first {budget.questions}"
    return (
        f"Every linear layer of the blocks; WikiText-2 test, {tokens} tokens in windows of "
        f"{budget.window:,} after {budget.point_tokens:,} on which clips are chosen; {asked} "
        f"questions of {NAMES[f'{plan.task}/test']}. Intervals are of 95 %, paired by windows "
        "(Student's t) and by questions (score)."
    )


QUANTIZATION = Recipe(
    "quantization",
    "Quantization with and without super weights",
    "Figure 7 and Tables 3 and 4 of arXiv 2411.07191",
    "Rounding to nearest in growing blocks: the paper finds that keeping the super weight makes "
    "large blocks lose less, and that 8-bit activations gain by super activations set aside.",
    (TEXT, "{task}/test"),
    minutes=22,
    runs=runs,
    section=section,
)
