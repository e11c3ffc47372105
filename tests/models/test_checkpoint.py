"""Checkpoints as named tensors: mapped, exact, in order; what is damaged is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swkernels.errors import InvalidInput
from swkernels.models.checkpoint import find_checkpoint, open_checkpoint, read_header
from swkernels.models.safetensors_header import load_header

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


# --- headers and indexes that someone made to mislead ---


def written(file: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + raw + data)
    return file


def entry(dtype, shape, begin, end) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BYTE = entry("U8", [2], 0, 2)
HEADERS = {
    "a gap": ({"a": BYTE, "b": entry("U8", [2], 3, 5)}, 5, "leaves a gap after 'a'"),
    "a gap first": ({"a": entry("U8", [2], 1, 3)}, 3, "leaves a gap after the beginning"),
    "overlap": ({"a": BYTE, "b": entry("U8", [2], 1, 3)}, 3, "overlaps with 'a'"),
    "the same bytes": ({"a": BYTE, "b": BYTE}, 2, "overlaps with 'a'"),
    "empty within": ({"a": BYTE, "b": entry("U8", [0], 1, 1)}, 2, "overlaps with 'a'"),
    "past the end": ({"a": entry("U8", [99], 0, 99)}, 2, "truncated"),
    "more data": ({"a": BYTE}, 3, "damaged: expected"),
    "too few bytes": ({"a": entry("F32", [2], 0, 2)}, 2, "is F32 [2], which is 8 bytes, but has 2"),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, 2, "which is 1.5 bytes, but has 2"),
    "wrong F6": ({"a": entry("F6_E2M3", [4], 0, 4)}, 4, "which is 3 bytes, but has 4"),
    "dtype": ({"a": entry("F33", [2], 0, 2)}, 2, "unknown dtype 'F33'"),
    "dtype list": ({"a": entry(["U8"], [2], 0, 2)}, 2, "unknown dtype ['U8']"),
    "backwards": ({"a": entry("U8", [2], 2, 0)}, 2, "data_offsets [2, 0]"),
    "negative": ({"a": entry("U8", [-2], 0, 2)}, 2, "the shape [-2]"),
    "two negatives": ({"a": entry("U8", [-1, -2], 0, 2)}, 2, "the shape [-1, -2]"),
    "negative offset": ({"a": entry("U8", [2], -2, 0)}, 2, "data_offsets [-2, 0]"),
    "a float": ({"a": entry("U8", [2.0], 0, 2)}, 2, "the shape [2.0]"),
    "a boolean": ({"a": entry("U8", [True, 2], 0, 2)}, 2, "the shape [True, 2]"),
    "one offset": ({"a": BYTE | {"data_offsets": [2]}}, 2, "data_offsets [2]"),
    "offsets as text": ({"a": BYTE | {"data_offsets": "02"}}, 2, "data_offsets '02'"),
    "2^64 elements": ({"a": entry("U8", [2**32, 2**32], 0, 0)}, 0, "more than 2^63 bytes"),
    "0 of 2^64": ({"a": entry("U8", [0, 2**32, 2**32], 0, 0)}, 0, "more than 2^63 bytes"),
    "2^100": ({"a": entry("U8", [2**100], 0, 2)}, 2, "the shape [1267"),
    "65 dimensions": ({"a": entry("U8", [1] * 65, 0, 1)}, 1, "the shape [1, 1"),
    "another field": ({"a": BYTE | {"strides": [1]}}, 2, "exactly dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, 2, "exactly dtype, shape"),
    "an entry as list": ({"a": ["U8", [2], [0, 2]]}, 2, "exactly dtype, shape"),
    "metadata": ({"__metadata__": {"a": 1}, "a": BYTE}, 2, "no object of texts"),
    "metadata list": ({"__metadata__": [], "a": BYTE}, 2, "no object of texts"),
    "steering": ({"\x1b[31m\n": entry("X", [2], 0, 2)}, 2, r"'\x1b[31m\n' has the unknown dtype"),
    "no object": (b"[]", 0, "is no object"),
    "deep": (b'{"a":' + b"[" * 10**5, 0, "nested deeper than 4"),
    "twice": (b'{"a":{},"a":{}}', 0, "the key 'a' twice"),
    "1e999": (b'{"a":1e999}', 0, "out of range"),
    "NaN": (b'{"a":NaN}', 0, "NaN is no JSON number"),
    "no UTF-8": (b'{"\xff":1}', 0, "can't decode"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, tmp_path):
    header, size, reason = HEADERS[name]
    file = written(tmp_path / "a.safetensors", header, bytes(size))
    message = refused(file)
    assert reason in message and str(file) in message
    assert message.isprintable() and len(message) < 600
    save_file({"z": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert reason in refused(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 100_000_001, 2**63, 2**64 - 1])
def test_lengths_that_lie(length, tmp_path):
    file = written(tmp_path / "a.safetensors", {"a": BYTE}, bytes(2), length)
    assert "not a readable safetensors file" in refused(file)


def test_headers_in_any_order_with_every_type_and_empty_tensors(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "late": entry("F4", [3, 2], 9, 12)}
    header |= {"empty": entry("F32", [0, 5], 1, 1), "scalar": entry("BOOL", [], 0, 1)}
    header |= {"middle": entry("F64", [1], 1, 9), "end": entry("U8", [7, 0], 12, 12)}
    header |= {"six": entry("F6_E3M2", [4], 12, 15), "": entry("C64", [1], 15, 23)}
    file = written(tmp_path / "a.safetensors", header, bytes(23))
    found = load_header(file)
    assert found.metadata == {"format": "pt"} and found.raw == read_header(file)
    assert found.tensors == {name: e for name, e in header.items() if name != "__metadata__"}
    with open_checkpoint(file) as opened:
        assert opened.shapes()["late"] == (3, 2) and len(opened) == 7


def test_a_header_of_a_hundred_thousand_tensors(tmp_path):
    """Linear: ten times the tensors cost about ten times the time, here with ample room."""

    def seconds(count: int) -> float:
        header = {f"model.layers.{i}.w": entry("U8", [1], i, i + 1) for i in reversed(range(count))}
        file = written(tmp_path / f"{count}.safetensors", header, bytes(count))
        begin = time.process_time()
        assert len(load_header(file).tensors) == count
        return time.process_time() - begin

    assert seconds(100_000) < 60 * max(seconds(10_000), 0.02)


def index_of(folder: Path, places: dict) -> None:
    text = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..", ".", "",
     "a\\b.safetensors", "C:a.safetensors", "a.safetensors\0", "a.safetensors\n", "a.bin",
     "\x1b[31m.safetensors", "\u202e.safetensors", "a.safetensors/", "A.SAFETENSORS",
     "x" * 250 + ".safetensors"],
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_alone(name, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    index_of(folder, {"a": name})
    message = refused(folder)
    assert "index.json" in message and message.isprintable()
    assert "plain name of a .safetensors file" in message or "at weight_map.a, got" in message


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, None),
        ({"weight_map": {"a": "one.safetensors"}}, None),  # as transformers: the file has more
        ({"weight_map": {"a": "one.safetensors"}, "metadata": {"total_size": 8.0}}, None),
        ({"weight_map": {"a": "two.safetensors"}}, "'a' is in two.safetensors, which lacks it"),
        (
            {"weight_map": {"b": "one.safetensors", "a": "two.safetensors"}},
            "two.safetensors has it",
        ),
        ({"weight_map": {"z": "one.safetensors"}}, "'z' is in one.safetensors, which lacks it"),
        ({"weight_map": {"a": "one.safetensors", "d": "One.safetensors"}}, "by capitals alone"),
        ({"weight_map": {"a": "one.safetensors", "c": "copy.safetensors"}}, "holds 'a' twice"),
        ({"weight_map": {"a": None}}, "at weight_map.a, got None"),
        ({"weight_map": ["one.safetensors"]}, "at weight_map, got a list"),
        ({"weight_map": {"a": "one.safetensors"}, "metadata": {"total_size": -1}}, "total_size"),
        ({"weight_map": {"a": "one.safetensors"}, "metadata": {"total_size": True}}, "total_size"),
        ({"weight_map": {"a": "one.safetensors"}, "metadata": 5}, "at metadata, got 5"),
        ({}, "expected the field weight_map"),
    ],
)
def test_an_index_and_its_files(document, reason, tmp_path):
    save_file({"a": torch.zeros(1), "more": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(1), "c": torch.ones(1)}, tmp_path / "copy.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
    if reason:
        assert reason in refused(tmp_path)
        return
    with open_checkpoint(tmp_path) as found:
        assert "more" in found and "c" not in found


def test_a_shard_may_be_a_link_and_not_a_pipe(tmp_path):
    """The cache of the hub is links to blobs; a clone can hold a link to anything."""
    (tmp_path / "blobs").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "blobs" / "0a1b")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    shard = folder / "a.safetensors"
    shard.symlink_to("../blobs/0a1b")
    index_of(folder, {"a": "a.safetensors"})
    with open_checkpoint(folder) as found:
        assert list(found) == ["a"]
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        shard.unlink()
        shard.symlink_to(target)
        assert "expected a regular file" in refused(folder)
        assert "expected a regular file" in refused(shard) or target == tmp_path


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, file)

    def then_swapped(path):
        header = load_header(path)
        save_file({"b": torch.zeros(1)}, path)
        return header

    monkeypatch.setattr("swkernels.models.checkpoint.load_header", then_swapped)
    assert "changed while it was opened" in refused(file)
