"""``swkernels scale``: a thin caller of ``swkernels.evidence.scale``."""

from __future__ import annotations

import json

import pytest

from swkernels.cli import main
from swkernels.cli.scale import _FACTORS, parse_factors
from swkernels.detect.perplexity import perplexity, tokens_of
from swkernels.errors import InvalidInput
from swkernels.evidence.scale import FACTORS
from tests.cli.checkpoints import TEXT, files, make_model, make_tokenizer, plant


@pytest.fixture
def go(planted, short_text):
    def go(*options):
        options = ("--text", short_text, "--window", 32, "--device", "cpu", *options)
        return main(["scale", str(planted), *map(str, options)])

    return go


def test_the_sweep(go, planted, tmp_path, capfd):
    before = files(planted)
    options = ["--weights", "1:5:7", "--weights", "1:3:4", "--each", "--factors", "0,0.5,...,1.5"]
    assert go(*options, "-o", tmp_path / "out") == 0
    assert files(planted) == before
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    printed, error = capfd.readouterr()
    assert error == "" and str(tmp_path / "out" / "scale.png") in printed
    assert found["model"] == str(planted) and found["measures"]["window"] == 32
    assert [curve["name"] for curve in found["curves"]][1:] == ["layer 1 [3, 4]", "layer 1 [5, 7]"]
    assert [dose["factor"] for dose in found["curves"][0]["doses"]] == [0, 0.5, 1, 1.5]

    model = make_model(initializer_range=0.3)
    plant(model)
    model.model.layers[1].mlp.down_proj.weight.data[5, 7] *= 1.5
    expected = perplexity(model, tokens_of(TEXT * 6, make_tokenizer()), window=32)
    dose = found["curves"][2]["doses"][3]
    assert dose["scores"]["perplexity"]["losses"] == list(expected.losses)
    assert found["summary"] in " ".join(printed.split()) and f"{expected.value:.4g}" in printed


def test_factors_by_themselves(go, tmp_path):
    assert tuple(parse_factors(_FACTORS.show_default)) == FACTORS
    assert go("--weights", "1:5:7", "--tokens", 40, "-o", tmp_path) == 0
    found = json.loads((tmp_path / "scale.json").read_text())
    assert tuple(dose["factor"] for dose in found["curves"][0]["doses"]) == FACTORS


@pytest.mark.parametrize(
    "text, factors",
    [
        ("0,.5,1", [0, 0.5, 1]),
        (" 2 ", [2]),
        ("0,0.25,...,1,3", [0, 0.25, 0.5, 0.75, 1, 3]),
        ("0.2,0.3,...,1.1", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]),
        ("2,1,…,-1", [2, 1, 0, -1]),
    ],
)
def test_factors_are_read(text, factors):
    assert parse_factors(text) == factors  # exactly: 1 is the intact model


@pytest.mark.parametrize(
    "text", ["", "a", "...", "0,...,3", "0,1,...", "0,1,...,...,3", "0,1,...,2.5", "1,1,...,2",
             "0,1,...,0", "0,1,...,inf", "0,,1"]
)  # fmt: skip
def test_factors_that_cannot_be_read(text):
    with pytest.raises(InvalidInput, match="whole steps to the last"):
        parse_factors(text)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--factors", "1,x"], "--factors must be numbers"),
        (["--factors", "1,nan"], "finite number"),
        (["--factors", "1,2,1"], "more than once"),
        (["--weights", "9:0:0"], "layer 9"),
        (["--weights", "1:99:0"], "outside"),
        (["--factors", "0,1e38"], "does not fit float32"),
        (["--weights", "catalogue"], "the catalogue has no"),
        (["--no-text"], "exclude each other"),
    ],
)
def test_errors_are_one_line_and_write_nothing(go, planted, tmp_path, capfd, options, words):
    before = files(planted)
    options = options if "--weights" in options else ["--weights", "1:5:7", *options]
    assert go(*options, "-o", tmp_path / "a" / "b") == 2
    printed, error = capfd.readouterr()
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir()) and files(planted) == before


def test_weights_are_asked_for(planted, capfd):
    assert main(["scale", str(planted)]) == 2
    assert "--weights" in capfd.readouterr().err
