"""The figures of docs/scale/README.md, worked out again from the formulas beside them."""

from __future__ import annotations

import ast
import operator
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "scale" / "README.md"
ROW = re.compile(r"\| .* \| `(\w+) = (.+)` \| ([\d.,]+)(?: (\S+))? \|")
UNITS = {
    "%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "GB/s": 1e9, "million": 1e6,
    "billion": 1e9, "TFLOP": 1e12, "TFLOP/s": 1e12, "s": 1, "min": 60, "h": 3600, "GPU-h": 3600,
    "tokens": 1, "samples": 1, "times": 1, "GPUs": 1, "attempts": 1, "checkpoints": 1, None: 1,
}  # fmt: skip
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def work_out(node: ast.expr, known: dict[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return known[name]
        case ast.BinOp(left, kind, right):
            return OPERATIONS[type(kind)](work_out(left, known), work_out(right, known))
        case ast.Call(func=ast.Name(id="max"), args=args):
            return max(work_out(arg, known) for arg in args)
    raise AssertionError(f"a formula holds {ast.dump(node)}")


def figures() -> dict[str, tuple[float, float]]:
    """name -> (as worked out, as printed), of every row with a formula."""
    known: dict[str, float] = {}
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not (line.startswith("|") and "`" in line):
            continue
        match = ROW.fullmatch(line)
        assert match, f"no row of a figure: {line}"
        name, formula, printed, unit = match.groups()
        assert name not in known, f"{name} stands there twice"
        known[name] = work_out(ast.parse(formula, mode="eval").body, known)
        found[name] = known[name], float(printed.replace(",", "")) * UNITS[unit]
    return found


def test_every_figure_follows_from_its_formula():
    found = figures()
    assert len(found) > 90
    wrong = {
        name: (exact, printed)
        for name, (exact, printed) in found.items()
        if abs(exact - printed) > 0.00501 * abs(exact)  # three digits are printed
    }
    assert not wrong


def test_the_models_have_the_size_of_their_names():
    found = figures()
    assert 404e9 < found["P"][0] < 407e9
    assert 234e9 < found["Q"][0] < 236e9
    assert 21e9 < found["Q_active"][0] < 23e9


def test_what_the_text_says_of_the_figures():
    exact = {name: value for name, (value, _) in figures().items()}
    assert exact["t_spill"] > exact["c1000"] > exact["t_pcie"]
    assert exact["h1000"] < 40e9 and exact["h8"] < exact["budget"] < exact["h100"] < 4e9
    assert exact["L_embed"] < exact["L"]
    assert exact["start"] + exact["load"] > exact["scan"] / 2
    assert exact["wall"] > exact["least"]


def test_the_assumptions_are_the_defaults():
    from swkernels.detect.scan import ScanConfig
    from swkernels.detect.streamed import BUDGET
    from swkernels.guard import digests

    exact = {name: value for name, (value, _) in figures().items()}
    assert (exact["S"], exact["E"]) == (ScanConfig().length, ScanConfig().eval_tokens)
    assert exact["budget"] == BUDGET
    per_mib = digests.SIZES[digests.HASH] * 2**20 / digests.CHUNK
    assert exact["digests"] == exact["W7"] / 2**20 * per_mib
