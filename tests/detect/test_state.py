"""A scan that is ended at any moment goes on and reports the same; a state that does not fit."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from swkernels import files, ops
from swkernels.detect import state as state_module
from swkernels.detect.identity import weights_digest
from swkernels.detect.ranks import Ranks
from swkernels.detect.scan import scan
from swkernels.detect.state import ScanState
from swkernels.errors import InvalidInput
from swkernels.models.safetensors_header import load_header
from tests.detect.planting import plant
from tests.models.tiny import VOCABULARY, tiny_model

EVERY_METHOD = ("dominance", "outlier", "threshold")
SETTINGS = {"eval_length": 16, "null_draws": 2, "max_candidates": 3, "batch_size": 2}
BATCHES = 4  # of samples of 24, 24 | 24 | 12 | 9 tokens


class Stopped(Exception):
    pass


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (24, 24, 24, 12, 9)]


def planted(name: str):
    model = tiny_model(name)
    plant(model, layer=1, rows=2, columns=2, seed=3)
    return model


@pytest.fixture(scope="module")
def model():
    return planted("llama")


@pytest.fixture(scope="module")
def mixture():
    return planted("mixtral")


def report(model, tokens=None, **options) -> str:
    """The report as text; "created" is the one thing that may differ."""
    found = scan(model, tokens or samples(), **SETTINGS | options).to_dict()
    assert found.pop("created")
    return json.dumps(found)


def stopped(model, path, at: int, every: float = 0.0, **options) -> tuple[str, int, int]:
    """End a scan at its progress number ``at``; what it was at."""
    calls = []

    def progress(*call):
        calls.append(call)
        if len(calls) == at:
            raise Stopped

    with pytest.raises(Stopped):
        report(model, state=ScanState(path, every), progress=progress, **options)
    return calls[-1]


def count_forwards(model) -> list:
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(None))
    return runs


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 25])
def test_the_report_is_equal_wherever_it_stopped(mixture, tmp_path, at):
    options = {"methods": EVERY_METHOD, "threshold": 0.01}
    expected = report(mixture, **options)
    where = stopped(mixture, tmp_path / "state", at, **options)
    lines = []
    state = ScanState(tmp_path / "state", 0.0, notice=lines.append)
    assert report(mixture, state=state, **options) == expected
    done = (2, 3, 4, 5)[min(at, BATCHES) - 1]
    assert len(lines) == 1 and f"continuing at sample {done} of 5" in lines[0]
    assert ("measurements" in lines[0]) == (
        where[0] not in ("reading peaks", "looking at the spikes")
    )
    state.remove()
    assert not list(tmp_path.iterdir())


def test_an_expert_that_is_handed_a_token_several_times_counts_it_once(tmp_path):
    """nllb_moe does so; its own state must not say more tokens than there are."""
    model = planted("nllb_moe")
    expected = report(model, verify=False)
    stopped(model, tmp_path / "state", 2, verify=False)
    assert report(model, state=ScanState(tmp_path / "state", 0.0), verify=False) == expected
    tokens = sum(ids.numel() for ids in samples())
    routed = [e["routed"] for e in json.loads(expected)["layers"] if e["expert"] is not None]
    assert max(routed) == tokens


def test_what_is_done_is_not_done_again(tmp_path):
    model = planted("llama")
    path = tmp_path / "state"
    runs = count_forwards(model)
    report(model)
    whole = len(runs)
    report(model, state=ScanState(path, 0.0))  # ends; its state is complete
    again = len(runs)
    report(model, state=ScanState(path, 0.0))
    second_look = len(runs) - again
    assert whole > 3 * second_look and second_look <= BATCHES + 1


def test_stopped_twice(model, tmp_path):
    expected = report(model)
    for at in (2, 2, 6, 12):
        stopped(model, tmp_path / "state", at)
    assert report(model, state=ScanState(tmp_path / "state")) == expected


def test_a_short_scan_writes_no_state(model, tmp_path):
    report(model, state=ScanState(tmp_path / "state", 3600))
    assert not list(tmp_path.iterdir())


def test_the_interval(model, tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            cls.now += 1.0
            return cls.now

    monkeypatch.setattr(state_module, "time", Clock)
    writes = []
    monkeypatch.setattr(
        state_module, "write_atomically", lambda path, data: writes.append(Clock.now)
    )
    report(model, state=ScanState(tmp_path / "state", 10.0))
    assert len(writes) >= 2
    assert all(10 <= later - earlier <= 13 for earlier, later in zip(writes, writes[1:]))


def test_fresh_starts_anew(model, tmp_path):
    stopped(model, tmp_path / "state", 3)
    lines = []
    report(model, state=ScanState(tmp_path / "state", 3600, fresh=True, notice=lines.append))
    assert not lines and not (tmp_path / "state").exists()


def test_every_setting_text_and_weight_that_differs_is_named(tmp_path):
    model = planted("llama")
    path = tmp_path / "state"
    stopped(model, path, 3)
    before = path.read_bytes()

    def refused(field, tokens=None, **options):
        with pytest.raises(InvalidInput) as error:
            report(model, tokens, state=ScanState(path), **options)
        line = str(error.value)
        assert "\n" not in line and "delete it to start anew" in line and str(path) in line
        assert f"its {field} is " in line and "of this scan" in line, line
        assert path.read_bytes() == before
        return line

    assert "is 16, of this scan 12" in refused("setting eval_length", eval_length=12)
    refused("setting seed", seed=1)
    refused("setting methods", methods=EVERY_METHOD)
    refused("setting backend", backend="reference")
    refused("fingerprint", fingerprint="0" * 64)
    other = samples()
    other[4][8] = (other[4][8] + 1) % VOCABULARY
    refused("samples", other)
    refused("evaluation text", eval_inputs=other)
    weight = model.model.layers[2].self_attn.q_proj.weight
    with torch.no_grad():
        kept = weight[3, 5].clone()
        weight[3, 5] = torch.nextafter(kept, torch.tensor(9.0))
        refused("weights")
        weight[3, 5] = kept
    model.config.rms_norm_eps *= 2
    refused("config of the model")
    model.config.rms_norm_eps /= 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    refused("threads")
    torch.set_num_threads(threads)
    assert report(model, state=ScanState(path)) == report(model)


@pytest.mark.parametrize(
    "field", ["version of swkernels", "version of torch", "version of transformers", "device",
              "dtype", "class of the model", "attention", "rank"]
)  # fmt: skip
def test_a_state_of_another_version_or_place(model, tmp_path, field):
    path = tmp_path / "state"
    stopped(model, path, 2)
    metadata = load_header(path).metadata
    identity = json.loads(metadata["identity"])
    assert identity[field]
    identity[field] = "another"
    save_file(load_file(path), path, metadata | {"identity": json.dumps(identity)})
    with pytest.raises(InvalidInput, match=f"its {field} is 'another', of this scan '"):
        report(model, state=ScanState(path))


def test_one_weight_changes_the_digest():
    model = tiny_model("llama")
    before = weights_digest(model)
    assert weights_digest(tiny_model("llama")) == before
    weight = model.model.layers[0].mlp.down_proj.weight.data
    a, b = weight[0, 0].clone(), weight[0, 1].clone()
    weight[0, 0], weight[0, 1] = b, a
    assert weights_digest(model) != before
    weight[0, 0], weight[0, 1] = a, b
    assert weights_digest(model) == before
    assert weights_digest(model.to(torch.bfloat16)) != before


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A state with everything in it; do not write to it."""
    path = tmp_path_factory.mktemp("whole") / "state"
    report(model, state=ScanState(path, 0.0))
    return path


