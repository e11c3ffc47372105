"""A real model with a real critical set (see the measured facts in docs/detection.md)."""

from __future__ import annotations

import pytest
import torch

import swkernels
from swkernels import ops
from swkernels.detect import text
from tests.ops import oracle

PAIR = {(11, 507, 1229), (11, 507, 1487)}
MILD_PAIR = {(2, 507, 90), (2, 507, 430)}


@pytest.fixture(scope="module")
def report(smollm2):
    """A small scan: two samples, two evaluation windows."""
    model, tokenizer = smollm2
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = swkernels.scan(
        model, tokenizer=tokenizer, samples=2, length=512, eval_tokens=512, eval_length=256,
        null_draws=2,
    )  # fmt: skip
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return report


def coordinates(report, members):
    chosen = [report.candidates[i] for i in members]
    return {(c["layer"], c["row"], c["column"]) for c in chosen}


def candidate(report, layer, row, column):
    (found,) = [
        c for c in report.candidates if (c["layer"], c["row"], c["column"]) == (layer, row, column)
    ]
    return found


def test_the_critical_pair_of_layer_11(report):
    (critical,) = [s for s in report.sets if coordinates(report, s["members"]) == PAIR]
    assert critical["verdict"] == "critical set" and critical["ratio"] > 1000
    without_one = [m["ratio"] for m in critical["leave_one_out"]]
    assert max(without_one) < critical["ratio"] / 100
    strong, weak = candidate(report, 11, 507, 1229), candidate(report, 11, 507, 1487)
    assert strong["ratio"] > 2.5 and 1.02 < weak["ratio"] < 1.5
    assert weak["verdict"] == "part of a critical set"
    assert strong["weight"] == pytest.approx(5.876, abs=1e-3)
    assert strong["spikes"] == 2 and strong["persistence"] > 0.5


def test_the_mild_pair_of_layer_2(report):
    (mild,) = [s for s in report.sets if coordinates(report, s["members"]) == MILD_PAIR]
    assert mild["verdict"] == "mild" and 1.5 < mild["ratio"] < 4


def test_the_strong_spikes_of_the_last_layers_are_inert(report):
    for layer, column in ((28, 678), (29, 1165), (29, 999)):
        spike = candidate(report, layer, 507, column)
        assert spike["verdict"] == "inert" and spike["persistence"] == 0
        assert 0.95 < spike["ratio"] < 1.05 and spike["prominence"] > 50


def test_the_null_is_harmless_and_the_summary_says_what_was_found(report):
    assert report.data["null_distribution"]["ratio_max"] < 1.01
    assert "layer 11 [507, 1229]" in report.data["summary"]
    assert not report.data["summary"].startswith("None found")


def test_peaks_equal_those_of_plain_hooks(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(text.default_text()[:2000], return_tensors="pt").input_ids[:, :64]
    seen, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.mlp.down_proj.register_forward_hook(
                lambda module, args, y: seen.append((args[0][0], y[0]))
            )
        )
    with swkernels.track(model) as handle, torch.no_grad():
        model.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    for state, (x, y) in list(zip(handle.states, seen))[::7]:
        assert torch.equal(state.inputs[0], oracle.column_absmax(x))
        assert torch.equal(state.outputs[0], oracle.column_absmax(y))
    values = ops.peaks(handle.states[11].outputs[0]).values
    assert int(values.argmax()) == 507


def test_skipping_blocks_before_a_weight_changes_no_bit(smollm2):
    """What ``replay`` saves must not show in any figure."""
    from swkernels.detect.evaluate import Evaluator
    from swkernels.detect.samples import Runner

    model, tokenizer = smollm2
    ids = tokenizer(text.default_text()[:1000], return_tensors="pt").input_ids[:, :48]
    projections = swkernels.find_down_projections(model)
    sets = [[(projections[11], None, 507, 1229)], [(projections[28], None, 507, 678)]]
    quick = Evaluator(Runner(model).logits, [ids], projections)
    full = Evaluator(Runner(model).logits, [ids], [])
    for a, b in zip(quick.measure(sets), full.measure(sets)):
        assert (a.losses, a.kls, a.ratio) == (b.losses, b.kls, b.ratio)
    assert quick._replays and not full._replays
