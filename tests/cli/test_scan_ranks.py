"""``torchrun -m swkernels scan`` writes the report that ``swkernels scan`` writes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from swkernels.cli import main
from swkernels.detect.ranks import Ranks
from tests.cli.checkpoints import TEXT, make_model, plant, save
from tests.processes import ROOT

SMALL = ["--samples", "3", "--length", "16", "--eval-tokens", "64", "--device", "cpu"]


def torchrun(*arguments):
    """Run ``swkernels`` as two processes that torchrun starts."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "swkernels"]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_model()
    plant(model)
    return str(save(model, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return str(path)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_the_report_is_that_of_one_process_and_one_process_speaks(
    checkpoint, text, tmp_path, one_thread, capfd
):
    options = [*SMALL, "--text", text, "-o"]
    assert main(["scan", checkpoint, *options, str(tmp_path / "one")]) == 0
    printed = capfd.readouterr().out
    ended = torchrun("scan", checkpoint, *options, tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert "swkernels:" not in ended.stderr
    assert ended.stdout == printed.replace(str(tmp_path / "one"), str(tmp_path / "two"))

    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert all(report.pop("created") for report in reports)
    assert reports[0] == reports[1] and reports[0]["candidates"]
    for name in ("spikes.png", "report.html"):
        assert (tmp_path / "two" / name).stat().st_size > 1000


class OneOf(Ranks):
    """A rank, without others, that keeps what it would tell them."""

    def __init__(self, rank: int):
        super().__init__(rank)
        self.told: list[str] = []

    def _tell(self, message: str) -> None:
        self.told.append(message)


@pytest.mark.parametrize(
    ("model", "output", "told"),
    [
        ("tiny", "file/out", "writing the report: InvalidInput: cannot write into"),
        ("none", "out", "loading the model: InvalidInput: "),
    ],
)
def test_what_fails_before_and_after_the_scan_is_told(
    checkpoint, tmp_path, capfd, monkeypatch, model, output, told
):
    rank = OneOf(0)
    monkeypatch.setattr(Ranks, "from_environment", lambda timeout: rank)
    (tmp_path / "file").write_text("")
    path = checkpoint if model == "tiny" else str(tmp_path / model)
    assert main(["scan", path, *SMALL, "--no-verify", "-o", str(tmp_path / output)]) == 2
    assert rank.told[0].startswith(told)
    assert capfd.readouterr().err.count("\n") == 1


def test_other_ranks_neither_speak_nor_write(checkpoint, tmp_path, capfd, monkeypatch, text):
    monkeypatch.setattr(Ranks, "from_environment", lambda timeout: OneOf(1))
    out = tmp_path / "out"
    assert main(["scan", checkpoint, *SMALL, "--no-verify", "--text", text, "-o", str(out)]) == 0
    assert capfd.readouterr() == ("", "")
    assert not list(out.iterdir())  # made for the state, as on a machine without rank 0


@pytest.mark.parametrize("given", ["0", "-1", "nan"])
def test_a_timeout_that_is_none(checkpoint, capfd, given):
    assert main(["scan", checkpoint, "--rank-timeout", given]) == 2
    assert "the timeout of ranks must be some seconds" in capfd.readouterr().err


def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swkernels", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("swkernels", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("swkernels ")
