"""A model that accelerate has dispatched to host memory or disk scans as one in memory does."""

from __future__ import annotations

import pytest
import torch

import swkernels
from swkernels.detect.evaluate import zeroed
from swkernels.detect.samples import Runner
from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from tests.detect.planting import plant
from tests.models.tiny import run, tiny_model, token_ids

accelerate = pytest.importorskip("accelerate")

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
          "model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
          "lm_head": "disk"}  # fmt: skip


def planted(name: str):
    model = tiny_model(name)
    plant(model, layer=1, rows=2, columns=2, seed=3)
    return model


def dispatched(name: str, how: str, folder):
    if how == "cpu":
        return accelerate.cpu_offload(planted(name), execution_device="cpu")
    if how == "disk":
        return accelerate.disk_offload(planted(name), str(folder), execution_device="cpu")
    return accelerate.dispatch_model(
        planted(name), PLACES, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def report(model) -> dict:
    found = swkernels.scan(
        model, token_ids(3, 24), eval_length=24, methods=("dominance", "outlier"), null_draws=2
    ).to_dict()
    assert found.pop("created") and found["candidates"]
    return found


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "cpu"), ("llama", "disk"), ("llama", "both"), ("mixtral", "both")]
)
def test_the_report_is_that_of_the_model_in_memory(name, how, tmp_path):
    model = dispatched(name, how, tmp_path)
    projection = find_down_projections(model)[1]
    assert projection.weight.is_meta
    owner = projection.module
    weights_map = owner._hf_hook.weights_map
    expected = run(planted(name), token_ids()).logits
    assert report(model) == report(planted(name))
    assert owner._hf_hook.weights_map is weights_map and projection.weight.is_meta
    assert torch.equal(run(model, token_ids()).logits, expected)
    with pytest.raises(InvalidInput, match="on the meta device"):
        projection.matrix(0)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_what_is_written_while_held_counts_and_comes_back(how, tmp_path):
    plain, model = planted("llama"), dispatched("llama", how, tmp_path)
    expected = run(plain, token_ids()).logits
    places = [(find_down_projections(m)[1], None, 3, 4) for m in (plain, model)]
    with torch.no_grad(), zeroed(places[:1]), zeroed(places[1:]):
        assert float(places[1][0].matrix()[3, 4]) == 0
        # A hold within a hold is the same one.
        with places[1][0].held():
            assert float(places[1][0].matrix()[3, 4]) == 0
        changed = run(model, token_ids()).logits
        assert torch.equal(changed, run(plain, token_ids()).logits)
        assert not torch.equal(changed, expected)
    assert torch.equal(run(model, token_ids()).logits, expected)
    assert torch.equal(places[1][0].row(3), places[0][0].row(3))


def test_a_weight_on_the_meta_device_that_nobody_has_is_refused():
    with torch.device("meta"):
        model = tiny_model("llama")
    projection = find_down_projections(model)[0]
    with projection.held(), pytest.raises(InvalidInput, match="on the meta device"):
        projection.row(0)
    assert Runner(model).device.type == "meta"
