"""``swkernels compare``: a thin caller of ``swkernels.evidence.compare``."""

from __future__ import annotations

import copy
import json

import pytest

from swkernels.cli import main
from swkernels.detect.report import ScanReport
from tests.cli.checkpoints import TEXT, files, make_model, plant, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and what ``swkernels scan`` says of it, in two folders."""
    folder = tmp_path_factory.mktemp("models")
    model = make_model(initializer_range=0.3)
    plant(model)
    save(model, folder / "tiny")
    (folder / "text.txt").write_text(TEXT * 10, encoding="utf-8")
    options = ["--text", folder / "text.txt", "--samples", 2, "--length", 48, "--eval-tokens", 96]
    options += ["-o", folder / "first", "--device", "cpu"]
    assert main(["scan", str(folder / "tiny"), *map(str, options)]) == 0
    data = copy.deepcopy(ScanReport.load(folder / "first" / "report.json").data)
    data["candidates"] = []
    (folder / "second").mkdir()
    ScanReport(data).save(folder / "second" / "report.json")
    return folder


def test_reports_side_by_side(folder, tmp_path, capfd):
    before = files(folder)
    capfd.readouterr()
    options = ["--names", "base, tuned", "--values-from", "-", "--values-from", folder / "tiny"]
    paths = [folder / "first", folder / "second" / "report.json"]
    assert main(["compare", *map(str, [*paths, *options, "-o", tmp_path / "out"])]) == 0
    assert files(folder) == before
    printed, error = capfd.readouterr()
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    [coordinate] = found["coordinates"]
    assert coordinate["fate"] == "fades" and (coordinate["row"], coordinate["column"]) == (5, 7)
    assert [s["value"] for s in coordinate["sightings"]] == [10.0, 10.0]
    assert [report["name"] for report in found["reports"]] == ["base", "tuned"]
    assert error == "" and found["summary"] in " ".join(printed.split())
    assert "base" in printed and "layer 1 [5, 7]" in printed
    assert str(tmp_path / "out" / "compare.png") in printed
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_without_output_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(folder)
    assert main(["compare", str(folder / "first"), str(folder / "second")]) == 0
    assert files(folder) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["first"], "two reports at least, got 1"),
        (["first", "nowhere.json"], "cannot read the report"),
        (["first", "text.txt"], "cannot read the report"),
        (["first", "tiny/config.json"], "expected a report of schema swkernels.scan/1"),
        (["first", "tiny"], "cannot read the report"),
        (["first", "second", "--names", "a"], "2 different names"),
        (["first", "second", "--values-from", "tiny"], "each of the 2 reports, got 1"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    folder, tmp_path, capfd, monkeypatch, arguments, words
):
    monkeypatch.chdir(folder)
    assert main(["compare", *arguments, "-o", str(tmp_path / "a")]) == 2
    printed, error = capfd.readouterr()
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())
