"""``swkernels rank``: what it prints and writes is the ranking of the function."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from swkernels.cli import app, main
from swkernels.cli.rank import rank as command
from swkernels.evidence.edits import weights_of
from swkernels.evidence.rank import rank
from swkernels.train import Coordinates
from tests.cli.checkpoints import make_model, plant
from tests.models.tiny import tiny_model


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SWKERNELS_CACHE", str(tmp_path / "kept"))
    if all(registered.callback is not command for registered in app.registered_commands):
        monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])
        app.command()(command)
    return tmp_path / "kept" / "rank"


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    plant(model)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def go(*options) -> int:
    return main(["rank", *map(str, options)])


def digests(folder) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_prints_and_writes(folder, kept, tmp_path, capfd):
    before = digests(folder)
    assert go(folder, "-k", 200, "-o", tmp_path / "out") == 0
    printed, error = capfd.readouterr()
    ranking = rank(folder, 200, cache=False)
    out = tmp_path / "out"
    assert sorted(f.name for f in out.iterdir()) == ["coordinates.json", "rank.json", "rank.png"]
    assert error == "" and printed.endswith(f"{out / 'rank.json'}\n")
    assert json.loads((out / "rank.json").read_text()) == ranking.to_dict()
    assert Coordinates.load(out / "coordinates.json") == ranking.coordinates()
    assert weights_of(make_model(), out / "coordinates.json") == ranking.coordinates()
    lines = [line.split() for line in printed.splitlines()]
    for kind in ranking.kinds:
        shares = [round(100 * row[kind], 1) for row in ranking.shares()]
        (line,) = [line for line in lines if line[:1] == [kind]]
        assert [float(cell) for cell in line[1:-1]] == shares
    entries = [line for line in lines if len(line) == 8 and line[0].isdecimal()]
    assert [int(line[0]) for line in entries] == list(range(1, 21))
    assert entries[0] == ["1", "model.layers.1.mlp.down_proj", "1", "down", "-", "5", "7", "10"]
    total = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert f"ranked: {total:,} entries of 14 matrices of {folder}" in printed
    assert "left out, vector: 5 tensors (model.layers.*.input_layernorm.weight" in printed
    assert "left out, head: 1 tensor (lm_head.weight)" in printed
    assert digests(folder) == before and len(list(kept.iterdir())) == 1


def test_kinds_and_no_cache(folder, kept, tmp_path, capfd):
    options = ("-k", 30, "--module", "down", "--module", "up", "--no-cache")
    assert go(folder / "model.safetensors", *options, "-o", tmp_path / "out") == 0
    assert not kept.exists()
    found = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert set(found["sizes"]) == {"up", "down"} and found["k"] == 30
    assert "left out, not asked for: 10 tensors" in capfd.readouterr().out


def test_experts_without_a_name_are_told(tmp_path, capfd):
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[0].mul_(50)
    model.save_pretrained(tmp_path / "moe")
    assert go(tmp_path / "moe", "-k", 9, "-o", tmp_path / "a") == 0
    printed = capfd.readouterr().out
    assert "no coordinates.json" in printed and not (tmp_path / "a" / "coordinates.json").exists()
    assert go(tmp_path / "moe", "-k", 6000, "-o", tmp_path / "b") == 0
    named = Coordinates.load(tmp_path / "b" / "coordinates.json")
    assert f"coordinates.json has {len(named)} of the 6000 entries" in capfd.readouterr().out
    assert weights_of(model, tmp_path / "b" / "coordinates.json") == named


@pytest.mark.parametrize(
    "options, words",
    [
        (["-k", "0"], "k must be an integer from 1, got 0"),
        (["--module", "dwon"], "expected kinds of q, k"),
        (["--module", "gate_up"], "holds no gate_up"),
        (["--backend", "none"], "none"),
    ],
)
def test_bad_options(folder, tmp_path, capfd, options, words):
    assert go(folder, *options, "-o", tmp_path / "deep" / "out") == 2
    error = capfd.readouterr().err
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "deep").exists()


def test_bad_models(folder, tmp_path, capfd):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    for model, words in ((folder, "is truncated"), (tmp_path / "a.gguf", "load the model"),
                         (tmp_path / "none", "no such file or folder")):  # fmt: skip
        assert go(model) == 2
        error = capfd.readouterr().err
        assert error.startswith("swkernels: error: ") and error.count("\n") == 1 and words in error
