"""Single-bit flips anywhere in a checkpoint: ``guard verify`` finds every one, and says where."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from swkernels.guard import INTACT, MOVED, create, verify
from swkernels.models.checkpoint import read_header, weight_files
from swkernels.train import Coordinates

SITE = "model.layers.1.mlp.down_proj"


@contextmanager
def flipped(file: Path, bit: int):
    """A context in which one bit of a file is the other one."""
    handle = os.open(file, os.O_RDWR)
    try:
        place, mask = bit // 8, 1 << bit % 8
        held = os.pread(handle, 1, place)
        os.pwrite(handle, bytes([held[0] ^ mask]), place)
        yield
        os.pwrite(handle, held, place)
    finally:
        os.close(handle)


def starts(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Of each tensor: its file, its first byte there, its size."""
    found = {}
    for file in weight_files(folder):
        header = read_header(file)
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = file, 8 + len(header) + begin, end - begin
    return found


def flip_everywhere(folder: Path, manifest, flips: int, seed: int) -> None:
    """Flip bits: a quarter in super weights, a quarter in headers, the others in any weights."""
    draw = random.Random(seed)
    tensors = starts(folder)
    sizes = [size for _, _, size in tensors.values()]
    for number in range(flips):
        weight = None
        if number % 4 == 0:
            weight = draw.choice(manifest.super_weights)
            name, width = weight.tensor, len(weight.bits) // 2
            file, start, _ = tensors[name]
            bit = 8 * (start + weight.element * width) + draw.randrange(8 * width)
        elif number % 4 == 1:
            file = draw.choice(weight_files(folder))
            name, bit = None, draw.randrange(8 * (8 + len(read_header(file))))
        else:
            name = draw.choices(list(tensors), sizes)[0]
            file, start, size = tensors[name]
            bit = 8 * start + draw.randrange(8 * size)
        with flipped(file, bit):
            result = verify(folder, manifest, threads=1)
        assert not result.ok, f"bit {bit} of {file.name}"
        if name is not None:
            [finding] = result.findings
            assert finding.name == name
            assert finding.start <= bit // 8 - tensors[name][1] < finding.stop
        if weight is not None:
            assert [hit.weight for hit in result.hits] == [weight]
    assert verify(folder, manifest).status == INTACT


@pytest.fixture
def guarded(intact, tmp_path):
    """A copy of the checkpoint, and its manifest with three super weights."""
    folder = tmp_path / "model"
    shutil.copytree(intact / "model", folder)
    shape = load_file(starts(folder)[f"{SITE}.weight"][0])[f"{SITE}.weight"].shape
    weights = Coordinates({SITE: [(5, 7), (0, 0), (63, 159)]}, {SITE: tuple(shape)})
    return folder, create(folder, weights, chunk=4096)


def test_every_one_of_2000_flips_is_found(guarded):
    flip_everywhere(*guarded, flips=2000, seed=3)


def test_an_untouched_copy_is_intact_and_a_resharded_one_is_recognised(guarded, tmp_path):
    folder, manifest = guarded
    shutil.copytree(folder, tmp_path / "copy")
    assert verify(tmp_path / "copy", manifest).status == INTACT
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tensors = {}
    for file in weight_files(other):
        tensors |= load_file(file)
        file.unlink()
    (other / "model.safetensors.index.json").unlink()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert verify(other, manifest).status == MOVED
    file, start, _ = starts(other)[f"{SITE}.weight"]
    with flipped(file, 8 * start):
        result = verify(other, manifest)
    assert not result.ok and len(result.hits) == 1


@pytest.mark.long
def test_flips_in_a_real_model(smollm2_path, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(smollm2_path, folder)
    site = "model.layers.1.mlp.down_proj"
    weights = Coordinates({site: [(1, 2), (500, 1500)]}, {site: (576, 1536)})
    flip_everywhere(folder, create(folder, weights), flips=300, seed=4)
