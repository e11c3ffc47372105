"""``subspace``: the propositions by other ways to compute them, and what the page says of them."""

from __future__ import annotations

import math

import pytest
import torch

from swkernels.studies.recipes import lora
from swkernels.studies.recipes.subspace import SUBSPACE, run_of
from swkernels.studies.runs import propositions
from tests.studies import tiny
from tests.studies.by_hand import made as made_of
from tests.studies.by_hand import verdicts

MEAN = "The mean of |dW| is alpha sigma_B sigma_A sqrt(2 / pi) (equation 10)."
VARIANCE = "The variance of dW is alpha^2 sigma_B^2 sigma_A^2 / r (equation 11)."
BATCH = "Averaging over a batch preserves the suppression by 1/M."
BOUND = "No entry of dW exceeds its bound (Proposition 3)."


@pytest.fixture(scope="module")
def studied(planted, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("subspace")
    found = tiny.run(["subspace"], planted, data, output)
    return found(run_of(tiny.PLAN)), (output / "README.md").read_text()


def test_coverage_of_a_line():
    """d = 1: the captured share is a beta variable of k / 2 and (N - k) / 2."""
    N, k = 12, 3
    found = propositions.coverage(N, 1, k, 40_000, seed=1)
    a, b = k / 2, (N - k) / 2
    deviation = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))
    assert found["expected"] == a / (a + b)
    assert found["mean"] == pytest.approx(found["expected"], abs=4 * found["error"])
    assert found["error"] == pytest.approx(deviation / 200, rel=0.03)
    assert found["deviation_expected"] == pytest.approx(deviation)
    assert found["deviation"] == pytest.approx(deviation, rel=0.03)


def test_coverage_by_projections():
    """|P_V P_S|^2 by the projections themselves, of bases by SVD; the spread for d and k > 1."""
    N, d, k, trials = 10, 3, 4, 4000
    normal = torch.randn(trials, N, d, dtype=torch.float64)
    basis = torch.linalg.svd(normal, full_matrices=False).U
    onto = basis @ basis.mT
    captured = onto[:, :k].square().sum((1, 2)) / d
    found = propositions.coverage(N, d, k, trials, seed=2)
    assert found["mean"] == pytest.approx(float(captured.mean()), abs=6 * found["error"])
    for deviation in (found["deviation"], float(captured.std())):
        assert deviation == pytest.approx(found["deviation_expected"], rel=0.06)
    assert found == propositions.coverage(N, d, k, trials, seed=2)
    assert found["mean"] != propositions.coverage(N, d, k, trials, seed=3)["mean"]
    assert propositions.coverage(N, d, N, 5, seed=2)["mean"] == pytest.approx(1)


@pytest.mark.parametrize("m, n, r", [(5, 7, 1), (6, 4, 3), (4, 4, 4)])
def test_dimension(m, n, r):
    found = propositions.dimension(m, n, r, seed=0)
    assert found["rank"] == found["expected"] == m * n - (m - r) * (n - r)  # codimension
    assert found["parameters"] == r * m + r * n
    assert found["smallest"] > 1e-4
    assert found["next"] is None or found["next"] < 1e-13


def test_the_jacobian_is_that_of_the_product():
    """Its singular values by autograd's Jacobian of (B, A) -> B A."""
    m, n, r = 4, 3, 2
    generator = torch.Generator().manual_seed(5)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    parts = torch.autograd.functional.jacobian(torch.matmul, (B, A))
    values = torch.linalg.svdvals(torch.cat([part.reshape(m * n, -1) for part in parts], 1))
    found = propositions.dimension(m, n, r, seed=5)
    rank = found["rank"]
    assert found["smallest"] == pytest.approx(float(values[rank - 1] / values[0]))


def test_entry_bound():
    """For r = 1 the bound is reached everywhere; for two factors it is a cosine's magnitude."""
    found = propositions.entry_bound(4, 5, 1, 16, seed=0)
    assert found["largest"] == pytest.approx(1) and found["mean"] == pytest.approx(1)
    found = propositions.entry_bound(300, 300, 2, 16, seed=0)
    assert found["largest"] <= 1 + 1e-12
    assert found["mean"] == pytest.approx(2 / math.pi, rel=0.05)  # mean of |cos|


