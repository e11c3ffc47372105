"""The three measurements together: each part is what its own function gives."""

from __future__ import annotations

import json
import math

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.evidence.amplification import amplification
from swkernels.evidence.analyze import PUBLISHED, analyze
from swkernels.evidence.curvature import curvature
from swkernels.evidence.sensitivity import sensitivity
from swkernels.train import Coordinates
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, plant
from tests.evidence.bytes import digest

DOWN = "model.layers.{}.mlp.down_proj"
SETTINGS = dict(prompts=4, length=16, inputs=2, random=2, seed=3)


@pytest.fixture(scope="module")
def model():
    model = make_model(initializer_range=0.3)
    plant(model)
    return model


@pytest.fixture(scope="module")
def coordinates(model):
    return Coordinates.of({DOWN.format(1): [[5, 7], [6, 7]], DOWN.format(0): [[2, 3]]}, model)


@pytest.fixture(scope="module")
def found(model, coordinates):
    before = digest(model)
    found = analyze(model, coordinates, TEXT * 9, tokenizer=make_tokenizer(), **SETTINGS)
    assert digest(model) == before
    return found


def test_the_parts_are_those_of_the_functions(found, model, coordinates):
    ids = make_tokenizer()(TEXT * 9, add_special_tokens=False)["input_ids"]
    windows = [torch.tensor([0, *ids[start : start + 15]]) for start in range(0, 60, 15)]
    assert found.amplification == amplification(model, windows, coordinates=coordinates)
    options = dict(random=2, seed=3)
    curved = curvature(model, coordinates, windows[:2], **options)
    assert torch.equal(found.curvature.exact, curved.exact)
    assert torch.equal(found.curvature.finite_differences, curved.finite_differences)
    moved = sensitivity(model, coordinates, windows[:2], **options)
    assert torch.equal(found.sensitivity.measured, moved.measured)
    assert found.sensitivity.probe is found.curvature.probe


def test_rows(found):
    rows = found.rows()
    assert [(r["layer"], r["row"], r["column"]) for r in rows] == [(1, 5, 7), (1, 6, 7), (0, 2, 3)]
    assert rows[0]["amplification"] == rows[1]["amplification"]
    assert rows[0]["amplification"] == found.amplification.columns[1].spread.mean
    assert [r["curvature"] for r in rows] == [r["curvature"] for r in found.curvature.rows()]
    assert [r["differences_noise"] for r in rows] == [r["noise"] for r in found.curvature.rows()]
    assert [r["measured"] for r in rows] == [r["measured"] for r in found.sensitivity.rows()]
    ratios = {row["ratio"]: row for row in found.ratio_rows()}
    assert ratios["curvature, exact"]["mean"] == found.curvature.ratios.mean
    assert (
        ratios["curvature, differences"]["count"] + ratios["curvature, differences"]["undefined"]
        == 12
    )
    assert ratios["sensitivity, published"]["median"] == PUBLISHED["sensitivity"]["median"] == 1.09


def test_document_and_figure(found, tmp_path):
    found.save(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["schema"] == "swkernels.analysis/1"
    assert document["text"] == "text given by the caller" and document["seed"] == 3
    assert document["probe"]["curvatures"] == found.curvature.exact.tolist()
    assert "probe" not in document["curvature"] and "torch" in document["versions"]
    assert len(document["amplification"]["layers"]) == 2
    found.plot(tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    for words in ("mean_j |x_j|", "d2L/dw2", "H eps^2 / 2", "layer 1 [5, 7]", "noise"):
        assert words in drawn
    assert "mathdefault" not in drawn


def test_bad_arguments(model, coordinates):
    ids = [torch.tensor([4, 5, 6])]
    for changes, message in [
        (dict(prompts=0), "prompts must be an integer of at least 1, got 0"),
        (dict(inputs=2.0), "inputs must be an integer of at least 1, got 2.0"),
        (dict(length=1), "length must be at least 2 tokens, got 1"),
        (dict(eps=-1.0), "eps must be a finite number above 0"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            analyze(model, coordinates, ids, **changes)
    with pytest.raises(InvalidInput, match="texts need a tokenizer"):
        analyze(model, coordinates)


def test_fewer_prompts_than_inputs(model, coordinates):
    ids = [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9, 4])]
    found = analyze(model, coordinates, ids, prompts=1, inputs=9)
    assert found.amplification.prompts == 1 and found.curvature.probe.tokens == (3, 4)
    assert math.isfinite(found.rows()[0]["curvature"])
