"""``swkernels analyze``: what the function finds, as tables, JSON and a figure."""

from __future__ import annotations

import inspect
import json

import pytest

from swkernels.cli import main
from swkernels.cli.analyze import analyze as command
from swkernels.detect import loading
from swkernels.evidence.analyze import analyze
from swkernels.train import Coordinates
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, plant

DOWN = "model.layers.{}.mlp.down_proj"
WEIGHTS = ["--weights", "1:5:7", "--weights", "0:2:3"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 9, encoding="utf-8")
    return path


@pytest.fixture
def go(planted, text):
    def go(*options, weights=WEIGHTS):
        fixed = ["--text", text, "--prompts", 3, "--inputs", 2, "--length", 12, "--device", "cpu"]
        return main(["analyze", str(planted), *map(str, [*fixed, *weights, *options])])

    return go


def test_tables_and_files(go, text, tmp_path, capfd):
    assert go("-o", tmp_path / "out", "--random", 2, "--seed", 5) == 0
    printed, error = capfd.readouterr()
    document = json.loads((tmp_path / "out" / "analyze.json").read_text())
    model = make_model(initializer_range=0.3)
    plant(model)
    expected = analyze(
        model, Coordinates.of({DOWN.format(1): [[5, 7]], DOWN.format(0): [[2, 3]]}, model),
        TEXT * 9, tokenizer=make_tokenizer(), prompts=3, inputs=2, length=12, random=2, seed=5,
        source=str(text),
    )  # fmt: skip
    assert document["rows"] == expected.rows()
    assert document["probe"]["controls"] == expected.to_dict()["probe"]["controls"]
    assert document["text"] == str(text)
    assert (tmp_path / "out" / "analyze.png").read_bytes()[:4] == b"\x89PNG"
    assert error == "" and printed.endswith("analyze.json\n")
    for words in ("layer 1 [5, 7]", "layer 0 [2, 3]", "M = |x_c| / mean_j |x_j|", "published"):
        assert words in printed
    assert "of the differences and" in printed and "74.5" in printed


def test_twice_gives_the_same_files(go, tmp_path):
    for name in ("a", "b"):
        assert go("-o", tmp_path / name) == 0
    for name in ("analyze.json", "analyze.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_defaults_are_the_functions():
    ours = {k: p.default for k, p in inspect.signature(command).parameters.items()}
    theirs = {k: p.default for k, p in inspect.signature(analyze).parameters.items()}
    for name in ("prompts", "length", "inputs", "random", "eps", "seed"):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", 0], "--prompts must be at least 1, got 0"),
        (["--length", 1], "--length must be at least 2, got 1"),
        (["--inputs", 0], "--inputs must be at least 1, got 0"),
        (["--random", 0], "--random must be at least 1, got 0"),
        (["--eps", 0], "--eps must be a finite number above 0, got 0"),
        (["--eps", "nan"], "--eps must be a finite number above 0, got nan"),
        (["--device", "gpu9"], "unknown device 'gpu9'"),
        (["--text", "gone.txt"], "cannot read the text gone.txt"),
    ],
)
def test_bad_options_are_refused_before_a_model_loads(go, monkeypatch, capfd, options, message):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert go(*options) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (["--weights", "7:1:1"], [], "no down projection in layer 7"),
        (["--weights", "1:99:1"], [], "lies outside"),
        (["--weights", "elsewhere"], [], "expected a report.json"),
        (WEIGHTS, ["--dtype", "bfloat16"], "load the model in float32"),
    ],
)
def test_what_does_not_fit_leaves_nothing(go, tmp_path, capfd, weights, options, message):
    assert go("-o", tmp_path / "deep" / "out", *options, weights=weights) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "deep").exists()
