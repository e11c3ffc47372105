"""Scaling chosen weights: the figures are those of a model that is changed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from swkernels.detect.perplexity import perplexity
from swkernels.errors import InvalidInput
from swkernels.evidence.scale import FACTORS, scale
from swkernels.evidence.tasks import Item, Task
from swkernels.evidence.yardstick import Yardstick
from swkernels.train import Coordinates
from tests.cli.checkpoints import make_model, make_tokenizer
from tests.evidence.bytes import digest

NAME = "model.layers.1.mlp.down_proj"
WEIGHTS = {NAME: [[5, 7], [3, 4]]}
TASK = Task(
    "words",
    tuple(Item(f"{i}", ("the weight of",), (" a", " python", " ."), i % 3) for i in range(6)),
    "by hand",
)


def test_each_dose_is_that_of_a_model_changed_by_hand(model, yardstick):
    before = digest(model)
    result = scale(model, WEIGHTS, yardstick, (0, 0.5, 1, -2), each=True)
    assert digest(model) == before
    assert [curve.name for curve in result.curves] == [
        "all together",
        "layer 1 [3, 4]",
        "layer 1 [5, 7]",
    ]
    intact = perplexity(model, yardstick.tokens, window=32)
    for curve, places in zip(result.curves, ([(3, 4), (5, 7)], [(3, 4)], [(5, 7)])):
        for dose, factor in zip(curve.doses, (0, 0.5, 1, -2)):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for row, column in places:
                    changed.model.layers[1].mlp.down_proj.weight[row, column] *= factor
            expected = perplexity(changed, yardstick.tokens, window=32)
            assert dose.factor == factor and dose.scores.perplexity == expected
            assert dose.ratio == pytest.approx(expected.value / intact.value, rel=1e-12)
            assert dose.error == expected.ratio(intact)[1]
    ratios = [dose.ratio for dose in result.curves[2].doses]
    assert ratios[2] == 1 and len(set(ratios)) == 4  # the factors do something


def test_one_evaluation_a_factor(model, yardstick, monkeypatch):
    seen, calls = [], []
    read = Yardstick.read
    monkeypatch.setattr(
        Yardstick, "read", lambda self, *a, **k: calls.append(1) or read(self, *a, **k)
    )
    scale(model, WEIGHTS, yardstick, progress=lambda *step: seen.append(step))
    assert len(calls) == len(FACTORS) == 9 and seen[-1] == ("scaling", 9, 9)
    calls.clear()
    result = scale(model, WEIGHTS, yardstick, (1,), each=True)
    assert len(calls) == 1 and [dose.ratio for c in result.curves for dose in c.doses] == [1, 1, 1]
    calls.clear()
    scale(model, f"{NAME}:5:7", yardstick, (0, 2), each=True)  # one weight is its own set
    assert len(calls) == 3


def test_tasks_alone_and_the_document(model, tmp_path):
    tokenizer = make_tokenizer()
    before = digest(model)
    result = scale(model, WEIGHTS, Yardstick(tasks=[TASK], tokenizer=tokenizer), (0, 1))
    assert digest(model) == before
    [curve] = result.curves
    assert curve.doses[0].ratio is None and "Perplexity" not in str(result)
    assert curve.doses[1].scores is result.intact and "right intact" in str(result)
    row = result.rows()[0]
    assert row["words"] == curve.doses[0].scores.choices["words"].accuracy and "ratio" not in row
    result.plot(tmp_path / "p.svg")
    assert "words, % correct" in (tmp_path / "p.svg").read_text()


def test_document_rows_and_figure(model, yardstick, tmp_path):
    result = scale(model, WEIGHTS, yardstick, (0, 1), each=True, name="a/b")
    found = result.to_dict()
    assert found["schema"] == "swkernels.scale/1" and found["model"] == "a/b"
    assert found["measures"]["tokens"] == len(yardstick.tokens)
    assert [(w["row"], w["column"]) for w in found["weights"]] == [(3, 4), (5, 7)]
    assert [curve["weights"] for curve in found["curves"]] == [[0, 1], [0], [1]]
    dose = found["curves"][0]["doses"][0]
    assert dose["scores"]["perplexity"]["losses"] and dose["ratio"] != 1
    frame = result.to_dataframe()
    assert list(frame["factor"]) == [0, 1] * 3 and frame["ratio"].iloc[0] == dose["ratio"]
    result.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_loss_that_is_not_finite_is_in_the_result(model, yardstick, tmp_path):
    before = digest(model)
    result = scale(model, f"{NAME}:5:7", yardstick, (1, 3e37))
    assert digest(model) == before
    dose = result.curves[0].doses[1]
    assert not math.isfinite(dose.ratio) and dose.error is None
    assert dose.scores.perplexity.not_finite > 0
    assert not dose.finite and result.curves[0].doses[0].finite
    assert "Losses are not finite with x3e+37." in str(result)
    result.save(tmp_path / "r.json")
    result.plot(tmp_path / "r.png")


@pytest.mark.parametrize(
    "factors, words",
    [
        ((), "one number at least"),
        ("012", "one number at least"),
        ((0, float("nan")), "finite number, got nan"),
        ((0, float("inf")), "finite number, got inf"),
        ((0, True), "finite number, got True"),
        ((0, "1"), "finite number, got '1'"),
        ((0.5, 1, 0.5), "0.5 is given more than once"),
        ((0, 3e38), r"3e\+38 times layer 1 \[5, 7\], which is 10, does not fit float32"),
    ],
)
def test_bad_factors_change_nothing(model, yardstick, factors, words, monkeypatch):
    monkeypatch.setattr(Yardstick, "read", lambda *a, **k: pytest.fail("measured"))
    before = digest(model)
    with pytest.raises(InvalidInput, match=words) as error:
        scale(model, WEIGHTS, yardstick, factors)
    assert "\n" not in str(error.value) and digest(model) == before


def test_the_range_is_that_of_the_weight_s_own_dtype(model, yardstick):
    with pytest.raises(InvalidInput, match="10000 times .* does not fit float16"):
        scale(model.half(), WEIGHTS, yardstick, (0, 1e4))


def test_a_measurement_that_fails_leaves_the_model_as_it_was(model, yardstick, monkeypatch):
    before = digest(model)
    read, calls = Yardstick.read, []

    def fails(self, *args, **kwargs):
        calls.append(digest(model))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Yardstick, "read", fails)
    with pytest.raises(KeyboardInterrupt):
        scale(model, WEIGHTS, yardstick, (1, 0, 2))
    assert len(set(calls)) == 3 and digest(model) == before


def test_tied_weights_are_noted(yardstick):
    model = make_model(tie_word_embeddings=True)
    coordinates = Coordinates.of({"lm_head": [[0, 0]]}, model)
    result = scale(model, coordinates, yardstick, (1,))
    assert len(result.notes) == 1 and "change together" in result.notes[0]


def test_a_broken_model_is_an_error(yardstick):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(InvalidInput, match="not finite"):
        scale(model, f"{NAME}:5:7", yardstick, (0, 1))
