"""The pages of the studies that are committed are those of their runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swkernels.studies.book import RUNS
from swkernels.studies.page import FIGURES, PAGE
from swkernels.studies.study import page_again

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.mark.parametrize("folder", [STUDIES, STUDIES / "long"], ids=lambda folder: folder.name)
def test_the_page_is_that_of_the_runs(folder, tmp_path):
    shutil.copy(folder / RUNS, tmp_path)
    assert page_again(tmp_path).read_text() == (folder / PAGE).read_text()
    made, kept = (
        sorted(path.name for path in (f / FIGURES).iterdir()) for f in (tmp_path, folder)
    )
    assert made == kept
