"""``perturbation``: losses with a weight moved, and the verdicts of made-up figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swkernels.studies.recipes.perturbation import PERTURBATION
from swkernels.studies.recipes.positions import Estimate, Positions, bent, typical_ratio
from tests.studies import tiny
from tests.studies.by_hand import made as made_of
from tests.studies.by_hand import verdicts
from tests.studies.positions import PLAN, by_name, figures_of, places, prompts

CLAIMS = (
    "A perturbation costs more at the detected super weights.",
    "A perturbation costs more at the largest weights of layers.",
)


@pytest.fixture(scope="module")
def studied(planted, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("perturbation")
    found = tiny.run(["perturbation"], planted, data, output, PLAN)
    return found(bent(PLAN)), (output / "README.md").read_text()


@torch.no_grad()
def moved(model, place: dict, sample: torch.Tensor, eps: float) -> tuple[float, float]:
    """The loss of a sample, and with one weight moved."""
    weight = model.get_parameter(f"{place['module']}.weight")
    kept, losses = weight[place["row"], place["column"]].clone(), []
    for step in (0, eps):
        weight[place["row"], place["column"]] = kept + step
        losses.append(float(F.cross_entropy(model(sample[None]).logits[0, :-1], sample[1:])))
    weight[place["row"], place["column"]] = kept
    return tuple(losses)


def test_measured(studied, planted, data):
    figures, (model, ids) = studied[0], prompts(planted, data)
    for number, sample in enumerate(ids):
        noise = 6 * math.sqrt(2) * figures["rounding"][number]
        assert noise < 1e-5
        for n, place in enumerate(places(figures)):
            before, after = moved(model, place, sample, 1e-4)
            assert figures["loss"][number] == pytest.approx(before, abs=noise)
            assert figures["measured"][number][n] == pytest.approx(abs(after - before), abs=noise)


def test_foretold(studied, planted, data):
    """By losses of a float64 copy with steps ten times as wide, either way."""
    figures, (model, ids) = studied[0], prompts(planted, data)
    model.double()
    for number, sample in enumerate(ids):
        for n, place in enumerate(places(figures)):
            before, up = moved(model, place, sample, 1e-3)
            _, down = moved(model, place, sample, -1e-3)
            slope, bend = (up - down) / 2e-3, (up - 2 * before + down) / 1e-6
            expected = abs(slope * 1e-4 + bend * 1e-8 / 2)
            assert figures["foretold"][number][n] == pytest.approx(expected, rel=0.02, abs=2e-8)


def test_page(studied):
    figures, page = studied
    section = page.split("## perturbation")[1].split("\n## ")[0]
    assert "| published, measured |  |  | 3.39 | 1.09 | 72 | 8.43 |" in section
    for name in ("foretold", "measured"):
        values = np.array(figures[name])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (values[:, :2] / values[:, 2:]).ravel()
        ratios = ratios[np.isfinite(ratios)]
        (row,) = (line for line in section.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        assert cells[:2] == [str(len(ratios)), str(4 - len(ratios))]
        expected = [ratios.mean(), np.median(ratios), ratios.max(), ratios.std()]
        assert [float(cell) for cell in cells[2:]] == pytest.approx(expected, rel=1e-3)
    noise = math.sqrt(2) * np.array(figures["rounding"])[:, None]
    buried = 100 * (np.array(figures["foretold"])[:, 2:] < noise).mean()
    assert f"and {buried:.1f} % of those at random positions are smaller" in section
    assert section.count("**This cannot be decided**") == 2


def made(own: float, random: float, spread: float, inputs: int = 8) -> dict:
    figures = figures_of(inputs, foretold=(own, random, spread), measured=(own, random, spread))
    return verdicts(PERTURBATION.section(made_of({bent(tiny.PLAN): figures})))


@pytest.mark.parametrize(
    "own, random, spread, inputs, expected",
    [
        (1e-6, 1e-8, 3, 8, True),
        (1e-8, 1e-6, 3, 8, False),
        (1e-6, 1e-6, 3, 8, None),
        (1e-6, 1e-8, 3, 4, None),  # too few inputs
    ],
)
def test_verdicts(own, random, spread, inputs, expected):
    assert by_name(made(own, random, spread, inputs), CLAIMS) == [expected] * 2


def test_typical_ratio():
    """Geometric means of positions, of the means over inputs; a group against all controls."""
    figures = figures_of(5, foretold=(4, 2, 3))
    values = np.array(figures["foretold"]).mean(0)
    found = typical_ratio(Positions.of(figures, "foretold"), "super weight")
    expected = math.exp(np.log(values[:3]).mean() - np.log(values[6:]).mean())
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high
    turned = figures | {"foretold": (-np.array(figures["foretold"])).tolist()}
    assert typical_ratio(Positions.of(turned, "foretold"), "super weight") == found
    assert typical_ratio(Positions.of(figures, "foretold").only("super weight"), "other") is None


def test_how_an_estimate_is_written():
    assert str(Estimate(1031.4, 0.00123, 2_345_678)) == "1,031 [0.00123, 2.35e+06]"


def test_the_interval_of_a_typical_ratio():
    """It holds the truth most times, although random positions differ by a factor of e."""
    hits = 0
    for seed in range(60):
        figures = figures_of(6, seed, foretold=(8, 2, 1.05))
        values = np.array(figures["foretold"])
        values[:, 6:] *= np.exp(np.random.default_rng(seed).normal(size=6))
        positions = Positions.of(figures | {"foretold": values}, "foretold")
        found = typical_ratio(positions, "super weight", seed)
        hits += found.low <= 4 <= found.high
    assert 42 <= hits < 60  # percentiles of six positions are a little too narrow


def test_what_is_rounding():
    """A change between one loss's rounding (1e-8) and that of two is not seen."""
    figures = figures_of(foretold=(1.3e-8, 1.5e-8, 1), measured=(1e-8, 1e-8, 1))
    notes = PERTURBATION.section(made_of({bent(tiny.PLAN): figures})).notes
    assert notes[-1].startswith("100.0 % of the changes at weights and 0.0 % of those at random")
