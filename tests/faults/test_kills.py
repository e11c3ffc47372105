"""SIGKILL at random moments of the work: what is found is whole, and starting again ends equal."""

from __future__ import annotations

import json
import random
import shutil
import signal

import pytest

from swkernels.detect.state import ScanState
from swkernels.detect.stream_state import StreamState
from swkernels.models.safetensors_header import load_header
from tests.cli.checkpoints import files

SCAN = (
    "--samples",
    2,
    "--max-candidates",
    2,
    "--length",
    32,
    "--eval-tokens",
    64,
    "--device",
    "cpu",
)


class Scan:
    """A scan that goes on from its state; its report but for the time when it was made."""

    schema = ScanState.SCHEMA

    def __init__(self, intact):
        self._fixed = "scan", intact / "model", *SCAN, "--text", intact / "text.txt"

    def run(self, server, place, **kill):
        return server.run(*self._fixed, "-o", place / "out", "--save-every", 0.1, **kill)

    def result(self, place):
        report = json.loads((place / "out" / "report.json").read_text())
        assert report.pop("created")
        return report

    def check_left(self, place, expected) -> None:
        """Every file that has its final name is whole."""
        out = place / "out"
        if (out / "report.json").exists():
            assert self.result(place) == expected
        if (out / "report.html").exists():
            assert (out / "report.html").read_text().rstrip().endswith("</html>")
        if (out / "spikes.png").exists():
            assert b"IEND" in (out / "spikes.png").read_bytes()[-12:]
        if (out / "scan.state").exists():
            assert load_header(out / "scan.state").metadata["schema"] == self.schema


class Stream(Scan):
    """The same, layer by layer."""

    schema = StreamState.SCHEMA

    def __init__(self, intact):
        super().__init__(intact)
        self._fixed += ("--stream",)

    def result(self, place):
        report = super().result(place)
        assert report["model"].pop("streamed")  # what goes on from a state reads and holds less
        return report


class Quantize:
    """A quantization; every file of the folder, byte by byte."""

    def __init__(self, intact):
        self._fixed = "quantize", intact / "model", "--device", "cpu", "--force"

    def run(self, server, place, **kill):
        return server.run(*self._fixed, "-o", place / "out", **kill)

    def result(self, place):
        return files(place / "out")

    def check_left(self, place, expected) -> None:
        if (place / "out").exists():
            assert self.result(place) == expected


class GuardCreate:
    """A manifest in chunks so small that it is 0.2 MB; its bytes."""

    def __init__(self, intact):
        self._model = intact / "model"

    def run(self, server, place, **kill):
        hook = "make_manifest", self._model, place / "out"
        return server.run("--version", hook=hook, **kill)

    def result(self, place):
        return (place / "out").read_bytes()

    def check_left(self, place, expected) -> None:
        if (place / "out").exists():
            assert self.result(place) == expected


COMMANDS = [Scan, Stream, Quantize, GuardCreate]


def killed(server, command, folder, kills: int, seed: int) -> int:
    """Kill a command ``kills`` times, each in its part of the run; how many were in time."""
    folder.mkdir()
    for _ in range(2):  # the first one may wait for files
        shutil.rmtree(folder)
        folder.mkdir()
        undisturbed = command.run(server, folder)
        assert (undisturbed.code, undisturbed.stderr) == (0, "")
    expected = command.result(folder)
    draw = random.Random(seed)
    in_time = 0
    for kill in range(kills):
        place = folder.parent / f"{folder.name}-{kill}"
        place.mkdir()
        moment = (kill + draw.random()) / kills * undisturbed.seconds
        ended = command.run(server, place, after=moment)
        assert ended.code in (0, -signal.SIGKILL), ended
        in_time += ended.code != 0
        left = {path.name for path in place.iterdir()}
        assert {name for name in left if not name.startswith(".")} <= {"out"}, left
        command.check_left(place, expected)
        again = command.run(server, place)
        assert (again.code, again.stderr) == (0, ""), f"killed after {moment} s"
        assert command.result(place) == expected, f"killed after {moment} s"
        shutil.rmtree(place)
    return in_time


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_started_again(server, intact, tmp_path, command):
    assert killed(server, command(intact), tmp_path / "out", kills=3, seed=1) > 0


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_50_moments(server, intact, tmp_path, command):
    in_time = killed(server, command(intact), tmp_path / "out", kills=50, seed=2)
    print(f"{command.__name__}: {in_time} of 50 kills came before the end")
    assert in_time >= 30