@pytest.mark.parametrize(
    "r, mean",
    [(1, 2 / math.pi), (2, 1.0), (3, 4 / math.pi), (4, 1.5)],  # E|sum of r products|
)
def test_size(r, mean):
    alpha, sigma_B, sigma_A = 16, 0.3, 0.05
    unit = alpha / r * sigma_B * sigma_A
    found = propositions.size(r, alpha, sigma_B, sigma_A, 100_000, seed=r)
    assert found["exact"] == pytest.approx(unit * mean)
    assert found["mean"] == pytest.approx(unit * mean, abs=4 * found["mean_error"])
    assert found["variance_expected"] == pytest.approx(unit**2 * r)
    assert found["variance"] == pytest.approx(unit**2 * r, abs=4 * found["variance_error"])
    assert found["published"] == pytest.approx(unit * r * math.sqrt(2 / math.pi))
    assert found["approximate"] == pytest.approx(unit * math.sqrt(2 * r / math.pi))
    assert found["mean_error"] < 0.01 * found["mean"]


def test_size_of_independent_draws():
    """The mean of |dW| at r = 8 by matrices, as a LoRA has them."""
    torch.manual_seed(0)
    sizes = [
        (2.0 * torch.randn(50, 8).mul(0.3) @ torch.randn(8, 50).mul(0.05)).abs().mean()
        for _ in range(200)
    ]
    found = propositions.size(8, 16, 0.3, 0.05, 200_000, seed=0)
    assert found["mean"] == pytest.approx(float(torch.stack(sizes).mean()), rel=0.01)
    assert found["published"] / found["mean"] == pytest.approx(2.92, abs=0.03)


def test_newton():
    """One input: 1/M exactly. Several: by the normal equations' gradient and curvature."""
    assert propositions.newton_ratios(50.0, 6, 1, 20, seed=0) == pytest.approx([1] * 20, rel=1e-9)
    generator = torch.Generator().manual_seed(3)
    row, x, target = propositions._problem(50.0, 6, 4, generator)
    assert x[:, -1].abs().div(x[:, 0].abs()).tolist() == pytest.approx([50.0] * 4)
    error = x @ row - target
    steps = ((error[:, None] * x).mean(0) / x.square().mean(0)).abs()
    (ratio,) = propositions.newton_ratios(50.0, 6, 4, 1, seed=3)
    assert ratio == pytest.approx(50 * float(steps[-1] / steps[0]), rel=1e-9)


def test_adam():
    assert propositions.adam_ratio(50.0, 6, 1, seed=0) == pytest.approx(1, abs=1e-6)
    assert propositions.adam_ratio(50.0, 6, 20, seed=0) == pytest.approx(1, abs=1e-3)


def test_figures_and_page(studied):
    figures, page = studied
    assert figures["modules"] == [[32, 32, 8]]  # q, k, v, o of two layers
    embedding, attention, mlp, norms = 17 * 32, 4 * 32 * 32, 3 * 32 * 48, 2 * 32
    vocabulary = figures["parameters"] - 2 * (attention + mlp + norms) - 32
    assert vocabulary % 32 == 0 and vocabulary >= embedding
    section = page.split("## subspace")[1].split("\n## ")[0]
    assert "| published, k = 8,192: 2048 x 2048 | 64 | 32,704 | 32,768 | 4 |" in section
    assert "| all | 8 | 3,584 |" in section  # 8 modules of 8 (32 + 32 - 8)
    (sized,) = (row for row in figures["sizes"] if row["r"] == 8)
    assert f"r = 8: {sized['published'] / sized['mean']:.3g}" in section
    assert "Erratum to equation 10" in section
    listed = verdicts(SUBSPACE.section(made_of({run_of(tiny.PLAN): figures})))
    assert listed.pop(MEAN) is False
    assert listed.pop(BATCH) is False
    assert all(listed.values()) and len(listed) == 6
    assert "after 1 step; " in section and "after 100 steps;" in section


