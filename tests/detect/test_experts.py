"""Each expert has the peaks and the count of its own tokens, against routing by hand."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import swkernels
from swkernels.cli import main
from swkernels.detect import page, table
from swkernels.detect.report import ScanReport
from tests.cli.checkpoints import TEXT, VOCABULARY, save
from tests.models.test_experts import CASES, build
from tests.models.test_projections import UnfusedMoE
from tests.models.tiny import run, tiny_model, token_ids

from .planting import plant, positions
from .routing import by_hand


def padded(batch=3, length=16):
    """Token ids, a mask with padding on both sides, and the running index of each token."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :5], mask[2, -4:] = 0, 0
    flat = mask.flatten()
    return token_ids(batch, length), mask, (flat.cumsum(0) - 1).masked_fill(flat == 0, -1)


def check_side(peaks, values, index):
    """Peaks of one expert are those of its rows ``values`` [n, C] with ``index`` [n] >= 0."""
    kept = values[index >= 0].abs()
    torch.testing.assert_close(peaks.values.double(), kept.amax(0), rtol=2e-5, atol=1e-7)
    row_of = {token: row for row, token in enumerate(index[index >= 0].tolist())}
    rows = torch.tensor([row_of[token] for token in peaks.tokens.tolist()])
    at_token = kept.gather(0, rows[None]).squeeze(0)
    torch.testing.assert_close(at_token, kept.amax(0), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name, implementation", CASES)
def test_peaks_and_counts_are_those_of_the_routed_tokens(name, implementation, per_sample):
    model = build(name, implementation)
    ids, mask, index = padded()
    masks = {"attention_mask": mask}
    if model.config.is_encoder_decoder:
        masks["decoder_attention_mask"] = mask
    expected = by_hand(model, ids, **masks)
    with swkernels.track(model, per_sample=per_sample, backend="reference") as handle:
        with torch.no_grad():
            run(model, ids, **masks)
    seen = 0
    for state in handle.states:
        fused = state.projection.experts is not None
        for site in state.peaks():
            if state.projection.scope is None:
                assert site.routed == mask.sum()
                continue
            key = (site.name, site.expert)
            x, y, tokens = expected.get(key, (None, None, torch.empty(0, dtype=torch.long)))
            counted = index[tokens]
            assert site.routed == (counted >= 0).sum()
            e = site.expert if fused else 0
            if site.routed:
                seen += 1
                check_side(site.inputs, x, counted)
                check_side(site.outputs, y, counted)
            else:
                assert state.inputs[e].max() == 0 and state.outputs[e].max() == 0
    assert seen >= 3


def test_experts_that_are_modules_count_their_own_tokens():
    torch.manual_seed(0)
    model, ids = UnfusedMoE().eval(), token_ids() % 50
    routers = {f"layers.{i}.moe": layer.moe for i, layer in enumerate(model.layers)}
    chosen = {}
    for name, moe in routers.items():
        moe.gate.register_forward_hook(
            lambda module, args, logits, name=name: chosen.update({name: logits.topk(2).indices})
        )
    with swkernels.track(model) as handle, torch.no_grad():
        model(ids)
        model(ids)
    for site in handle.peaks():
        picks = chosen[site.name.partition(".experts")[0]]
        assert site.routed == 2 * (picks == site.expert).sum()
    handle.reset()
    assert [site.routed for site in handle.peaks()] == [0] * 6


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "dbrx", "switch_transformers"])
def test_a_planted_super_expert_is_named(name):
    model = tiny_model(name)
    truth = plant(model, layer=1, seed=3, routed=True)
    report = swkernels.scan(model, token_ids(4, 48, seed=5), eval_length=48, null_draws=2)
    assert positions(report.candidates) == truth
    (candidate,) = report.candidates
    ((layer, module, expert, _, _),) = truth
    assert expert is not None
    supers = report.data["super_experts"]
    if name == "switch_transformers":  # a loss that is there, but does not ruin the model
        assert candidate["verdict"] == "mild" and supers == []
        return
    assert candidate["verdict"] == "super weight"
    (found,) = supers
    assert (found["layer"], found["module"], found["expert"]) == (layer, module, expert)
    assert found["candidates"] == found["zeroed"] == [0] and found["sets"] == []
    assert found["ratio"] == candidate["ratio"] and found["routed"] > 0
    assert f"1 super expert: layer {layer} expert {expert}." in report.data["summary"]
    (position,) = {p["expert"] for p in report.data["consistency"]["positions"]}
    assert position == expert


def test_experts_that_no_token_reached_are_unseen_and_not_clean():
    model = tiny_model("mixtral", num_local_experts=16)
    data = swkernels.scan(model, token_ids(1, 4), eval_length=4).to_dict()
    seen = {(e["layer"], e["expert"]) for e in data["layers"]}
    unseen = {(e["layer"], e["expert"]) for e in data["unseen"]}
    assert len(unseen) >= 3 * 8 and not seen & unseen
    assert seen | unseen == {(layer, e) for layer in range(3) for e in range(16)}
    for layer in range(3):
        assert sum(e["routed"] for e in data["layers"] if e["layer"] == layer) == 2 * 4
    assert data["summary"].startswith("None found in what tokens reached: ")
    assert f"{len(unseen)} of 48 experts unseen" in data["summary"]
    console = Console(file=io.StringIO(), width=100, color_system=None)
    table.render(data, console)
    assert "Unseen in layer 0: " in console.file.getvalue()
    assert "No super weight found in what tokens reached" in page.render(data)


def test_the_command_names_a_super_expert(tmp_path, capfd):
    model = tiny_model("mixtral", vocab_size=VOCABULARY, num_local_experts=4)
    ((layer, _, expert, row, column),) = plant_small(model)
    folder, text = save(model, tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    options = ["--samples", "2", "--length", "16", "--eval-tokens", "64", "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["scan", str(folder), *options, "--text", str(text), "-o", str(out)]) == 0
    data = ScanReport.load(out / "report.json").to_dict()
    found = data["candidates"][0]
    assert (found["layer"], found["expert"], found["row"], found["column"]) == (
        layer, expert, row, column,
    )  # fmt: skip
    assert f"layer {layer} expert {expert} [{row}, {column}]" in data["summary"]
    assert "Experts: 12 in 3 mixtures" in capfd.readouterr().out
    assert "<h2>Experts</h2>" in (out / "report.html").read_text(encoding="utf-8")


def plant_small(model):
    """A super weight in the expert that most tokens of the command's vocabulary go to."""
    ids = torch.arange(64).view(2, 32) % VOCABULARY
    with swkernels.track(model) as handle, torch.no_grad():
        run(model, ids)
    state = handle.states[1]
    e = int(state.routed.argmax())
    column = int(state.peaks()[e].inputs.values.argmax())
    with torch.no_grad():
        state.projection.matrix(e)[5, column] = 100.0
    return {(1, state.projection.name, e, 5, column)}
