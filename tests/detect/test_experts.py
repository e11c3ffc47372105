"""Each expert has the peaks and the count of its own tokens, against routing by hand."""

from __future__ import annotations

import pytest
import torch

import swkernels
from tests.models.test_experts import CASES, build
from tests.models.test_projections import UnfusedMoE
from tests.models.tiny import run, token_ids

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
