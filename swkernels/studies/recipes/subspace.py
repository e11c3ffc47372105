"""Propositions 1 to 4 and Theorem 1, checked numerically (appendices H and I.1)."""

from __future__ import annotations

from statistics import NormalDist, mean

from ..recipe import Found, Plan, Recipe, Section, Table, Verdict
from ..run import Run
from ..runs.propositions import coverage_deviation, mean_sizes
from ..runs.subspace import M
from . import lora
from .settings import ALPHA, RANK

INTRINSIC = (200, 1600)  # d90 of RoBERTa, as the paper cites it
# OLMo-1B: parameters; 64 attention projections; k / N for k = 8,192; dimension of all manifolds,
# and over 8,192 the dimension of one and of all.
OLMO_1B = {
    "N": 1.28e9,
    "shape": (2048, 2048, 64),
    "share": 6.4e-6,
    "total": 2_093_056,
    "over_k": (4, 256),
}
ROUNDING = 1e-9
SAME = 2  # within such a factor a ratio counts as the one foretold
CHANCE = 1e-4  # that a proposition that holds is said not to


def run_of(plan: Plan) -> Run:
    config = {"trials": plan.budget.trials, "seed": plan.seed, "rank": RANK, "alpha": ALPHA}
    return Run("subspace", config)


def runs(plan: Plan) -> list[Run]:
    return [run_of(plan)]


def section(found: Found) -> Section:
    plan = found.plan
    settings = (
        f"Random draws in float64, {plan.budget.trials} of each subspace and problem; the sizes of "
        "this model."
    )
    figures = found(run_of(plan))
    if figures is None:
        return Section(settings)
    trained = found(lora.run_of(plan))
    update = trained and trained["update"]
    return Section(
        settings,
        [
            _coverage(figures["coverage"]),
            _shares(figures["parameters"], plan.budget.counts),
            _dimensions(figures["dimensions"]),
            _manifolds(figures["modules"], max(plan.budget.counts)),
            _bounds(figures["bounds"], update),
            _sizes(figures["sizes"]),
            *([_trained(update)] if update else []),
            _updates(figures),
        ],
        [
            _first(figures["coverage"]),
            _second(figures, max(plan.budget.counts)),
            _third(figures["bounds"], update),
            *_fourth(figures["sizes"]),
            *_theorem(figures),
        ],
        NOTES,
    )


NOTES = [
    "Proposition 1 is of subspaces that are drawn uniformly, whatever the weights are. The space "
    "in which a model is fine-tuned need not be such a one: where it leans towards some "
    "coordinates, k / N says nothing of those.",
    "Single draws lie within a factor of 1 ± sqrt(2 / (k d)) of k / N about, which the paper does "
    "not state: with k and d in the thousands every subspace is close to the mean.",
    "**Erratum to equation 10**: `alpha sigma_B sigma_A sqrt(2 / pi)` is too large by sqrt(r). "
    "The paper's own proof has E|S| = `sqrt(2 r / pi) sigma_B sigma_A`, which scaled by alpha / r "
    "gives `alpha sigma_B sigma_A sqrt(2 / (pi r))`. That is an approximation for many terms; the "
    "exact mean is `alpha / r sigma_B sigma_A 2 / sqrt(pi) Gamma((r + 1) / 2) / Gamma(r / 2)`, "
    "smaller by about 1 / (4 r). Equation 12 inherits the error: its ± is of the size of the mean, "
    "not sqrt(r) times smaller.",
    "Theorem 1 is of one input. The paper says that averaging over a batch preserves the "
    "suppression; the mean gradient is a sum with signs, however, so over 16 inputs with the same "
    "M the ratio is no longer 1/M.",
    "Trained factors come from the study `lora`, where it has been run.",
]


def _coverage(rows: list[dict]) -> Table:
    columns = ["N", "d", "k", "captured, mean", "standard error", "k / N (Proposition 1)"]
    columns += ["deviation of a draw", "in theory"]
    names = ("N", "d", "k", "mean", "error", "expected", "deviation", "deviation_expected")
    caption = "Proposition 1: what k coordinates capture of random d-dimensional subspaces."
    return Table(columns, [[row[name] for name in names] for row in rows], caption)


def _shares(N: int, counts: tuple[int, ...]) -> Table:
    rows = [
        [f"{k:,}", k / N, *(coverage_deviation(N, d, k) / (k / N) for d in INTRINSIC)]
        for k in counts
    ]
    there = OLMO_1B["N"]
    own = 8192 / there
    rows.append(["8,192 of OLMo-1B", own, *(coverage_deviation(there, d, 8192) / own
                                             for d in INTRINSIC)])  # fmt: skip
    columns = ["k", "k / N", *(f"relative deviation, d = {d:,}" for d in INTRINSIC)]
    caption = f"This model has N = {N:,} parameters; published for OLMo-1B: {OLMO_1B['share']:g}."
    return Table(columns, rows, caption)


