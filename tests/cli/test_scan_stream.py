"""``swkernels scan --stream``: the report, the options, and a scan that goes on."""

from __future__ import annotations

import json

import pytest

from swkernels.cli import main
from swkernels.cli.inputs import parse_size
from swkernels.detect import stream_peaks
from swkernels.errors import InvalidInput

FIXED = ["--samples", "3", "--length", "20", "--eval-tokens", "40", "--device", "cpu"]


def report(folder) -> dict:
    found = json.loads((folder / "report.json").read_text())
    del found["created"], found["model"]
    return found


def scan(planted, short_text, folder, *options) -> int:
    return main(
        ["scan", str(planted), "--text", str(short_text), *FIXED, "-o", str(folder), *options]
    )


def test_the_report_is_that_of_a_scan_in_memory(planted, short_text, tmp_path, capfd):
    assert scan(planted, short_text, tmp_path / "memory") == 0
    options = ["--stream", "--budget", "0", "--spill", str(tmp_path)]
    assert scan(planted, short_text, tmp_path / "stream", *options) == 0
    assert report(tmp_path / "stream") == report(tmp_path / "memory")
    names = {file.name for file in (tmp_path / "stream").iterdir()}
    assert names == {"report.json", "report.html", "spikes.png"}


def test_a_scan_that_was_ended_goes_on(planted, short_text, tmp_path, capfd, monkeypatch):
    assert scan(planted, short_text, tmp_path / "whole", "--stream") == 0
    folder = tmp_path / "ended"
    done = stream_peaks.StreamedPeaks._part_done

    def ending(self, part, calls):
        done(self, part, calls)
        if "layers.0" in part:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream_peaks.StreamedPeaks, "_part_done", ending)
        assert scan(planted, short_text, folder, "--stream", "--save-every", "0") == 130
    assert [file.name for file in folder.iterdir()] == ["scan.state"]
    capfd.readouterr()
    assert scan(planted, short_text, folder, "--stream") == 0
    assert "continuing after layer 1 of 2" in capfd.readouterr().out
    assert report(folder) == report(tmp_path / "whole")
    assert not (folder / "scan.state").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1GB"], "--budget belongs to --stream"),
        (["--spill", "/tmp"], "--spill belongs to --stream"),
        (["--by-layers"], "--by-layers belongs to --stream"),
        (["--stream", "--budget", "much"], "expected a size such as"),
        (["--stream", "--spill", "/nowhere"], "no folder /nowhere"),
        (["--stream", "--device", "auto"], "one device"),
    ],
)
def test_options_that_do_not_go_together(planted, capfd, options, message):
    assert main(["scan", str(planted), *options]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500MB", 5 * 10**8), ("8gb", 8 * 10**9), ("1.5g", 15 * 10**8), ("4GiB", 4 << 30),
     ("2 TB", 2 * 10**12), ("10KiB", 10240)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "8 GB/s", "1,5GB"])
def test_what_is_no_size(text):
    with pytest.raises(InvalidInput, match="expected a size"):
        parse_size(text)
