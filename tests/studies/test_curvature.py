"""``curvature``: second derivatives by plain autograd, and the verdicts of made-up figures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from swkernels.evidence import probe as probing
from swkernels.studies.lab import NotInModel
from swkernels.studies.recipes.curvature import CURVATURE
from swkernels.studies.recipes.positions import bent, exponent
from swkernels.studies.runs import analyze
from swkernels.studies.runs.analyze import bend
from tests.studies import tiny
from tests.studies.by_hand import made as made_of
from tests.studies.by_hand import verdicts
from tests.studies.positions import PLAN, by_name, figures_of, places, prompts

SHOWN = "Finite differences with eps = 0.0001 in this dtype show most of the curvatures."
SQUARE = "The curvature grows with M^2 (equation 15)."
HIGHER = "The curvature is higher at {}."
RUNS = {"matrix": bent(PLAN), "row": bent(PLAN, row=True)}


@pytest.fixture(scope="module")
def studied(planted, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("curvature")
    found = tiny.run(["curvature"], planted, data, output, PLAN)
    return {name: found(run) for name, run in RUNS.items()}, output


@pytest.fixture(scope="module")
def texts(planted, data):
    return prompts(planted, data)


@pytest.mark.parametrize("kind", RUNS)
def test_figures(studied, texts, kind):
    """Each by the Hessian of the loss in one element of a weight, in float64."""
    figures, (model, ids) = studied[0][kind], texts
    model = model.double()
    model.set_attn_implementation("eager")
    for number, sample in enumerate(ids):
        expected = []
        for place in places(figures):
            name = f"{place['module']}.weight"
            weight = model.get_parameter(name).detach()

            def loss(moved, name=name, weight=weight, place=place, sample=sample):
                at = (torch.tensor([place["row"]]), torch.tensor([place["column"]]))
                changed = {name: weight.index_put(at, moved[None], accumulate=True)}
                out = functional_call(model, changed, (sample[None],), {"use_cache": False})
                return F.cross_entropy(out.logits[0, :-1], sample[1:])

            at = torch.tensor(0.0, dtype=torch.float64)
            ways = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
            expected.append([float(way(loss, at)) for way in ways])
        for name, values in zip(("gradient", "curvature"), zip(*expected)):
            largest = max(map(abs, values))
            assert figures[name][number] == pytest.approx(values, rel=1e-3, abs=1e-3 * largest)
    model.float()


@torch.no_grad()
def test_amplification_of_each_input(studied, texts):
    figures, (model, ids) = studied[0]["row"], texts
    for number, sample in enumerate(ids):
        seen = []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0][0].abs().double())
            )
            for layer in model.model.layers
        ]
        model(sample[None])
        for handle in handles:
            handle.remove()
        for n, place in enumerate(places(figures)):
            x = seen[place["layer"]]
            expected = float((x[:, place["column"]] / x.mean(1)).max())
            assert figures["amplification"][number][n] == pytest.approx(expected, rel=1e-4)


def test_positions(studied):
    for kind, figures in studied[0].items():
        by_group = {entry["group"]: entry for entry in figures["entries"]}
        assert set(by_group) == {"super weight", "largest of a layer"}
        special = by_group["super weight"]
        assert (special["layer"], special["row"], special["column"]) == (1, 5, 7)
        for entry, (control,) in zip(figures["entries"], figures["controls"], strict=True):
            assert control["module"] == entry["module"]
            if kind == "row":
                assert control["row"] == entry["row"] and control["column"] != entry["column"]
    rows = [[c["row"] for (c,) in studied[0]["matrix"]["controls"]]]
    assert rows != [[entry["row"] for entry in studied[0]["matrix"]["entries"]]]


def test_page(studied):
    figures, output = studied
    section = (output / "README.md").read_text().split("## curvature")[1].split("\n## ")[0]
    assert "| published, differences |  |  | 2.48 | 0.86 | 74.5 | 8.68 |" in section
    assert section.count("**This cannot be decided**") == len(CURVATURE_CLAIMS)
    exact = np.array(figures["matrix"]["curvature"])
    ratios = (exact[:, :2] / exact[:, 2:]).ravel()
    (row,) = (line for line in section.splitlines() if line.startswith("| exact |"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:2] == ["4", "0"]
    assert [float(cell.replace(",", "")) for cell in cells[2:]] == pytest.approx(
        [ratios.mean(), np.median(ratios), ratios.max(), ratios.std()], rel=1e-3
    )
    for name in ("curvature", "curvature-scaling"):
        assert (output / "figures" / f"{name}.svg").stat().st_size > 1000


CURVATURE_CLAIMS = (
    HIGHER.format("the detected super weights"),
    HIGHER.format("the largest weights of layers"),
    SHOWN,
    SQUARE,
)


def test_an_interrupted_run_goes_on(planted, data, tmp_path, studied, monkeypatch):
    """Ctrl-C in the second input; the first is not measured again."""
    measured = []

    def interrupted(*args, **options):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return probing.probe(*args, **options)

    monkeypatch.setattr(analyze, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(["perturbation"], planted, data, tmp_path / "out", PLAN)
    found = tiny.run(["perturbation"], planted, data, tmp_path / "out", PLAN)
    assert len(measured) == 3
    again, before = found(RUNS["matrix"]), studied[0]["matrix"]
    assert json.dumps(again, sort_keys=True) == json.dumps(before, sort_keys=True)
    assert not list((tmp_path / "out" / "work").glob(f"{RUNS['matrix'].key}*"))


def made(own: float, random: float, noise: float, spread: float = 1.2, row: float = 2.0) -> dict:
    """Verdicts: |H| of weights and of random positions, and in a row |H| as a power of M."""
    figures = figures_of(
        curvature=(own, random, spread), differences=(own, random, 1),
        differences_noise=(noise, noise, 1), amplification=(100, 2, 1),
    )  # fmt: skip
    bases = figures_of(amplification=(50, 2, 2.0), curvature=(1, 1, 1))
    in_row = bases | {"curvature": (np.array(bases["amplification"]) ** row).tolist()}
    made = made_of({bent(tiny.PLAN): figures, bent(tiny.PLAN, row=True): in_row})
    return verdicts(CURVATURE.section(made))


def test_verdicts_that_hold():
    assert by_name(made(1e-2, 1e-5, 1e-9), CURVATURE_CLAIMS) == [True, True, True, True]


def test_verdicts_that_do_not_hold():
    assert by_name(made(1e-5, 1e-2, 10, row=1), CURVATURE_CLAIMS) == [False, False, False, False]


def test_verdicts_that_are_open():
    found = made(1.1e-5, 1e-5, 1.05e-5, spread=8)
    assert by_name(found, CURVATURE_CLAIMS)[:3] == [None, None, None]


def test_the_exponent_is_decided_by_its_interval():
    """|H| that goes with M squared, but for chance as large as M's own spread."""
    figures = figures_of(amplification=(3, 2, 1.3), curvature=(1, 1, 1))
    wild = figures_of(seed=5, curvature=(9, 4, 20.0))["curvature"]
    in_row = figures | {"curvature": wild}
    section = CURVATURE.section(made_of({bent(tiny.PLAN, row=True): in_row}))
    assert verdicts(section) == {SQUARE: None}