def _dimensions(rows: list[dict]) -> Table:
    names = ("m", "n", "r", "rank", "expected", "parameters", "smallest", "next")
    columns = ["m", "n", "r", "rank of the Jacobian", "r (m + n - r)", "r (m + n)"]
    columns += ["smallest singular value", "next"]
    caption = (
        "Proposition 2: directions in which B A moves, at a random point; singular values over the "
        "largest. Shapes of this model's attention, reduced."
    )
    return Table(columns, [[row[name] for name in names] for row in rows], caption)


def _manifolds(modules: list[list[int]], most: int) -> Table:
    rows, total = [], 0
    for m, n, count in modules:
        size, parameters = dimension_of(m, n), RANK * (m + n)
        total += count * size
        rows.append([f"{m} x {n}", count, size, parameters, size / most])
    rows.append(["all", sum(count for *_, count in modules), total, None, total / most])
    (m, n, count), (one, every) = OLMO_1B["shape"], OLMO_1B["over_k"]
    rows.append(
        [f"published, k = 8,192: {m} x {n}", count, dimension_of(m, n), RANK * (m + n), one]
    )
    rows.append(["published, k = 8,192: all", count, OLMO_1B["total"], None, every])
    columns = ["attention projections", "modules", "dimension", "parameters", f"over k = {most:,}"]
    return Table(columns, rows, f"The manifold of rank r = {RANK}, r (m + n - r).")


def dimension_of(m: int, n: int) -> int:
    """Of the matrices [m, n] of the rank that is trained (equation 6)."""
    r = min(RANK, m, n)
    return r * (m + n - r)


def _bounds(rows: list[dict], update: dict | None) -> Table:
    cells = [
        [f"Gaussian, {row['m']} x {row['n']}, r = {row['r']}", row["largest"], row["mean"]]
        for row in rows
    ]
    if update:
        count = len(update["modules"])
        largest = max(update["bound"])
        cells.append([f"trained, {count} modules", largest, mean(update["tightness"])])
    columns = ["factors", "largest |dW| / bound", "mean"]
    return Table(columns, cells, "Proposition 3: |dW_ij| over alpha / r |B_i| |A_j|.")


def _sizes(rows: list[dict]) -> Table:
    names = ("r", "mean", "mean_error", "exact", "approximate", "published")
    columns = ["r", "mean |dW|", "standard error", "exact", "sqrt(2 / (pi r)) form"]
    columns += ["published (10)", "published over mean", "variance", "its standard error", "(11)"]
    cells = [
        [
            *(row[name] for name in names),
            row["published"] / row["mean"],
            *(row[name] for name in ("variance", "variance_error", "variance_expected")),
        ]
        for row in rows
    ]
    return Table(
        columns, cells, f"Proposition 4, alpha = {ALPHA}: entries of dW of normal factors."
    )


def _trained(update: dict) -> Table:
    """Proposition 4 by the deviations of trained factors, over all their entries."""
    total = sum(update["entries"])
    means = {"mean": 0.0, "published": 0.0, "approximate": 0.0, "exact": 0.0}
    for n, entries in enumerate(update["entries"]):
        foretold = mean_sizes(RANK, ALPHA, update["std_B"][n], update["std_A"][n])
        for name, value in (foretold | {"mean": update["mean"][n]}).items():
            means[name] += value * entries / total
    columns = ["trained factors", "mean |dW|", "exact", "sqrt(2 / (pi r)) form", "published (10)"]
    cells = [means[name] for name in ("mean", "exact", "approximate", "published")]
    caption = "By the deviations of all entries of B and A; trained factors are not independent."
    return Table(columns, [[f"r = {RANK}", *cells]], caption)


def _updates(figures: dict) -> Table:
    rows = [
        [f"diagonal Newton, inputs: {one['tokens']}", one["low"], one["median"], one["high"]]
        for one in figures["newton"]
    ]
    caption = (
        f"Theorem 1: the step at the column with M = {M:g} over that of a typical one, times M."
    )
    return Table(["update", "5 %", "median", "95 %"], rows, caption)


