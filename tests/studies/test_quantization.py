"""``quantization``: cells by NumPy and plain hooks, the arithmetic of its page, its verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.studies.recipe import Verdict
from swkernels.studies.recipes.quantization import (
    Z,
    blocks_of,
    original,
    rounded,
    runs,
    section,
    with_activations,
)
from swkernels.studies.recipes.quantization_views import block_figure, contrast
from swkernels.studies.run import in_order
from swkernels.studies.runs.quantize import CLIP, PLAIN, PRESERVE, quantize
from swkernels.train.figure import render
from tests.ops import quant_oracle
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, made, reading
from tests.studies.tiny import PLAN, TINY

SUPER = "model.layers.1.mlp.down_proj"  # [5, 7]
T_3 = 3.182446  # Student's t of 3 degrees of freedom, 97.5 %


@pytest.fixture(scope="module")
def done(planted, data, tmp_path_factory):
    """The figures found, and the page."""
    folder = tmp_path_factory.mktemp("quantization")
    found = tiny.run(["quantization"], planted, data, folder)
    return found, (folder / "README.md").read_text()


@pytest.fixture
def hand(planted, data):
    """The checkpoint with the windows that are measured, and those that a clip is chosen on."""
    hand = Checkpoint(planted, data)
    first = TINY.point_tokens
    ids = torch.tensor(hand.tokenizer((data / "text.txt").read_text())["input_ids"])
    hand.chosen_on = ids[:first].split(TINY.window)
    hand.windows = ids[first : first + TINY.tokens].split(TINY.window)
    return hand


def linear(model) -> dict:
    return {name: module for name, module in model.named_modules() if "_proj" in name}


def through(values, code, symmetric, block, clip=None, apart=()) -> torch.Tensor:
    """A matrix rounded to nearest in NumPy; what stands apart is exact."""
    w = values.detach().numpy()
    packed = quant_oracle.quantize(w, code, symmetric, block, clip, apart=apart)
    found = quant_oracle.dequantize(packed, code, symmetric)
    found[list(apart)] = w.reshape(-1)[list(apart)]
    return torch.from_numpy(found.reshape(w.shape))


def round_weights(originals, model, code, symmetric, block, z=None, keep=False):
    for name, module in linear(model).items():
        apart = [5 * 48 + 7] if keep and name == SUPER else []
        clip = z and ("zscore", z)
        module.weight.data = through(originals[name], code, symmetric, block, clip, apart)


@pytest.mark.parametrize(
    ("bits", "block", "method"),
    [(4, 64, PLAIN), (4, "tensor", CLIP), (4, "tensor", PRESERVE), (8, 256, PRESERVE)],
)
def test_rounded_weights_by_hand(done, hand, bits, block, method):
    figures = done[0](rounded(PLAN, bits, block, method))
    originals = {name: module.weight.data for name, module in linear(hand.model).items()}

    def losses(z, windows):
        round_weights(originals, hand.model, f"int{bits}", False, block, z, keep=method == PRESERVE)
        hand.windows = windows
        return hand.losses()

    measured = hand.windows
    clips = (None,) if method == PLAIN else Z
    totals = {z: sum(losses(z, hand.chosen_on)) for z in clips}
    assert totals[figures["clip"]] <= min(totals.values()) * (1 + 1e-6)
    want = losses(figures["clip"], measured)
    assert figures["perplexity"]["losses"] == pytest.approx(want, rel=1e-5)
    assert figures["perplexity"]["tokens"] == [TINY.window - 1] * 4
    if bits == 4 and method != CLIP:
        assert figures["choices"]["ARC-Easy"]["predictions"] == hand.predictions()
    else:
        assert figures["choices"] == {}
    kept = int(method == PRESERVE)
    assert figures["weights"] == {"matrices": 14, "elements": 32 * 48, "kept": kept}


@pytest.mark.parametrize("per", [None, "token", "tensor"])
@pytest.mark.parametrize("keep", [False, True])
def test_w8a8_by_hand(done, hand, per, keep):
    if per is None and keep:
        return
    originals = {name: module.weight.data for name, module in linear(hand.model).items()}
    round_weights(originals, hand.model, "int8", True, "tensor")

    def hook(module, args):
        x = args[0][0]  # [S, H]
        apart = []
        if keep and module is linear(hand.model)[SUPER]:
            apart = [int(x[:, 7].abs().argmax()) * 48 + 7]
        return (through(x, "int8", True, "row" if per == "token" else "tensor", None, apart)[None],)

    for module in linear(hand.model).values() if per else ():
        module.register_forward_pre_hook(hook)
    figures = done[0](with_activations(PLAN, per, keep))
    assert figures["perplexity"]["losses"] == pytest.approx(hand.losses(), rel=1e-5)


def test_page(done, hand):
    found, page = done
    intact = found(original(PLAN))
    assert intact["perplexity"]["losses"] == pytest.approx(hand.losses(), rel=1e-5)
    assert intact["choices"]["ARC-Easy"]["predictions"] == hand.predictions()
    plain, kept = (found(rounded(PLAN, 8, 16, method)) for method in (PLAIN, PRESERVE))
    shown = [f"{f['perplexity']['perplexity']:.4g}" for f in (plain, kept)]
    assert f"| 8 | 16 | {shown[0]} |  | {shown[1]} | " in page
    assert "| 4 | 262,144 |" in page and "| 50.51 → 57.85 % | 36.88 → 45.28 % |" in page
    assert "| SmoothQuant |  |  |  | 5.71 |" in page
    assert "27 of 27 runs are done" in page


def test_a_text_that_is_too_short(planted, data, tmp_path):
    class Lab:
        model = Checkpoint(planted, data).model
        tokens = staticmethod(lambda most: torch.arange(10))

    config = dict(original(PLAN).config) | {"clip_tokens": 9}
    with pytest.raises(InvalidInput, match="has 10 tokens: expected 9 to choose a clip on"):
        quantize(Lab(), config, tmp_path)


# --- arithmetic and verdicts, of made-up figures ---

INTACT = [3.0, 3.1, 2.9, 3.0]
BLOCKS = blocks_of(PLAN)  # 16, 64, 256, a tensor of 1,024


def cell(extra: list[float] | float, right: float = 0.6) -> dict:
    """Figures of a cell: how much more than the original it loses in each window."""
    more = [extra] * 4 if isinstance(extra, (int, float)) else extra
    wobble = [0.01, -0.01, 0.005, -0.005]  # no spread at all would be made up, too
    figures = reading([a + b + c for a, b, c in zip(INTACT, more, wobble)], right)
    figures["choices"] = {"ARC-Easy": figures["choices"]["ARC-Easy"]}
    return figures | {"clip": None, "weights": {"matrices": 1, "elements": 1024, "kept": 0}}


def page_of(plain: list, kept: list, naive=0.5, aside=0.1) -> list[Verdict]:
    """The three verdicts, by what is lost in each block and by W8A8."""
    cells = {original(PLAN): cell(0.0)}
    for block, one, other in zip(BLOCKS, plain, kept):
        cells |= {rounded(PLAN, 4, block, PLAIN): cell(one)}
        cells |= {rounded(PLAN, 4, block, PRESERVE): cell(other)}
    cells |= {with_activations(PLAN, "token"): cell(naive)}
    cells |= {with_activations(PLAN, "token", True): cell(aside)}
    return section(made(cells)).verdicts


def said(*losses, **more) -> list[bool | None]:
    return [verdict.holds for verdict in page_of(*losses, **more)]


def test_a_contrast_is_a_paired_ratio():
    a, b = cell([0.1, 0.2, 0.3, 0.2]), cell([0.0, 0.0, 0.1, 0.1])
    differences = np.array([0.1, 0.2, 0.2, 0.1])
    mean, width = differences.mean(), T_3 * differences.std(ddof=1) / 2
    found = contrast((1, a), (-1, b))
    assert found.value == pytest.approx(math.exp(mean))
    assert (found.low, found.high) == pytest.approx(
        (math.exp(mean - width), math.exp(mean + width))
    )
    half = contrast((0.5, a), (-0.5, b))
    assert half.value == pytest.approx(math.exp(mean / 2))
    broken = contrast((1, a), (-1, cell(math.inf)))
    assert math.isnan(broken.value) and math.isnan(broken.low) and math.isnan(broken.high)


def test_the_slope_is_that_of_least_squares():
    plain, kept = [0.1, 0.3, 0.4, 1.5], [0.1, 0.2, 0.5, 0.6]
    cells = {rounded(PLAN, 4, b, PLAIN): cell(x) for b, x in zip(BLOCKS, plain)}
    cells |= {rounded(PLAN, 4, b, PRESERVE): cell(x) for b, x in zip(BLOCKS, kept)}
    verdict = section(made(cells | {original(PLAN): cell(0.0)})).verdicts[0]
    slope = np.polyfit([4, 6, 8, 10], np.subtract(plain, kept), 1)[0]
    assert f"grows ×{math.exp(slope):.4g} [" in verdict.why
    assert f"it is ×1 [1, 1] in the smallest block and ×{math.exp(0.9):.4g} [" in verdict.why


NOISY = [2.0, -2.0, 1.0, -1.0]


def test_verdicts():
    # Usable is below ln 2 = 0.69 nats more.
    growing = [0.1, 0.2, 1.0, 2.0]
    assert said(growing, [0.1, 0.2, 0.3, 0.5]) == [True, True, True]
    assert said(growing, [0.1, 0.2, 1.1, 2.5], aside=0.4) == [False, False, False]
    assert said([0.1, 0.2, 0.3, 0.4], [0.1] * 4)[1] is None  # plain is usable everywhere
    assert said(growing, [0.1, 0.2, 1.0, [0.5, 0.9, 0.4, 1.0]])[1] is None  # 2.0 or less?
    assert said(growing[:3] + [NOISY], [0.1, 0.2, 1.0, 0.5])[:2] == [None, None]
    assert said(growing, growing)[0] is None  # no gap at all
    apart = [1.1, 1.1, 1.1, [1.0, 1.2, 1.15, 1.05]]
    assert said(apart, [0.1] * 4)[0] is None  # a gap that does not grow
    assert said(growing[::-1], [0.1] * 4)[0] is False
    assert said(growing[:3] + [math.inf], [0.1, 0.2, 1.1, 0.5])[:2] == [None, None]


def test_blocks_are_named():
    why = page_of([0.1, 0.8, 1.0, 2.0], [0.1, 0.9, 0.3, [0.5, 0.9, 0.4, 1.0]])[1].why
    assert f"with 4 bits and blocks of 256 it is ×{math.exp(1):.4g} [" in why
    assert why.endswith(
        "; usable only when kept: 256; unusable either way: 64; not clear: a whole matrix."
    )


def test_w8a8_recovers():
    blocks = [0.1] * 4
    assert said(blocks, blocks, naive=0.5, aside=0.24)[2] is True
    assert said(blocks, blocks, naive=0.5, aside=0.26)[2] is False
    assert said(blocks, blocks, naive=0.5, aside=[0.1, 0.4, 0.2, 0.3])[2] is None
    assert said(blocks, blocks, naive=[0.1, -0.1, 0.2, 0.0], aside=0.0)[2] is None  # no clear loss
    cells = {original(PLAN): cell(0.0), with_activations(PLAN, "tensor"): cell(0.4)}
    cells |= {with_activations(PLAN, "tensor", True): cell(0.1)}
    table = section(made(cells)).parts[-1]
    assert [row[3] for row in table.rows] == [None, None, "75.0 %", None]


@pytest.mark.parametrize("plain", [0.5, math.inf, math.nan])
def test_the_plot_takes_what_is_broken(plain):
    cells = {(4, 16, PLAIN): cell(plain), (4, 16, PRESERVE): cell(0.1)}
    figure = block_figure(cells, BLOCKS, cell(0.0))
    assert render(figure.draw, "svg", figure.height) == render(figure.draw, "svg", figure.height)


def test_accuracies_are_compared_on_the_same_questions():
    cells = {original(PLAN): cell(0.0), rounded(PLAN, 4, 16, PLAIN): cell(0.1, 0.5)}
    cells |= {rounded(PLAN, 4, 16, PRESERVE): cell(0.1, 0.75)}
    row = section(made(cells)).parts[0].rows[1]
    assert row[:2] == [4, "16"] and row[6].startswith("50.0 %") and row[7].startswith("75.0 %")
    assert row[8].startswith("+25.0 [")


def test_what_is_missing_is_left_out():
    assert section(made({})) is None
    found = section(made({original(PLAN): cell(0.0), rounded(PLAN, 8, 16, PLAIN): cell(0.1)}))
    rows = [row[:2] for row in found.parts[0].rows]
    assert not found.verdicts and rows == [[None, "original"], [8, "16"]]
    assert len({run.key for run in in_order(runs(PLAN))}) == 27  # with the detection