def changed(figures: dict, name: str, **change) -> dict[str, bool | None]:
    """Verdicts with one row of ``name`` changed."""
    rows = [figures[name][0] | change, *figures[name][1:]]
    return verdicts(SUBSPACE.section(made_of({run_of(tiny.PLAN): figures | {name: rows}})))


@pytest.mark.parametrize(
    "name, change, claim",
    [
        ("coverage", {"mean": 0.5}, "k coordinates capture k / N of a random subspace on average "
         "(Proposition 1)."),
        ("dimensions", {"rank": 1}, "Matrices of rank r form a manifold of dimension r (m + n - r) "
         "(Proposition 2)."),
        ("bounds", {"largest": 1.1}, BOUND),
        ("sizes", {"variance": 1.0}, VARIANCE),
        ("newton", {"farthest": 0.1}, "A diagonal Newton step is 1/M as large at a super weight "
         "(Theorem 1), for one input."),
        ("adam", {"ratio": 1.5}, "Adam's steps are about equal at all positions, for one input."),
    ],
)  # fmt: skip
def test_what_does_not_hold(studied, name, change, claim):
    assert changed(studied[0], name, **change)[claim] is False


@pytest.mark.parametrize(
    "low, high, holds",
    [(0.6, 1.9, True), (0.17, 11.0, False), (0.6, 2.5, False), (0.4, 1.5, False)],
)
def test_what_a_batch_preserves(studied, low, high, holds):
    """A range that is far from 1, though below M, is not 1/M."""
    figures = studied[0]
    one, many = figures["newton"]
    rows = [one, many | {"low": low, "median": 1.35, "high": high}]
    section = SUBSPACE.section(made_of({run_of(tiny.PLAN): figures | {"newton": rows}}))
    (verdict,) = (verdict for verdict in section.verdicts if verdict.claim == BATCH)
    assert verdict.holds is holds
    assert f"1.4 in the median, {low:.2g} to {high:.2g} in 90 % of the problems" in verdict.why
    assert "does not depend on M" in verdict.why


def test_the_scatter_over_a_batch_does_not_depend_on_how_far_the_channel_stands_out():
    few, many = (propositions.newton_ratios(M, 6, 16, 50, seed=4) for M in (10.0, 1000.0))
    assert few == pytest.approx(many, rel=1e-6)
    assert min(few) < 0.5 and max(few) > 2


def test_the_published_mean_would_hold(studied):
    figures = studied[0]
    rows = [row | {"mean": row["published"]} for row in figures["sizes"]]
    section = SUBSPACE.section(made_of({run_of(tiny.PLAN): figures | {"sizes": rows}}))
    assert verdicts(section)[MEAN] is True
    (why,) = (verdict.why for verdict in section.verdicts if verdict.claim == MEAN)
    assert "does not agree" in why


def test_trained_factors(studied):
    """A LoRA that was trained is compared, where its record is there."""
    update = {
        "modules": ["a", "b"], "entries": [100, 300], "std_B": [0.1, 0.2], "std_A": [0.5, 0.5],
        "mean": [0.2, 0.6], "bound": [0.8, 0.9], "tightness": [0.2, 0.4],
    }  # fmt: skip
    made = {run_of(tiny.PLAN): studied[0], lora.run_of(tiny.PLAN): {"update": update}}
    section = SUBSPACE.section(made_of(made))
    (table,) = (part for part in section.parts if "trained factors" in part.columns)
    published = 16 * 0.5 * math.sqrt(2 / math.pi) * (0.1 + 3 * 0.2) / 4
    name, mean, exact, approximate, there = table.rows[0]
    assert name == "r = 8" and mean == pytest.approx(0.5)
    assert there == pytest.approx(published)
    assert approximate == pytest.approx(published / math.sqrt(8))
    assert exact == pytest.approx(2 * 35 / 16 * 0.5 * (0.1 + 3 * 0.2) / 4)  # E|S| = 35 / 16
    assert verdicts(section)[BOUND] is True
    update["bound"] = [0.8, 1.01]
    assert verdicts(SUBSPACE.section(made_of(made)))[BOUND] is False
