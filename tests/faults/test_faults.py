"""A full disk, a read-only folder, weights that go or change under a command, Ctrl-C.

Each is one line on standard error and exit code 2 (Ctrl-C: 130), and leaves nothing half.
"""

from __future__ import annotations

import os
import random
import shutil
import signal

import pytest

from tests.cli.checkpoints import files
from tests.faults.test_kills import SCAN

SAFE_OPEN = "after transformers.modeling_utils:safe_open"
# Where weights have been opened and are still to be read.
READING = {
    "scan": SAFE_OPEN,
    "quantize": SAFE_OPEN,
    "rank": "before swkernels.evidence.rank:_largest",
    "stream": "after swkernels.detect.streamed:stored_places",
}


def can_mount() -> bool:
    """Asked in a fork: this process keeps the mounts that it has."""
    child = os.fork()
    if child == 0:
        try:
            from tests.faults.hooks import _own_mounts

            _own_mounts()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


MOUNTS = pytest.mark.skipif(not can_mount(), reason="needs the right to mount (root)")


@pytest.fixture
def place(intact, tmp_path):
    """A folder with a copy of the checkpoint, which may be broken, and one for the output."""
    shutil.copytree(intact / "model", tmp_path / "model")
    (tmp_path / "to").mkdir()
    return tmp_path


@pytest.fixture
def go(server, intact, place):
    """Run a command on the copy."""

    def run(command: str, **faults):
        options = {
            "scan": (*SCAN, "--text", intact / "text.txt"),
            "stream": (*SCAN, "--text", intact / "text.txt", "--stream"),
            "quantize": ("--device", "cpu"),
            "rank": ("-k", 1000, "--no-cache"),
        }[command]
        out = place / "to" / "out"
        name = "scan" if command == "stream" else command
        return server.run(name, place / "model", *options, "-o", out, **faults)

    return run


def fails(ended, place, *words: str) -> None:
    """It said so in one line, with code 2; nothing was left but what a scan goes on from."""
    assert ended.code == 2, ended
    said = ended.stderr.splitlines(keepends=True)
    if said and said[0].startswith("swkernels: the scan goes on without a newer state: "):
        del said[0]  # a scan layer by layer saves after layers
    assert len(said) == 1 and said[0].startswith("swkernels: error: "), ended
    assert any(word in said[0] for word in words), ended
    assert set(files(place / "to")) <= {"out/scan.state"}


def first_shard(place):
    return min((place / "model").glob("*.safetensors"))


@pytest.mark.parametrize("command", READING)
def test_a_file_that_cannot_be_written_to_its_end(go, place, command):
    fails(go(command, largest_file=1000), place, "File too large")
    assert go(command).code == 0


@MOUNTS
@pytest.mark.parametrize("command", READING)
def test_a_full_disk(go, place, command):
    ended = go(command, hook=("full_disk", place / "to", 8192))
    fails(ended, place, "No space left on device")


@MOUNTS
@pytest.mark.parametrize("command", READING)
def test_a_read_only_folder(go, place, command):
    ended = go(command, hook=("read_only", place / "to"))
    fails(ended, place, "Read-only file system")


@pytest.mark.parametrize("command", READING)
def test_a_shard_is_cut_off_while_it_is_mapped(go, place, command):
    """The system sends SIGBUS to who looks at what is gone."""
    shard = first_shard(place)
    ended = go(command, hook=("cut_off", READING[command], shard, 4096))
    fails(ended, place, "cut off", "truncated", "was changed while it was read")


@pytest.mark.parametrize("command", READING)
def test_a_shard_disappears(go, place, command):
    shard = first_shard(place)
    fails(go(command, hook=("remove", READING[command], shard)), place, str(shard))


@pytest.mark.parametrize("fault", ["replace", "overwrite"])
@pytest.mark.parametrize("command", READING)
def test_a_shard_is_changed(go, place, command, fault):
    shard = first_shard(place)
    other = place / "other"
    data = bytearray(shard.read_bytes())
    data[-1000:] = bytes(1000)
    other.write_bytes(data)
    ended = go(command, hook=(fault, READING[command], shard, other))
    fails(ended, place, f"{shard} was changed while it was read")


@pytest.mark.parametrize("command", READING)
def test_ctrl_c(go, place, command):
    undisturbed = go(command)
    assert undisturbed.code == 0
    takes = undisturbed.seconds  # or less: the first one may wait for files
    whole = set(files(place / "to"))
    draw = random.Random(5)
    interrupted = 0
    for number in range(3):
        shutil.rmtree(place / "to")
        (place / "to").mkdir()
        moment = (0.1 + 0.8 * (number + draw.random()) / 3) * takes
        ended = go(command, after=moment, send=signal.SIGINT)
        assert ended.code in (0, 130), ended
        if ended.code:
            interrupted += 1
            assert ended.stderr == "swkernels: interrupted\n"
            left = {name for name in files(place / "to") if name != "out/scan.state"}
            assert left in (set(), whole)  # the last moment is after everything is written
        else:
            takes = min(takes, ended.seconds)
    assert interrupted
