"""The page of the studies that is committed is that of its runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from swkernels.studies.book import RUNS
from swkernels.studies.page import FIGURES, PAGE
from swkernels.studies.study import page_again

FOLDER = Path(__file__).parents[2] / "benchmarks" / "studies"


def test_the_page_is_that_of_the_runs(tmp_path):
    shutil.copy(FOLDER / RUNS, tmp_path)
    assert page_again(tmp_path).read_text() == (FOLDER / PAGE).read_text()
    made, kept = (sorted(path.name for path in (f / FIGURES).iterdir()) for f in (tmp_path, FOLDER))
    assert made == kept
