"""The records of evidence and the page that is made of them."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import evidence
from benchmarks.evidence import PARTS, Record
from benchmarks.models import evidence as study
from swkernels.errors import InvalidInput

ABOUT = {"time": "2026-11-26T06:00:00+00:00", "commit": "abc", "modified": False}


def record(part="rank", rows=None, lines=()):
    rows = [{"top": 10, "down": 0.2}] if rows is None else rows
    return Record(part, "a model", "some settings.", rows, list(lines), ABOUT)


def test_the_page_of_this_repository_is_that_of_its_records():
    found = evidence.read_all()
    assert [one.part for one in found] == list(PARTS) == list(study.PARTS)
    assert evidence.page(found) == evidence.PAGE.read_text(encoding="utf-8")


def test_a_record_comes_back_as_it_was(tmp_path):
    written = record(rows=[{"a": 1, "b": 0.5, "c": None, "d": "text"}], lines=["A sentence."])
    assert written.write(tmp_path) == tmp_path / "rank.json"
    assert evidence.read_all(tmp_path) == [written]


def test_what_is_not_finite_is_words(tmp_path):
    record(rows=[{"ratio": math.inf, "error": math.nan}]).write(tmp_path)
    [found] = evidence.read_all(tmp_path)
    assert found.rows == [{"ratio": "Infinity", "error": "NaN"}]
    assert "| Infinity | NaN |" in evidence.page([found], tmp_path)


def test_the_table(tmp_path):
    rows = [{"in_all": 1234567, "x": 1.37e6}, {"in_all": 3, "x": 0.123456, "only": "here"}]
    page = evidence.page([record("scale", rows, ["Below."])], tmp_path)
    title, words = PARTS["scale"]
    assert f"## {title}\n\n{words}\n\na model. some settings." in page
    assert "| in all | x | only |" in page and "| 1,234,567 | 1.37e+06 |  |" in page
    assert "| 3 | 0.1235 | here |\n\nBelow.\n\nMeasured 2026-11-26, commit `abc`." in page


@pytest.mark.parametrize("change", [{"schema": "other"}, {"part": "scale"}, {"more": 1}])
def test_a_foreign_file_is_named(tmp_path, change):
    path = record().write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidInput, match="rank.json: no record of swkernels.evidence/1"):
        evidence.read_all(tmp_path)


def test_a_part_that_is_there_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def part(given):
        asked.append(given)
        return study.Part("some settings.", [{"top": 10}])

    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "PARTS", {"rank": part})
    monkeypatch.setattr(Record.write, "__defaults__", (tmp_path,))
    for _ in range(2):
        study.run("rank", study.Study(tmp_path))
    assert len(asked) == 1
    with pytest.raises(InvalidInput, match="no part 'other': expected rank"):
        study.run("other", study.Study(tmp_path))
