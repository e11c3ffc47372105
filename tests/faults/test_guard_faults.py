"""Guard where it cannot write, where files change under it, and under Ctrl-C."""

from __future__ import annotations

import random
import shutil
import signal

import pytest

from swkernels.guard import Manifest, create, verify
from swkernels.train import Coordinates
from tests.cli.checkpoints import files
from tests.faults.test_faults import MOUNTS

NAME = "model.layers.1.mlp.down_proj"
CHUNK = 64  # so small that a manifest is 0.2 MB and the work takes a while
WRITING = ("create", "repair")
COMMANDS = ("create", "verify", "repair")
READING = "swkernels.guard.reading:_chunks"  # a file is open, and its first run is to be read
MAPPED = "swkernels.guard.mapped:MappedFile._populated"


@pytest.fixture(scope="module")
def damaged(intact, tmp_path_factory):
    """A folder with a manifest, and the checkpoint with its super weight at [5, 7] flipped."""
    folder = tmp_path_factory.mktemp("damaged")
    listed = Coordinates.of({NAME: [[5, 7]]}, {(NAME, None): (64, 160)})
    listed.save(folder / "listed.json")
    manifest = create(intact / "model", listed, chunk=CHUNK)
    manifest.save(folder / "model.guard.json")
    shutil.copytree(intact / "model", folder / "model")
    (weight,) = manifest.super_weights
    flip_value(folder / "model", manifest, weight)
    assert len(verify(folder / "model", manifest).hits) == 1
    return folder


def flip_value(model, manifest, weight) -> None:
    from swkernels.guard.contents import look

    entry = look(model, manifest.hash, ()).entries[weight.tensor]
    with open(entry.stretch.path, "r+b") as stream:
        stream.seek(entry.stretch.start + 4 * weight.element + 3)  # its sign and exponent
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 0x80]))


@pytest.fixture
def place(damaged, tmp_path):
    """A folder with a damaged copy, and one for the output."""
    shutil.copytree(damaged / "model", tmp_path / "model")
    (tmp_path / "to").mkdir()
    return tmp_path


@pytest.fixture
def go(server, damaged, place):
    def run(command: str, **faults):
        model, manifest = place / "model", damaged / "model.guard.json"
        to = "-o", place / "to" / "out"
        options = {
            "create": ("--coordinates", damaged / "listed.json", "--chunk", CHUNK, *to),
            "verify": (manifest,),
            "repair": (manifest, *to),
        }[command]
        return server.run("guard", command, model, *options, **faults)

    return run


DONE = {"create": 0, "verify": 1, "repair": 0}  # verify: there is damage


def is_whole(place, damaged, command: str) -> None:
    out = place / "to" / "out"
    manifest = Manifest.load(damaged / "model.guard.json")
    if command == "create":
        assert verify(place / "model", Manifest.load(out)).ok
    if command == "repair":
        assert verify(out, manifest).ok


def fails(ended, place, *words: str) -> None:
    """It said so in one line, with code 2, and left nothing."""
    assert ended.code == 2, ended
    assert ended.stderr.startswith("swkernels: error: ") and ended.stderr.count("\n") == 1, ended
    assert any(word in ended.stderr for word in words), ended
    assert files(place / "to") == {}


@pytest.mark.parametrize("command", WRITING)
def test_a_file_that_cannot_be_written_to_its_end(go, place, damaged, command):
    fails(go(command, largest_file=1000), place, "File too large")
    assert go(command).code == DONE[command]
    is_whole(place, damaged, command)


@MOUNTS
@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk(go, place, command):
    ended = go(command, hook=("full_disk", place / "to", 8192))
    fails(ended, place, "No space left on device")


@MOUNTS
@pytest.mark.parametrize("command", WRITING)
def test_a_read_only_folder(go, place, command):
    fails(go(command, hook=("read_only", place / "to")), place, "Read-only file system")


@MOUNTS
@pytest.mark.parametrize("command", COMMANDS)
def test_the_source_may_be_read_only(go, place, damaged, command):
    ended = go(command, hook=("read_only", place / "model"))
    assert (ended.code, ended.stderr) == (DONE[command], "")
    is_whole(place, damaged, command)


@pytest.mark.parametrize("at", ["before " + READING, "after " + MAPPED])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_is_cut_off(go, place, command, at):
    """Before its pages are asked for, and when they have been given: the second is SIGBUS."""
    shard = min((place / "model").glob("*.safetensors"))
    ended = go(command, hook=("cut_off", at, shard, 4096))
    fails(ended, place, "it was cut while it was read", "was cut off")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_disappears(go, place, command):
    shard = min((place / "model").glob("*.safetensors"))
    ended = go(command, hook=("remove", "before " + READING, shard))
    fails(ended, place, f"{shard} disappeared while it was read")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_is_replaced(go, place, command):
    shard = min((place / "model").glob("*.safetensors"))
    other = shutil.copy(shard, place / "other")
    ended = go(command, hook=("replace", "before " + READING, shard, other))
    fails(ended, place, f"{shard} changed while it was read")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c(go, place, damaged, command):
    before = files(place / "model")
    undisturbed = go(command)
    assert undisturbed.code == DONE[command]
    takes = undisturbed.seconds  # or less: the first one may wait for files
    draw = random.Random(5)
    interrupted = 0
    for number in range(4):
        shutil.rmtree(place / "to")
        (place / "to").mkdir()
        moment = (0.1 + 0.8 * (number + draw.random()) / 4) * takes
        ended = go(command, after=moment, send=signal.SIGINT)
        assert ended.code in (DONE[command], 130), ended
        if ended.code == 130:
            interrupted += 1
            assert ended.stderr == "swkernels: interrupted\n"
        if ended.code != 130 or files(place / "to"):  # the last moment is after the renaming
            is_whole(place, damaged, command)
        if ended.code != 130:
            takes = min(takes, ended.seconds)
    assert interrupted
    assert files(place / "model") == before