def test_exponent():
    """Least squares of logarithms through the origin, by NumPy."""
    generator = np.random.default_rng(0)
    bases = np.exp(generator.normal(2, 1, size=(8, 6)))
    values = -(bases**1.7) * np.exp(generator.normal(0, 0.5, size=(8, 6)))
    x, y = np.log(bases).ravel(), np.log(np.abs(values)).ravel()
    (slope,), *_ = np.linalg.lstsq(x[:, None], y, rcond=None)
    found = exponent(bases, values)
    assert found.value == pytest.approx(slope)
    assert found.low < 1.7 < found.high and found.high - found.low < 0.4
    bases[0, 0], values[1, 1] = np.nan, 0
    x, y = np.log(bases), np.log(np.where(values == 0, np.nan, np.abs(values)))
    fits = np.isfinite(x) & np.isfinite(y)
    assert exponent(bases, values).value == pytest.approx((x * y)[fits].sum() / (x**2)[fits].sum())
    assert exponent(np.ones((3, 2)), np.ones((3, 2))) is None


def test_too_little_decides_nothing():
    figures = figures_of(
        inputs=4, amplification=(50, 2, 1.1), curvature=(1, 1e-3, 1.1), differences=(1, 1, 1),
        differences_noise=(1e-9, 1e-9, 1),
    )  # fmt: skip
    made = made_of({bent(tiny.PLAN): figures, bent(tiny.PLAN, row=True): figures})
    section = CURVATURE.section(made)
    assert set(verdicts(section).values()) == {None}
    assert "fewer than 5 inputs" in section.verdicts[0].why


def test_a_model_of_few_digits_is_refused_at_once(tmp_path):
    lab = SimpleNamespace(model=SimpleNamespace(dtype=torch.bfloat16))
    with pytest.raises(NotInModel, match="float32, got torch.bfloat16: give --dtype float32"):
        bend(lab, {}, tmp_path / "run")
