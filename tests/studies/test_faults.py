"""Studies that are killed, a full disk, a read-only folder, two at once: nothing that was measured
is lost, and going on gives the figures of a study that was not disturbed."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time

import pytest

from swkernels.studies.book import RUNS, Book
from swkernels.studies.lock import LOCK
from tests.cli.checkpoints import files
from tests.faults.conftest import intact, server  # noqa: F401
from tests.faults.server import Server
from tests.faults.test_faults import MOUNTS
from tests.studies import tiny

STUDY = "direct"


@pytest.fixture(scope="module")
def go(server, intact, tmp_path_factory):  # noqa: F811
    """Run the study, with the small budget on a tiny model and a dozen questions."""
    data = tiny.write_data(tmp_path_factory.mktemp("study") / "data")
    fixed = "--model", intact / "model", "--data", data, "--seeds", "42", "--device", "cpu"

    def go(place, study: str = STUDY, on: Server = server, **faults):
        return on.run("study", study, *fixed, "-o", place / "out", **faults)

    return go


@pytest.fixture(scope="module")
def undisturbed(go, tmp_path_factory):
    """(the seconds that it takes, the lines, the page)."""
    for _ in range(2):  # the first one may wait for files
        place = tmp_path_factory.mktemp("undisturbed")
        ended = go(place)
        assert (ended.code, ended.stderr) == (0, "")
    return ended.seconds, lines(place), page(place)


def lines(place) -> dict:
    """Of each run: what was done and found."""
    return {
        record["run"]: (record["kind"], record["config"], record["identity"], record["figures"])
        for record in Book(place / "out" / RUNS)
    }


def page(place) -> dict:
    """The figures as bytes; the page says how long it took and is made of the lines."""
    return {name: digest for name, digest in files(place / "out").items() if "figures/" in name}


def goes_on(go, place, undisturbed) -> None:
    """What is there is right, and the same command ends as if nothing had happened."""
    _, expected, drawn = undisturbed
    kept = lines(place) if (place / "out" / RUNS).exists() else {}
    assert kept.items() <= expected.items()
    ended = go(place)
    assert (ended.code, ended.stderr) == (0, "")
    assert lines(place) == expected and page(place) == drawn
    assert list(lines(place))[: len(kept)] == list(kept)
    left = {path.name for path in (place / "out").iterdir() if ".README" not in path.name}
    assert left == {RUNS, "README.md", "figures"}


def killed(go, undisturbed, folder, kills: int, seed: int) -> int:
    """Kill the study ``kills`` times, each in its part of the run; how many were in time."""
    seconds, *_ = undisturbed
    draw = random.Random(seed)
    in_time = 0
    for kill in range(kills):
        place = folder / str(kill)
        place.mkdir()
        ended = go(place, after=(kill + draw.random()) / kills * seconds)
        assert ended.code in (0, -signal.SIGKILL), ended
        in_time += ended.code != 0
        goes_on(go, place, undisturbed)
        shutil.rmtree(place)
    return in_time


def test_killed_and_gone_on_with(go, undisturbed, tmp_path):
    assert killed(go, undisturbed, tmp_path, kills=5, seed=1) > 0


@pytest.mark.long
def test_killed_at_50_moments(go, undisturbed, tmp_path):
    in_time = killed(go, undisturbed, tmp_path, kills=50, seed=2)
    print(f"study: {in_time} of 50 kills came before the end")
    assert in_time >= 30


def test_a_last_line_that_was_cut_off(go, undisturbed, tmp_path):
    assert go(tmp_path, "consistency").code == 0
    assert go(tmp_path, "direct").code == 0
    path = tmp_path / "out" / RUNS
    whole = lines(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert go(tmp_path, "direct").code == 0
    assert lines(tmp_path) == whole


def fails(ended, *words: str) -> None:
    assert ended.code == 2, ended
    assert ended.stderr.startswith("swkernels: error: ") and ended.stderr.count("\n") == 1, ended
    assert any(word in ended.stderr for word in words), ended


@pytest.mark.parametrize("size", [1500, 8000, 20000])
def test_a_file_that_cannot_be_written_to_its_end(go, undisturbed, tmp_path, size):
    fails(go(tmp_path, largest_file=size), "File too large")
    goes_on(go, tmp_path, undisturbed)


@MOUNTS
@pytest.mark.parametrize("size", [8192, 65536, 131072])
def test_a_full_disk(go, tmp_path, size):
    (tmp_path / "to").mkdir()
    ended = go(tmp_path / "to", hook=("full_disk", tmp_path / "to", size))
    fails(ended, "No space left on device")


@MOUNTS
def test_a_read_only_folder(go, undisturbed, tmp_path):
    ended = go(tmp_path, hook=("read_only", tmp_path))
    fails(ended, "Read-only file system")
    assert not list(tmp_path.iterdir())
    assert go(tmp_path).code == 0
    before = files(tmp_path)
    fails(go(tmp_path, hook=("read_only", tmp_path)), "Read-only file system")
    assert files(tmp_path) == before


def test_two_at_once(go, undisturbed, tmp_path, tmp_path_factory):
    """The second says at once who is at it, and disturbs nothing."""
    first = []
    thread = threading.Thread(target=lambda: first.append(go(tmp_path)))
    with Server(tmp_path_factory.mktemp("second")) as other:
        assert go(tmp_path / "else", on=other).code == 0  # it has imported everything
        thread.start()
        while not (tmp_path / "out" / LOCK).exists():
            time.sleep(0.01)
        second = go(tmp_path, on=other)
        thread.join()
    fails(second, f"{tmp_path / 'out'} is in use by process ")
    assert first[0].code == 0, first
    _, expected, _ = undisturbed
    assert lines(tmp_path) == expected


def test_ctrl_c(go, undisturbed, tmp_path):
    seconds, *_ = undisturbed
    ended = go(tmp_path, after=0.5 * seconds, send=signal.SIGINT)
    assert ended.code == 130, ended
    words = "the runs that are done are kept, and the same command goes on"
    assert ended.stderr == f"swkernels: interrupted: {words}\n"
    goes_on(go, tmp_path, undisturbed)
