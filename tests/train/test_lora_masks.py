"""What coordinates name in adapted weights, and how much of a LoRA masks touch."""

from __future__ import annotations

import json

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, lora_mask_report
from swkernels.train.lora_masks import LayerCoordinates
from tests.models.tiny import tiny_model

BLOCK = "model.layers.{}"
DOWN, Q, K = (f"{BLOCK}.{n}" for n in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"))


def inside(listed, name, shape=(32, 32), adapted=()):
    return listed.place(name, shape, adapted).inside.tolist()


def test_a_modules_own_coordinates_come_before_its_layers():
    listed = LayerCoordinates({Q.format(0): [[1, 2]], DOWN.format(0): [[3, 4]], 1: [[5, 6]]})
    adapted = {Q.format(n) for n in (0, 1, 11)} | {K.format(n) for n in (0, 1, 11)}
    assert inside(listed, Q.format(0), adapted=adapted) == [[1, 2]]
    assert inside(listed, K.format(0), adapted=adapted) == [[3, 4]]  # q's are q's alone
    assert inside(listed, K.format(1), adapted=adapted) == [[5, 6]]
    assert inside(listed, K.format(11), adapted=adapted) == []  # layer 11 is not layer 1
    assert inside(listed, "lm_head", adapted=adapted) == []


def test_what_lies_outside_is_counted():
    listed = LayerCoordinates({0: [[3, 4], [40, 4], [3, 40], [3, 4]]})
    place = listed.place(Q.format(0), (32, 32))
    assert place.inside.tolist() == [[3, 4]] and place.outside == 2


def test_the_studys_count():
    """r x (unique rows + unique columns) of every projection, for coordinates inside it."""
    model = tiny_model("llama")
    pairs = torch.tensor([[3, 4], [3, 5], [7, 4], [8, 60]])
    coordinates = Coordinates.of({DOWN.format(1): pairs}, model)
    report = lora_mask_report(model, coordinates, r=8)
    by_name = {m.name: m for m in report.modules}
    assert len(by_name) == 12
    q = by_name[Q.format(1)]
    D, H = q.shape
    fits = [(r, c) for r, c in pairs.tolist() if r < D and c < H]
    assert (q.rows, q.columns) == (len({r for r, _ in fits}), len({c for _, c in fits}))
    assert q.outside == len(pairs) - len(fits) > 0
    assert q.rows_in_bounds == len({r for r, _ in pairs.tolist() if r < D})
    assert q.parameters == 8 * (D + H) and q.touched == 8 * (q.rows + q.columns)
    assert by_name[Q.format(0)].touched == 0
    assert report.touched == sum(m.touched for m in report.modules)
    assert f"in total {report.touched:,} of {report.parameters:,}" in str(report)


def test_totals_of_the_published_models():
    """2,097,152 and 8,388,608 parameters: r = 8 on q, k, v, o of OLMo-1B and OLMo-7B."""
    for layers, width, total in ((16, 2048, 2_097_152), (32, 4096, 8_388_608)):
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        shapes = {
            f"{BLOCK.format(i)}.self_attn.{name}": (width, width)
            for i in range(layers)
            for name in names
        }
        # One coordinate in each layer, and one of the down projection outside the attention.
        listed = {i: [[i, i + 1], [i, width + 1]] for i in range(layers)}
        report = lora_mask_report(shapes, listed, r=8)
        assert report.parameters == total
        assert report.touched == 8 * 4 * 2 * layers
        assert report.outside == 4 * layers


def test_files_and_reports(tmp_path):
    model = tiny_model("llama")
    coordinates = Coordinates.of({DOWN.format(1): [[3, 4]]}, model)
    for name in ("c.json", "c.safetensors"):
        coordinates.save(tmp_path / name)
        assert inside(LayerCoordinates(tmp_path / name), Q.format(1)) == [[3, 4]]
    (tmp_path / "other.json").write_text(json.dumps({"candidates": []}))
    with pytest.raises(InvalidInput, match="expected a report"):
        LayerCoordinates(tmp_path / "other.json")


@pytest.mark.parametrize(
    "given, says",
    [
        (None, "expected|must be"),
        ({}, "not empty"),
        ({0: []}, r"integers \[k, 2\]"),
        ({0: [[1.5, 2]]}, "integers"),
        ({0: [[1], [2, 3]]}, "integers"),
        ({0: [[-1, 2]]}, "negative"),
        ({True: [[1, 2]]}, "number of a layer"),
    ],
)
def test_bad_coordinates(given, says):
    with pytest.raises(InvalidInput, match=says):
        LayerCoordinates(given)


def test_bad_reports():
    model = tiny_model("llama")
    for r in (0, -1, 2.0, True):
        with pytest.raises(InvalidInput, match="r must be an integer from 1"):
            lora_mask_report(model, {0: [[1, 2]]}, r=r)
    with pytest.raises(InvalidInput, match="no linear layer called q_projection; .*q_proj"):
        lora_mask_report(model, {0: [[1, 2]]}, target_modules=["q_projection"])
    with pytest.raises(InvalidInput, match="1 coordinates of its layer lie outside"):
        lora_mask_report(model, {0: [[1, 5000]]}, strict=True)
