"""``swkernels scan`` that was killed goes on with the same command, and reports the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from swkernels.cli import main
from tests.processes import ROOT

SMALL = ["--samples", "4", "--length", "24", "--eval-tokens", "48", "--device", "cpu"]
SMALL += ["--max-candidates", "3", "--save-every", "0"]
FILES = ["report.html", "report.json", "spikes.png"]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "swkernels", "scan", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def report(folder) -> dict:
    found = json.loads((folder / "report.json").read_text())
    assert found.pop("created")
    return found


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_and_continued(planted, short_text, tmp_path, one_thread, capfd):
    options = [str(planted), *SMALL, "--text", str(short_text), "-o"]
    out, state = tmp_path / "out", tmp_path / "out" / "scan.state"
    killed = start(*options, out)
    while not state.exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir() if path.name[0] != "."] == ["scan.state"]

    assert main(["scan", *options, str(out)]) == 0
    printed = capfd.readouterr()
    assert "continuing at sample " in printed.out and printed.err == ""
    assert main(["scan", *options, str(tmp_path / "whole")]) == 0
    assert report(out) == report(tmp_path / "whole")
    kept = [path.name for path in out.iterdir() if path.name[0] != "."]
    assert sorted(kept) == FILES and sorted(os.listdir(tmp_path / "whole")) == FILES


def test_a_state_of_another_scan_is_refused_and_fresh_starts_anew(
    planted, short_text, tmp_path, capfd, monkeypatch
):
    from swkernels.detect.report import ScanReport

    path = tmp_path / "my.state"
    fixed = [str(planted), *SMALL, "--text", str(short_text), "--state", str(path)]
    output = ["-o", str(tmp_path / "out")]

    def fail(report, where):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ScanReport, "save", fail)
        assert main(["scan", *fixed, *output]) != 0
    assert path.exists()
    capfd.readouterr()
    assert main(["scan", *fixed, "--seed", "7"]) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert f"the state {path} is of another scan: its setting seed is 42, of this scan 7" in line
    assert main(["scan", *fixed, "--seed", "7", "--fresh"]) == 0
    assert "continuing" not in capfd.readouterr().out and not path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fresh"], "--fresh needs a place for the state"),
        (["--save-every", "5"], "--save-every needs a place for the state"),
        (["--state", "s", "--save-every", "-1"], "between two states must be at least 0"),
    ],
)
def test_options_that_do_not_go_together(planted, capfd, options, message):
    assert main(["scan", str(planted), *options]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
