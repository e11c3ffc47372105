from __future__ import annotations

import pytest
import torch

from swkernels import find_down_projections
from swkernels.models.experts import ExpertObserver

from .test_projections import UnfusedMoE
from .tiny import MIXTURES, run, tiny_model, token_ids


def observe(model, ids, **keywords):
    """Run the model with every mixture observed; return logits and calls per projection."""
    calls = {}
    scopes = {}
    for p in find_down_projections(model):
        if p.scope is not None:
            scopes.setdefault(p.scope, []).append(p)
    restore = []
    for scope, projections in scopes.items():
        original = scope.forward

        def forward(*args, original=original, projections=projections, **kwargs):
            hidden = args[0]

            def callback(p, e, x, y, tokens):
                calls.setdefault(p, []).append((e, x, y, tokens, hidden))

            with ExpertObserver(projections, hidden.numel() // hidden.shape[-1], callback):
                return original(*args, **kwargs)

        scope.forward = forward
        restore.append(scope)
    with torch.no_grad():
        output = run(model, ids) if hasattr(model, "config") else model(ids)
    for scope in restore:
        del scope.forward
    return getattr(output, "logits", output), calls


IMPLEMENTATIONS = [
    (name, implementation)
    for name in MIXTURES
    for implementation in (
        (None,)
        if name in ("jetmoe", "dbrx", "llama4")
        else ("eager", "grouped_mm", "batched_mm")
    )
]


@pytest.mark.parametrize("name, implementation", IMPLEMENTATIONS)
def test_every_routed_token_is_seen_once_with_what_it_went_through(name, implementation):
    model = tiny_model(name)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    ids = token_ids()
    with torch.no_grad():
        plain = run(model, ids).logits
    observed, calls = observe(model, ids)
    assert torch.equal(plain, observed)
    projections = [p for p in find_down_projections(model) if p.scope is not None]
    assert {p.name for p in calls} == {p.name for p in projections}
    chosen = 1 if name == "llama4" else 2
    for p, seen in calls.items():
        bias = getattr(p.module, f"{p.parameter}_bias", None)
        counted = torch.zeros(ids.numel(), dtype=torch.long)
        for expert, x, y, tokens, _ in seen:
            assert len(x) == len(y) == len(tokens)
            expected = x @ p.matrix(expert).T + (0 if bias is None else bias[expert])
            torch.testing.assert_close(y, expected)
            counted.index_add_(0, tokens[tokens >= 0], torch.ones_like(tokens[tokens >= 0]))
        assert counted.tolist() == [chosen] * ids.numel()


def test_tokens_are_the_ones_that_were_routed():
    """Recompute the experts' input from the hidden state of the token that is named."""
    model = tiny_model("mixtral")
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        _, calls = observe(model, token_ids())
        for p, seen in calls.items():
            for expert, x, _, tokens, hidden in seen:
                flat = hidden.reshape(-1, hidden.shape[-1])[tokens]
                gate, up = (flat @ p.module.gate_up_proj[expert].T).chunk(2, -1)
                torch.testing.assert_close(x, torch.nn.functional.silu(gate) * up)


def test_experts_of_their_own_are_seen_with_their_tokens():
    torch.manual_seed(0)
    model = UnfusedMoE()
    ids = token_ids() % 50
    _, calls = observe(model, ids)
    for p, seen in calls.items():
        expert_module = model.layers[p.layer].moe.experts[p.expert]
        for expert, x, y, tokens, hidden in seen:
            flat = hidden.reshape(-1, 16)[tokens]
            expected = torch.nn.functional.silu(expert_module.w1(flat)) * expert_module.w3(flat)
            assert expert is None
            torch.testing.assert_close(x, expected)
            torch.testing.assert_close(y, x @ p.matrix().T)


def test_gradients_flow_through_an_observed_mixture():
    model = tiny_model("mixtral")
    p = find_down_projections(model)[0]
    original = p.scope.forward

    def forward(hidden):
        with ExpertObserver([p], hidden.numel() // hidden.shape[-1], lambda *call: None):
            return original(hidden)

    run(model, token_ids()).logits.sum().backward()
    expected = p.weight.grad.clone()
    model.zero_grad()
    p.scope.forward = forward
    run(model, token_ids()).logits.sum().backward()
    assert torch.equal(p.weight.grad, expected) and expected.abs().max() > 0
