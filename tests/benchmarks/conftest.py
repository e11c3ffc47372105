from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def small_record(tmp_path_factory):
    """The text of a record file with one small run, in which everything is right."""
    from benchmarks import run

    path = tmp_path_factory.mktemp("record") / "record.jsonl"
    command = ["--suite", "cpu", "--dry", "--op", "column_absmax", "-o", str(path)]
    assert run.main(command) == 0
    return path.read_text()
