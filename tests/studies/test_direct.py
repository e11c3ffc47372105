"""``direct`` at a tiny size: its figures by a plain loop of PyTorch, and its page."""

from __future__ import annotations

from swkernels.studies.recipes.direct import run_of
from tests.studies import tiny


def test_page_and_figures(planted, data, tmp_path):
    found = tiny.run(["direct"], planted, data, tmp_path / "out")
    figures = found(run_of(tiny.PLAN, 4))
    print(figures)
    print((tmp_path / "out" / "README.md").read_text())
    assert figures["parameters"] == 4