def _first(rows: list[dict]) -> Verdict:
    likely = NormalDist().inv_cdf(1 - CHANCE / 2 / len(rows))
    off = [(row["mean"] - row["expected"]) / row["error"] for row in rows]
    why = "; ".join(
        f"N = {row['N']:,}: {row['mean']:.5f} ± {row['error']:.5f}, k / N = {row['expected']:.5f}"
        for row in rows
    )
    claim = "k coordinates capture k / N of a random subspace on average (Proposition 1)."
    return Verdict(claim, all(abs(one) < likely for one in off), f"{why}.")


def _second(figures: dict, most: int) -> Verdict:
    claim = "Matrices of rank r form a manifold of dimension r (m + n - r) (Proposition 2)."
    rows = figures["dimensions"]
    one, every = OLMO_1B["over_k"]
    sizes = [dimension_of(m, n) for m, n, _ in figures["modules"]]
    total = sum(size * count for size, (*_, count) in zip(sizes, figures["modules"]))
    why = "; ".join(
        f"{r['m']} x {r['n']}, r = {r['r']}: rank {r['rank']}, {r['expected']} expected"
        for r in rows
    )
    why += (
        f". In this model a projection has {min(sizes):,} to {max(sizes):,} dimensions, all "
        f"together {total:,}, {total / most:.3g} times k = {most:,} (published for "
        f"k = 8,192: one {one} times, all {every} times)"
    )
    return Verdict(claim, all(row["rank"] == row["expected"] for row in rows), f"{why}.")


def _third(rows: list[dict], update: dict | None) -> Verdict:
    largest = max(row["largest"] for row in rows)
    trained = max(update["bound"]) if update else 0.0
    why = f"at most {largest:.4g} of the bound with random factors"
    why += f", {trained:.4g} with trained ones (float32)." if update else "."
    holds = largest <= 1 + ROUNDING and trained <= 1 + 1e-5
    return Verdict("No entry of dW exceeds its bound (Proposition 3).", holds, why)


def _fourth(rows: list[dict]) -> list[Verdict]:
    likely = NormalDist().inv_cdf(1 - CHANCE / 2 / len(rows))

    def fits(value: str, expected: str) -> bool:
        return all(abs(r[value] - r[expected]) < likely * r[f"{value}_error"] for r in rows)

    ratios = "; ".join(f"r = {r['r']}: {r['published'] / r['mean']:.3g}" for r in rows)
    exact = max(abs(row["mean"] / row["exact"] - 1) for row in rows)
    spread = max(abs(row["variance"] / row["variance_expected"] - 1) for row in rows)
    return [
        Verdict(
            "The mean of |dW| is alpha sigma_B sigma_A sqrt(2 / pi) (equation 10).",
            fits("mean", "published"),
            f"it is too large by these factors: {ratios}; the exact mean, of the proof's own sum, "
            f"{'agrees' if fits('mean', 'exact') else 'does not agree'} (within {exact:.2%}).",
        ),
        Verdict(
            "The variance of dW is alpha^2 sigma_B^2 sigma_A^2 / r (equation 11).",
            fits("variance", "variance_expected"),
            f"within {spread:.2%} for every r.",
        ),
    ]


def _theorem(figures: dict) -> list[Verdict]:
    one, many = figures["newton"]
    adam = "; ".join(
        f"{row['ratio']:.6f} after {row['steps']} step{'s' * (row['steps'] != 1)}"
        for row in figures["adam"]
    )
    return [
        Verdict(
            "A diagonal Newton step is 1/M as large at a super weight (Theorem 1), for one input.",
            one["farthest"] < ROUNDING,
            f"the ratio times M is 1 within {one['farthest']:.1g}.",
        ),
        Verdict(
            "Averaging over a batch preserves the suppression by 1/M.",
            1 / SAME <= many["low"] and many["high"] <= SAME,
            f"over {many['tokens']} inputs the ratio times M = {M:g} is {many['median']:.2g} in "
            f"the median, {many['low']:.2g} to {many['high']:.2g} in 90 % of the problems, where "
            f"1/M would give 1 (it holds where these 90 % are within a factor of {SAME}). The "
            "ratio is of two sums with signs, which are drawn here; how far it scatters about "
            "1/M does not depend on M.",
        ),
        Verdict(
            "Adam's steps are about equal at all positions, for one input.",
            all(abs(row["ratio"] - 1) < 0.01 for row in figures["adam"]),
            f"the step at a super weight over a typical one: {adam}; so it moves the "
            "output M times as much.",
        ),
    ]


SUBSPACE = Recipe(
    "subspace",
    "Propositions 1 to 4 and Theorem 1",
    "Appendices H and I.1 of arXiv 2607.08733",
    "What the paper's theory says, checked by random draws, and its numbers for this model.",
    (),
    minutes=1,
    runs=runs,
    section=section,
)
