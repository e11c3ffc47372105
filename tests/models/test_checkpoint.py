"""Checkpoints as named tensors: mapped, exact, in order; what is damaged is refused in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swkernels.errors import InvalidInput
from swkernels.models.checkpoint import find_checkpoint, open_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn,
          torch.float8_e5m2, torch.int8, torch.uint8, torch.int32)  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{number}.weight": torch.randn(5, 7, generator=generator).mul(9).to(dtype)
        for number, dtype in zip((10, 2, 0, 1, 33, 4, 5, 6, 7), DTYPES)
    }


def shard(folder: Path) -> dict[str, str]:
    """Write them as three files with an index; return which file holds each."""
    named = tensors()
    files = {key: f"part{place % 3}.safetensors" for place, key in enumerate(named)}
    for file in set(files.values()):
        save_file({key: named[key] for key in named if files[key] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return files


def mapped() -> str:
    return Path("/proc/self/maps").read_text()


def refused(source) -> str:
    with pytest.raises(InvalidInput) as caught, open_checkpoint(source):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_type_is_mapped_as_it_is_and_closed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    with open_checkpoint(file) as found:
        assert list(found) == [f"layers.{n}.weight" for n in (0, 1, 2, 4, 5, 6, 7, 10, 33)]
        for name, expected in tensors().items():
            got = found[name]
            assert found.dtype(name) == got.dtype == expected.dtype
            assert found.shapes()[name] == expected.shape
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
            part = found.read(name, slice(2, 4))
            assert torch.equal(part.view(torch.uint8), expected[2:4].view(torch.uint8))
            ranges = [line.split()[0] for line in mapped().splitlines() if str(file) in line]
            low, high = (int(end, 16) for end in ranges[0].split("-"))
            assert len(ranges) == 1 and low <= got.data_ptr() < high  # no copy
        got.fill_(0)  # in this process alone
        del got, part
    assert str(file) not in mapped()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_folders_with_and_without_an_index(tmp_path):
    shard(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    for expected in (9, 10):  # the index leaves the other file out
        with open_checkpoint(str(tmp_path)) as found:
            assert len(found) == len(list(found)) == expected
            assert len(found.files) == 3 + (expected == 10)
            for name, tensor in tensors().items():
                assert torch.equal(found[name].double(), tensor.double())
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({"layers.0.weight": torch.zeros(1)}, tmp_path / "part9.safetensors")
    assert "holds layers.0.weight twice" in refused(tmp_path)


def test_a_type_that_packs_values(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with open_checkpoint(file) as found:
        assert found.dtype("x") is None and found.shapes() == {"x": (4,)}


def test_a_name_in_the_local_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    save_file(tensors(), snapshot / "model.safetensors")
    assert find_checkpoint("some/model") == snapshot
    with open_checkpoint("some/model") as found:
        assert found.label == "some/model" and len(found) == 9
    for name in ("some/other", "not a name", "../up", str(tmp_path / "gone")):
        assert "no such file or folder" in refused(name)


def test_damage(tmp_path):
    assert "holds no .safetensors file" in refused(tmp_path)
    files = shard(tmp_path)
    file = tmp_path / "part1.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "part1.safetensors is truncated" in refused(tmp_path)
    file.write_bytes(whole + b"1")
    assert "part1.safetensors is damaged" in refused(tmp_path)
    for content in (b"", b"no header, but long enough to have one", b"\x02" + bytes(7) + b"[]"):
        file.write_bytes(content)
        assert "not a readable safetensors file" in refused(tmp_path)
    length = int.from_bytes(whole[:8], "little")
    file.write_bytes(whole.replace(b'"dtype"', b'"dtypo"', 1))
    assert length and "does not have exactly dtype, shape" in refused(tmp_path)
    file.unlink()
    assert "part1.safetensors is missing, 1 of 3 files" in refused(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": [1]}', json.dumps({"weight_map": {"a": 5}})):
        index.write_text(content)
        assert "index.json is unreadable" in refused(tmp_path)
    assert files
