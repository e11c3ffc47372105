"""Planted truth: every planted coordinate is found, exactly; the unplanted twin has none."""

from __future__ import annotations

import pytest

import swkernels
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids

from .planting import plant, positions


def scan(model, **settings):
    return swkernels.scan(model, token_ids(4, 48, seed=5), eval_length=48, **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_single_weight(name):
    model = tiny_model(name)
    truth = plant(model, layer=1, seed=3)
    report = scan(model)
    assert positions(report.candidates) == truth
    (candidate,) = report.candidates
    assert candidate["verdict"] in ("super weight", "mild"), candidate["reason"]
    assert report.sets == [] and candidate["spikes"] >= 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_three_rows_fed_by_two_columns(name):
    model = tiny_model(name)
    truth = plant(model, layer=1, rows=3, columns=2, seed=3)
    report = scan(model)
    assert positions(report.candidates) == truth
    assert all(c["verdict"] != "inert" for c in report.candidates)
    assert [s["verdict"] for s in report.sets] in (["critical set"], ["mild"])
    assert len(report.sets[0]["members"]) >= 5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_unplanted_twin_has_none(name):
    report = scan(tiny_model(name))
    assert report.candidates == [] and report.super_weights == []
    assert report.data["summary"].startswith("None found")


@pytest.mark.parametrize("seed", range(5))
def test_several_layers_and_seeds(seed):
    model = tiny_model("llama", seed=seed, num_hidden_layers=4)
    truth = plant(model, layer=0, seed=seed) | plant(model, layer=2, columns=2, seed=seed + 10)
    found = scan(model).candidates
    assert positions(found) == truth


def test_a_weight_that_does_not_matter_is_inert():
    """A spike that the next layer takes back: strong, dominant and harmless."""
    model = tiny_model("llama")
    (spike,) = plant(model, layer=2, seed=3)
    # The last norm's gain for that channel is 0, so nothing after it sees the channel; the
    # others keep their direction because the norm is undone.
    import torch

    class Blind(torch.nn.Module):
        def forward(self, hidden):
            return hidden.index_fill(-1, torch.tensor([spike[3]]), 0.0)

    model.model.norm = Blind()
    report = scan(model)
    assert positions(report.candidates) == {spike}
    assert report.candidates[0]["verdict"] == "inert"
    assert report.super_weights == [] and report.data["summary"].startswith("None found")


def test_thresholds_are_far_from_the_planted_and_the_ordinary():
    """Any prominence from 10 to 60 and share from 0.05 to 0.4 gives the same answer."""
    planted, twin = tiny_model("mistral"), tiny_model("mistral")
    truth = plant(planted, layer=1, columns=2, seed=3)
    for prominence in (10, 20, 60):
        for share in (0.05, 0.1, 0.4):
            settings = dict(prominence=prominence, share=share, verify=False)
            assert positions(scan(planted, **settings).candidates) == truth
            assert scan(twin, **settings).candidates == []


def test_the_other_methods_and_how_they_compare():
    model = tiny_model("llama")
    single = plant(model, layer=1, seed=3)
    report = scan(
        model, methods=("dominance", "outlier", "threshold"), threshold=0.01, outlier_gamma=20,
        verify=False,
    )  # fmt: skip
    planted = [c for c in report.candidates if positions([c]) == single]
    assert planted[0]["methods"]["dominance"] and planted[0]["methods"]["outlier"]
    others = [c for c in report.candidates if positions([c]) != single]
    assert not any(c["methods"]["dominance"] or c["methods"]["outlier"] for c in others)
    layer = report.data["layers"][1]
    assert layer["out_peak"]["value"] > layer["mean"] + 20 * layer["std"]