def changed(whole, path, change, seal: bool = True) -> None:
    """Write the state with ``change`` done to its tensors, with a checksum that fits."""
    tensors, metadata = load_file(whole), load_header(whole).metadata
    tensors = change(tensors) or tensors
    if seal:
        metadata["sha256"] = state_module.form.digest(metadata["identity"], tensors)
    save_file(tensors, path, metadata)


def drop(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


def put(name, value):
    return lambda t: t | {name: value(t) if callable(value) else value}


def fill(name, index, value):
    return lambda t: t[name].__setitem__(index, value)


INT = torch.int64
DAMAGES = {
    "lacks a tensor": (drop("inputs.1"), "lacks tensor 'inputs.1'"),
    "unknown tensor": (put("more", torch.zeros(2)), "the unknown tensor 'more'"),
    "another dtype": (put("outputs.0", lambda t: t["outputs.0"].int()), "outputs.0 as I64"),
    "another shape": (put("outputs.0", torch.zeros(1, 3, dtype=INT)), "expected outputs.0 as I64"),
    "huge key": (fill("inputs.0", (0, 0), ops.INFINITY_KEY), "no finite magnitude"),
    "negative key": (fill("inputs.0", (0, 0), -1), "no finite magnitude"),
    "token": (fill("inputs.0", (0, 0), 1 << 32), "a token that there is not"),
    "routed": (fill("routed.0", 0, 1 << 40), "more tokens than there are"),
    "a batch twice": (fill("done", 1, 0), "batches that this scan does not have"),
    "a batch that is not": (fill("done", 1, 1), "batches that this scan does not have"),
    "spike of no sample": (fill("spiking", (0, 0), 99), "samples that it has not seen"),
    "spike of no site": (fill("spiking", (0, 1), 99), "does not have"),
    "spike of no expert": (fill("spiking", (0, 2), 9), "outside of the model's"),
    "spike of no row": (fill("spiking", (0, 3), 1 << 20), "outside of the model's"),
    "set of no column": (fill("sets", (0, 4), -1), "outside of the model's"),
    "no window": (fill("cells.at", (0, 0), 999), "window 999"),
    "losses": (put("cells.losses", lambda t: t["cells.losses"][:-1].clone()), "lacks losses"),
    "kl": (put("cells.kl", lambda t: t["cells.kl"][:-1].clone()), "are not complete"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused(model, whole, tmp_path, name):
    change, message = DAMAGES[name]
    changed(whole, tmp_path / "state", change)
    with pytest.raises(InvalidInput) as error:
        report(model, state=ScanState(tmp_path / "state"))
    line = str(error.value)
    assert message in line and "delete it" in line and "\n" not in line


def test_one_flipped_bit_is_refused(model, whole, tmp_path):
    changed(whole, tmp_path / "state", fill("cells.losses", 2, 1.0), seal=False)
    with pytest.raises(InvalidInput, match="does not match its checksum; delete it"):
        report(model, state=ScanState(tmp_path / "state"))


@pytest.mark.parametrize("content", ["half", "empty", "text", "foreign", "schema", "folder"])
def test_what_is_no_state_is_refused(model, whole, tmp_path, content):
    path = tmp_path / "state"
    data = whole.read_bytes()
    if content == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif content == "schema":
        save_file(load_file(whole), path, load_header(whole).metadata | {"schema": "other/9"})
    elif content == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            {"half": data[: len(data) // 2], "empty": b"", "text": b"hello" * 9}[content]
        )
    with pytest.raises(InvalidInput) as error:
        report(model, state=ScanState(path))
    line = str(error.value)
    assert line.startswith(f"cannot continue from the state {path}: ") and "\n" not in line
    assert line.endswith("; delete it to start anew, or give another path")
    assert "download" not in line


def test_a_full_disk_ends_no_scan_and_loses_no_state(model, whole, tmp_path, monkeypatch):
    expected = report(model)
    path = tmp_path / "state"
    stopped(model, path, 2)
    before, lines = path.read_bytes(), []

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, "fsync", full)
    assert report(model, state=ScanState(path, 0.0, warn=lines.append)) == expected
    assert lines and all("No space left on device" in line for line in lines)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state"]
    monkeypatch.undo()
    assert report(model, state=ScanState(path)) == expected


def test_each_rank_has_its_own_file(whole, tmp_path):
    identity = json.loads(load_header(whole).metadata["identity"])
    names = set()
    for rank in range(2):
        state = ScanState(tmp_path / "state")
        state.begin(identity, Ranks(rank, 2))
        names.add(state.path.name)
    assert names == {"state.0-of-2", "state.1-of-2"}
    shutil.copy(whole, tmp_path / "state.1-of-2")
    with pytest.raises(InvalidInput, match="its rank is '0 of 1', of this scan '1 of 2'"):
        ScanState(tmp_path / "state").begin(identity | {"rank": "1 of 2"}, Ranks(1, 2))


@pytest.mark.parametrize("every", [-1, float("nan"), float("inf")])
def test_an_interval_that_is_none(every):
    with pytest.raises(InvalidInput, match="between two states"):
        ScanState("state", every)


def test_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(InvalidInput, match="there is no folder"):
        report(model, state=ScanState(tmp_path / "none" / "state"))
