"""A scan layer by layer that was ended goes on after its last layer, and ends with one report."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from swkernels.detect import stream_state
from swkernels.detect.loading import quiet
from swkernels.detect.stream_state import StreamState
from swkernels.detect.streamed import scan_stream
from swkernels.errors import InvalidInput
from tests.detect.planting import plant
from tests.models.tiny import tiny_model, token_ids

LOOSE = dict(
    prominence=1.5, share=0.01, batch_size=2, max_candidates=2, methods=("dominance", "outlier"),
    outlier_gamma=2.0, eval_tokens=24, eval_length=24, null_draws=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Save after every layer and measurement, however long that takes."""
    monkeypatch.setattr(stream_state, "_PATIENCE", 0)


class Ended(Exception):
    pass


def scan(folder, state=None, end_after=None, **options) -> dict:
    """The report; or Ended after so many calls of progress."""
    calls = []

    def progress(stage, done, total):
        calls.append(stage)
        if len(calls) == end_after:
            raise Ended

    settings = LOOSE | options
    found = scan_stream(
        folder, token_ids(5, 24), device="cpu", state=state, progress=progress, **settings
    ).to_dict()
    del found["created"], found["model"]
    found["calls"] = len(calls)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved("llama", tmp_path_factory.mktemp("llama"))


def saved(name, folder):
    model = tiny_model(name)
    plant(model, layer=1, rows=2, seed=3)
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "gemma2", "lfm2"])
def test_ended_at_every_step_and_continued(name, tmp_path):
    folder, path = saved(name, tmp_path / "model"), tmp_path / "state"
    expected = scan(folder)
    calls = expected.pop("calls")
    notices: list[str] = []
    for end_after in range(1, calls + 1, 1 if name == "llama" else 4):
        with pytest.raises(Ended):
            scan(folder, StreamState(path, 0), end_after, budget=0)
        found = scan(folder, StreamState(path, 0, notice=notices.append), budget=0)
        found.pop("calls")
        assert found == expected
        path.unlink()
    assert "continuing after layer 1 of" in notices[0]


def test_layers_that_are_done_are_not_read_again(folder, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Ended):
        scan(folder, StreamState(path, 0), 2, verify=False)
    read = []
    for state in (None, StreamState(path, 0)):
        found = scan_stream(
            folder, token_ids(5, 24), device="cpu", state=state, **LOOSE | {"verify": False}
        )
        read.append(found.data["model"]["streamed"]["bytes_read"])
    assert read[1] < 0.7 * read[0]


def test_ended_again_and_again(folder, tmp_path):
    path = tmp_path / "state"
    expected = scan(folder)
    expected.pop("calls")
    ends = 0
    while ends < 50:
        try:
            found = scan(folder, StreamState(path, 0), 4)
            break
        except Ended:
            ends += 1
    else:
        found = scan(folder, StreamState(path, 0))
    found.pop("calls")
    assert found == expected and ends >= 2


def test_a_state_of_another_scan_is_refused(folder, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Ended):
        scan(folder, StreamState(path, 0), 2)
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="setting prominence"):
        scan(folder, StreamState(path, 0), prominence=1.6)
    other = saved("llama", tmp_path / "other")
    with pytest.raises(InvalidInput, match="files of weights"):
        scan(other, StreamState(path, 0))
    assert path.read_bytes() == before
    scan(folder, StreamState(path, 0, fresh=True))


def test_every_kind_of_damage_is_refused(folder, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Ended):
        scan(folder, StreamState(path, 0), 2)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    assert set(header) >= {"inputs.0", "carry.0.0", "spiking", "__metadata__"}
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(good), (8,), generator=generator).tolist()
    for place in [0, 9, length, length + 8, len(good) - 1, *places]:
        spoilt = bytearray(good)
        spoilt[place] ^= 1 << (place % 8)
        path.write_bytes(spoilt)
        with pytest.raises(InvalidInput, match=str(path)):
            scan(folder, StreamState(path, 0))
    path.write_bytes(good[:-5])
    with pytest.raises(InvalidInput, match="truncated"):
        scan(folder, StreamState(path, 0))
    path.write_bytes(good)
    scan(folder, StreamState(path, 0))


def test_a_model_whose_blocks_say_more_is_not_continued(folder, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def talking(self, hidden_states, *args, **kwargs):
        cos, sin = kwargs["position_embeddings"]
        output = forward(self, hidden_states, *args, **kwargs)
        cos += 0.01  # what the next block gets
        return output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", talking)
    path = tmp_path / "state"
    with pytest.raises(Ended):
        scan(folder, StreamState(path, 0), 2, verify=False)
    with pytest.raises(InvalidInput, match="pass more to each other.*delete"):
        scan(folder, StreamState(path, 0), verify=False)


def test_a_disk_that_is_full_does_not_end_the_scan(folder, tmp_path, monkeypatch):
    path = tmp_path / "state"
    with pytest.raises(Ended):
        scan(folder, StreamState(path, 0), 1)
    good = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = scan(folder)
    said: list[str] = []
    monkeypatch.setattr(os, "fsync", full)
    found = scan(folder, StreamState(path, 0, warn=said.append))
    assert found["candidates"] == expected["candidates"]
    assert said and "No space left" in said[0] and path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_state_that_takes_long_is_written_less_often(folder, tmp_path, monkeypatch):
    state = StreamState(tmp_path / "state", 0)
    writes = []
    write = StreamState._write

    def slow(self, *arguments):
        write(self, *arguments)
        writes.append(self.path)
        self._took = 1e6

    monkeypatch.setattr(StreamState, "_write", slow)
    monkeypatch.setattr(stream_state, "_PATIENCE", 20)
    scan(folder, state, verify=False)
    assert len(writes) == 2  # the first layer, and the last


def test_what_is_in_it_is_safetensors(folder, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Ended):
        scan(folder, StreamState(path, 0), 1)
    tensors = load_file(path)
    assert tensors["carry.0.0"].shape == (2, 24, 32) and tensors["inputs.0"].dtype == torch.int64
