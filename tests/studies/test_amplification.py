"""``amplification``: M by hooks and plain PyTorch, and the verdicts of made-up figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swkernels.detect.samples import as_samples
from swkernels.studies.recipe import Plan
from swkernels.studies.recipes.amplification import AMPLIFICATION, run_of
from swkernels.studies.runs.analyze import candidates
from tests.models.tiny import tiny_model
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, verdicts
from tests.studies.by_hand import made as made_of

PLAN = Plan(replace(tiny.TINY, length=13), tiny.TINY.seeds)  # windows that differ
NAME = "model.layers.{}.mlp.down_proj"


@pytest.fixture(scope="module")
def studied(planted, data, tmp_path_factory):
    """(figures, page, inputs of the down projections by prompt and layer, the checkpoint)."""
    output = tmp_path_factory.mktemp("amplification")
    figures = tiny.run(["amplification"], planted, data, output, PLAN)(run_of(PLAN))
    by_hand = Checkpoint(planted, data)
    text = (data / "text.txt").read_text()
    prompts, _ = as_samples(text, by_hand.tokenizer, 3, 13, "tokenizer", None)
    assert len({tuple(ids.tolist()) for ids in prompts}) == 3
    seen = []
    for layer in by_hand.model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for ids in prompts:
        by_hand.logits(ids)
    return figures, (output / "README.md").read_text(), list(zip(seen[::2], seen[1::2])), by_hand


def amplified(x: torch.Tensor) -> torch.Tensor:
    return x.double().abs() / x.double().abs().mean(1, keepdim=True)


def test_figures(studied):
    figures, _, inputs, _ = studied
    assert figures["prompts"] == 3 and figures["tokens"] == 39
    for layer, found in enumerate(figures["layers"]):
        values = [float(amplified(x[layer]).max()) for x in inputs]
        assert found["values"] == pytest.approx(values, rel=1e-5)
        best = max(range(3), key=values.__getitem__)
        assert found["channel"] == int(amplified(inputs[best][layer]).max(0).values.argmax())
    for found in figures["columns"]:
        layer = found["layer"]
        values = [float(amplified(x[layer])[:, found["column"]].max()) for x in inputs]
        assert found["values"] == pytest.approx(values, rel=1e-5)
        assert found["mean"] == pytest.approx(sum(values) / 3)


def test_groups(studied):
    figures, _, _, by_hand = studied
    groups: dict = {}
    for found in figures["columns"]:
        groups.setdefault(found["group"], []).append((found["layer"], found["column"]))
    largest = int(by_hand.down(0).abs().argmax()) % 48
    assert groups["super weight"] == [(1, 7)]  # also the largest of its layer
    assert groups["largest of a layer"] == [(0, largest)]
    assert 4 <= len(groups["random"]) <= 8  # of 8 positions; columns may fall together


def test_candidates_lie_in_layers_that_are_spread():
    model = tiny_model("llama")  # 3 layers

    class Lab:
        super_weights = tiny.Coordinates.of({NAME.format(1): [(0, 0)]}, model)

    Lab.model = model
    for top, layers in ((1, {1: 2}), (2, {0: 1, 1: 1, 2: 1}), (3, {0: 1, 1: 2, 2: 1}),
                        (7, {0: 2, 1: 3, 2: 2})):  # fmt: skip
        found = candidates(Lab, top)
        counts = {layer: len(found.weights.get((NAME.format(layer), None), ())) for layer in layers}
        assert counts == layers and len(found) == sum(layers.values())
        for layer in layers:
            matrix = model.get_submodule(NAME.format(layer)).weight.abs()
            row, column = divmod(int(matrix.argmax()), matrix.shape[1])
            listed = found.weights[NAME.format(layer), None].tolist()
            assert [row, column] in listed or listed == [[0, 0]]


def test_page(studied):
    figures, page, *_ = studied
    section = page.split("## amplification")[1].split("\n## ")[0]
    assert "| published, layer 3 | 52 |  | 226.5 |  |" in section
    mean = sum(figures["layers"][1]["values"]) / 3
    assert f"| layer 1 | {mean:.3g} [" in section
    assert "super weight" in section and "random columns" in section
    assert section.count("cannot be decided") == 3  # three prompts decide nothing


def made(layers, super_weight, largest=(3.0,) * 8, random=(1.5,) * 8) -> dict[str, bool | None]:
    """The verdicts of made-up values: of layers, and of columns."""

    def entry(layer, values, column=None, group=None):
        mean = sum(values) / len(values)
        return {
            "layer": layer, "module": NAME.format(layer), "expert": None, "column": column,
            "group": group, "values": list(values), "mean": mean, "median": mean,
            "maximum": max(values), "channel": 0, "prompt": 0, "token": 0,
        }  # fmt: skip

    columns = [
        entry(1, super_weight, 7, "super weight"),
        entry(0, largest, 3, "largest of a layer"),
        entry(0, random, 9, "random"),
    ]
    listed = [entry(layer, values) for layer, values in enumerate(layers)]
    figures = {"prompts": 8, "tokens": 64, "layers": listed, "columns": columns}
    return AMPLIFICATION.section(made_of({run_of(tiny.PLAN): figures}))


TYPICAL = (6.0, 7.0, 8.0, 6.5, 7.5, 7.0, 8.0, 6.0)
WIDE = (1.0, 30.0, 2.0, 1.0, 1.0, 20.0, 2.0, 1.0)
SMALL = (0.5, 0.4, 0.6, 0.5, 0.5, 0.4, 0.6, 0.5)
LARGE = (40.0,) * 8
LAYERS = "The mean M of most layers is 5 to 10."
EDGE = (0.5, 1.6, 0.6, 1.5, 0.5, 1.4, 0.6, 1.5)


@pytest.mark.parametrize(
    "layers, expected",
    [
        ([TYPICAL, TYPICAL, WIDE], True),
        ([TYPICAL, WIDE, WIDE], None),
        ([TYPICAL, SMALL, SMALL], False),
        ([TYPICAL, SMALL], False),  # half of them are not most
        ([TYPICAL, LARGE, LARGE], None),  # by another mean they may be inside
        ([LARGE, LARGE, LARGE], None),
        ([TYPICAL, TYPICAL, LARGE], True),
        ([TYPICAL, SMALL, LARGE], None),
    ],
)
def test_verdict_of_layers(layers, expected):
    (one,) = (v for v in made(layers, TYPICAL).verdicts if v.claim == LAYERS)
    assert one.holds is expected
    beyond = layers.count(LARGE)
    assert f"{layers.count(SMALL)} below and {beyond} above" in one.why
    assert ("by a mean over tokens M would be smaller" in one.why) is bool(beyond)


@pytest.mark.parametrize("values, expected", [(TYPICAL, True), (SMALL, False), (EDGE, None)])
def test_verdict_of_super_weights(values, expected):
    section = made([TYPICAL], values)
    assert verdicts(section)["M > 1 at super weights."] is expected
    assert verdicts(section)["M > 1 at the largest weights of layers."] is True
    why = {verdict.claim: verdict.why for verdict in section.verdicts}
    assert "1 of 1 random columns are above 1 as well" in why["M > 1 at super weights."]
    beyond = 1 if expected else 0
    assert f"{beyond} of these 1 are above all of them" in why["M > 1 at super weights."]
    assert "true of nearly any column" in why["M > 1 at super weights."]


def test_where_random_columns_are_not_above_one():
    section = made([TYPICAL], TYPICAL, random=SMALL)
    why = {verdict.claim: verdict.why for verdict in section.verdicts}["M > 1 at super weights."]
    assert "0 of 1 random columns are above 1" in why and "nearly any column" not in why


def test_before_anything_is_measured():
    section = AMPLIFICATION.section(made_of({}))
    assert section.settings and not section.parts and not section.verdicts
