"""The file of runs: whole lines stay, a cut-off one is made again, a changed one is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random

import pytest

from swkernels.errors import InvalidInput
from swkernels.studies.book import RUNS, Book
from swkernels.studies.run import Run
from tests.studies import tiny

FIGURES = {"loss": [1.5, math.inf, -math.inf], "none": None, "name": "§ | x", "tiny": 1e-300}
ABOUT = tiny.ABOUT


def runs(count: int) -> list[Run]:
    return [Run("train", {"seed": n}) for n in range(count)]


@pytest.fixture
def book(tmp_path):
    found = Book(tmp_path / RUNS)
    for run in runs(3):
        found.add(run, ABOUT, FIGURES | {"seed": run.config["seed"]})
    return found


def test_what_is_written_is_read(book):
    again = Book(book.path, ABOUT["identity"])
    assert len(again) == 3 and [r["config"]["seed"] for r in again] == [0, 1, 2]
    for run in runs(3):
        assert run in again
        assert again.figures(run) == again.figures(run.key) == book.figures(run)
        assert again.figures(run) == FIGURES | {"seed": run.config["seed"]}
        assert again.record(run)["seconds"] == ABOUT["seconds"]
    assert Run("train", {"seed": 3}) not in again
    for line in book.path.read_text().splitlines():  # plain JSON for everyone
        assert json.loads(line, parse_constant=pytest.fail)["schema"] == "swkernels.study-run/1"


def test_no_number_stays_one(tmp_path):
    book = Book(tmp_path / RUNS)
    (run,) = runs(1)
    book.add(run, ABOUT, {"value": math.nan})
    assert math.isnan(Book(book.path).figures(run)["value"])


def test_a_line_that_was_cut_off_is_made_again(book):
    whole = book.path.read_bytes()
    *_, last = runs(3)
    for cut in (1, 2, 30, len(whole.splitlines()[-1])):
        book.path.write_bytes(whole[:-cut])
        again = Book(book.path)
        assert len(again) == 2 and last not in again
        assert book.path.read_bytes() == whole[:-cut]  # reading changes nothing
        again.add(last, ABOUT, FIGURES | {"seed": 2})
        assert book.path.read_bytes() == whole


def test_a_disk_that_fills_up_loses_no_line(book, monkeypatch):
    whole = book.path.read_bytes()
    more = Run("train", {"seed": 3})

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InvalidInput, match=f"cannot write {book.path}: No space left"):
            book.add(more, ABOUT, FIGURES)
    assert more not in book
    assert book.path.read_bytes().startswith(whole)
    book.add(more, ABOUT, FIGURES)
    assert len(Book(book.path)) == 4 and len(book.path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ('"seed":1}', '"seed":7}', "line 2 was changed after it was written"),
        ('1e-300', '2e-300', "line 1 was changed"),
        ('"kind"', '"kinx"', "line 1 was changed"),
        ('{"schema"', '"schema"', "line 1 was changed"),
    ],
)  # fmt: skip
def test_a_changed_line_is_refused(book, was, now, words):
    text = book.path.read_text()
    assert was in text
    book.path.write_text(text.replace(was, now, 1) if "seed" not in was else text.replace(was, now))
    with pytest.raises(InvalidInput, match=words):
        Book(book.path)


def test_a_line_without_a_checksum_is_checked_as_a_document(book):
    first, *_ = book.path.read_text().splitlines()
    record = json.loads(first)
    del record["sum"]
    book.path.write_text(json.dumps(record) + "\n")
    assert len(Book(book.path)) == 1
    for field in ("run", "identity", "seconds", "figures"):
        less = {name: value for name, value in record.items() if name != field}
        book.path.write_text(json.dumps(less) + "\n")
        with pytest.raises(InvalidInput, match=f"line 1 is damaged: expected the field {field}"):
            Book(book.path)


def test_another_model_or_dtype_is_refused(book):
    Book(book.path, ABOUT["identity"] | {"arc/train": "not there before"})
    with pytest.raises(InvalidInput, match=r"line 1: a run with another dtype \(float32, now bf"):
        Book(book.path, ABOUT["identity"] | {"dtype": "bfloat16"})


def test_no_damage_changes_a_figure(book):
    """300 files with a byte or a piece of them changed: refused, or nothing that counts differs."""
    whole = book.path.read_bytes()
    intact = {record["run"]: record for record in book}
    draw = random.Random(3)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            at = draw.randrange(len(data))
            size = draw.choice((0, 1, 1, 20))
            data[at : at + size] = draw.randbytes(draw.choice((0, 1, 1, 2)))
        book.path.write_bytes(data)
        try:
            found = Book(book.path)
        except InvalidInput as error:
            assert "\n" not in str(error) and str(book.path) in str(error)
            refused += 1
            continue
        for record in found:
            for name in ("kind", "config", "figures", "identity", "seconds"):
                assert record[name] == intact[record["run"]][name]
    assert refused > 250


def test_more_than_is_read_is_refused(book, monkeypatch):
    from dataclasses import replace

    from swkernels.studies import book as module

    monkeypatch.setattr(module, "DOCUMENT", replace(module.DOCUMENT, size=100))
    with pytest.raises(InvalidInput, match="more than 100 bytes"):
        Book(book.path)
