from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swkernels import find_down_projections
from swkernels.models.experts import ExpertObserver, observe_experts

from .test_projections import UnfusedMoE
from .tiny import MIXTURES, MORE_MIXTURES, run, tiny_model, token_ids

AS_THEY_COME = ("jetmoe", "dbrx", "llama4")  # no choice of an experts implementation
CASES = [
    (name, implementation)
    for name in MIXTURES
    for implementation in (
        (None,) if name in AS_THEY_COME else ("eager", "grouped_mm", "batched_mm")
    )
] + [(name, None) for name in MORE_MIXTURES]
# How many experts a token goes to; in longcat_flash some of them are the identity.
CHOSEN = {"llama4": {1}, "switch_transformers": {1}, "longcat_flash": {0, 1, 2}}


def build(name, implementation):
    model = tiny_model(name)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # they begin as zeros, and a missing one would not show
            nn.init.normal_(parameter, std=0.1)
    return model


def by_scope(model):
    scopes = {}
    for p in find_down_projections(model):
        if p.scope is not None:
            scopes.setdefault(p.scope, []).append(p)
    return scopes


def seen_by(projections, call):
    """Return [(projection, expert, x, y, tokens)] of ``call``, and what it returns."""
    calls = []
    with observe_experts(projections, lambda *seen: calls.append(seen)):
        return calls, call()


def observe(model, ids):
    """Run with every mixture observed: logits, {projection: [(expert, x, y, tokens, bias)]}."""
    calls = {}

    def callback(p, expert, x, y, tokens):
        calls.setdefault(p, []).append((expert, x, y, tokens, bias_of(p, expert)))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for projections in by_scope(model).values():
            stack.enter_context(observe_experts(projections, callback))
        return run(model, ids).logits, calls


def bias_of(p, expert):
    if p.experts is None:
        return 0 if p.module.bias is None else p.module.bias
    bias = getattr(p.module, f"{p.parameter}_bias", None)
    return 0 if bias is None else bias[expert]


@pytest.mark.parametrize("name, implementation", CASES)
def test_every_routed_token_is_seen_once_with_what_it_went_through(name, implementation):
    model, ids = build(name, implementation), token_ids()
    with torch.no_grad():
        plain = run(model, ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        observed, calls = observe(model, ids)
    assert torch.equal(plain, observed)
    scopes = by_scope(model)
    assert {p.scope for p in calls} == set(scopes)
    assert all("forward" not in scope.__dict__ for scope in scopes)
    counted = {scope: torch.zeros(ids.numel(), dtype=torch.long) for scope in scopes}
    for p, seen in calls.items():
        for expert, x, y, tokens, bias in seen:
            assert len(x) == len(y) == len(tokens)
            assert (expert is None) == (p.experts is None)
            torch.testing.assert_close(y, x @ p.matrix(expert).T + bias)
            tokens = tokens[tokens >= 0]
            counted[p.scope].index_add_(0, tokens, torch.ones_like(tokens))
    for count in counted.values():
        assert count.sum() > 0 and set(count.tolist()) <= CHOSEN.get(name, {2})


@pytest.mark.parametrize("name, implementation", CASES)
def test_a_row_is_of_the_token_that_is_named(name, implementation):
    """Turn the order of the tokens round: each (expert, token) must keep its x."""
    model = build(name, implementation)
    scope, projections = list(by_scope(model).items())[-1]
    captured = []
    hook = scope.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        run(model, token_ids(batch=1))
        hook.remove()
        args, kwargs = captured[-1]
        count = args[0].numel() // args[0].shape[-1]

        def turned(value):
            is_rows = isinstance(value, torch.Tensor) and value.dim() > 1
            return value.flip(-2) if is_rows and value.shape[-2] == count else value

        calls, _ = seen_by(projections, lambda: scope(*args, **kwargs))
        turned_calls, _ = seen_by(
            projections, lambda: scope(*[turned(value) for value in args], **kwargs)
        )
    rows, turned_rows = (
        {
            (p.name, expert, t if order is calls else count - 1 - t): x[i]
            for p, expert, x, _, tokens in order
            for i, t in enumerate(tokens.tolist())
            if t >= 0
        }
        for order in (calls, turned_calls)
    )
    assert rows.keys() == turned_rows.keys() and len(rows) >= count
    for key, x in rows.items():
        torch.testing.assert_close(x, turned_rows[key])
    distinct = {tuple(x.tolist()) for x in rows.values() if x.any()}
    assert len(distinct) > count // 2  # the rows differ, so a wrong token would show


def test_the_fallback_of_grouped_products_is_seen(monkeypatch):
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args, **kwargs: False)
    test_every_routed_token_is_seen_once_with_what_it_went_through("mixtral", "grouped_mm")
    test_a_row_is_of_the_token_that_is_named("mixtral", "grouped_mm")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_rows_that_are_gathered_twice(name):
    """transformers 5.0 repeats the hidden states by an index and sorts them by another."""
    model = build(name, "eager")
    p = find_down_projections(model)[0]
    hidden = torch.randn(10, p.rows)
    experts = torch.randint(0, 4, (10, 2))
    token_of = torch.arange(10).repeat_interleave(2)
    order = experts.flatten().argsort()
    down = p.weight if p.layout == "eio" else p.weight.mT
    bias = getattr(p.module, "down_proj_bias", None)

    def forward(hidden):
        rows = hidden[token_of][order][:, :1] * torch.ones(p.columns)
        offsets = experts.flatten().bincount(minlength=4).cumsum(0).to(torch.int32)
        y = F.grouped_mm(rows, down, offs=offsets)
        return y if bias is None else y.add_(bias[experts.flatten()[order]])

    calls = []
    with torch.no_grad(), ExpertObserver([p], 10, lambda *seen: calls.append(seen)):
        forward(hidden)
    assert sum(len(tokens) for *_, tokens in calls) == 20
    for _, expert, x, y, tokens in calls:
        assert torch.equal(x[:, 0], hidden[tokens, 0])
        assert (experts[tokens] == expert).any(1).all()
        torch.testing.assert_close(y, x @ p.matrix(expert).T + bias_of(p, expert))


class SortedMoE(UnfusedMoE):
    """Tokens sorted by expert, then a slice for each: the way of older mixtures."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.moe.forward = self.infer(layer.moe)

    @staticmethod
    def infer(moe):
        def forward(hidden):
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, chosen = moe.gate(flat).softmax(-1).topk(2)
            order = chosen.flatten().argsort()
            rows, outputs, start = flat[order // 2], [], 0
            for expert, n in zip(moe.experts, chosen.flatten().bincount(minlength=3).tolist()):
                outputs.append(expert(rows[start : start + n]))
                start += n
            y = torch.empty_like(rows)
            y[order] = torch.cat(outputs)
            return (y.view(-1, 2, flat.shape[-1]) * weights[..., None]).sum(1).view_as(hidden)

        return forward


class MaskedMoE(SortedMoE):
    """A mask of tokens for each expert."""

    @staticmethod
    def infer(moe):
        def forward(hidden):
            flat = hidden.reshape(-1, hidden.shape[-1])
            chosen = moe.gate(flat).topk(2).indices
            y = torch.zeros_like(flat)
            for e, expert in enumerate(moe.experts):
                mask = (chosen == e).any(-1)
                y[mask] = y[mask] + expert(flat[mask])
            return y.view_as(hidden)

        return forward


def test_what_the_callback_computes_is_not_taken_for_the_model():
    torch.manual_seed(0)
    model, hidden = SortedMoE().eval(), torch.randn(1, 24, 16)
    (scope, projections), *_ = by_scope(model).items()
    calls = []

    def callback(*seen):
        calls.append(seen)
        hidden[0][torch.zeros(48, dtype=torch.long)]  # gathers as many rows as the mixture did

    with torch.no_grad(), observe_experts(projections, callback):
        scope(hidden)
    for p, _, x, _, tokens in calls:
        module = scope.experts[p.expert]
        rows = hidden[0][tokens]
        torch.testing.assert_close(x, F.silu(module.w1(rows)) * module.w3(rows))
    assert len(calls) == 3


@pytest.mark.parametrize("model_class", [UnfusedMoE, SortedMoE, MaskedMoE])
def test_experts_of_their_own_are_seen_with_their_tokens(model_class):
    torch.manual_seed(0)
    model = model_class().eval()
    (scope, projections), *_ = by_scope(model).items()
    hidden = torch.randn(2, 24, 16)
    with torch.no_grad():
        plain = scope(hidden)
        calls, observed = seen_by(projections, lambda: scope(hidden))
    assert torch.equal(plain, observed)
    seen = 0
    for p, expert, x, y, tokens in calls:
        module = scope.experts[p.expert]
        flat = hidden.reshape(-1, 16)[tokens]
        torch.testing.assert_close(x, F.silu(module.w1(flat)) * module.w3(flat))
        torch.testing.assert_close(y, module.w2(x))
        assert expert is None
        seen += len(tokens)
    assert seen == 2 * 48
    assert all("forward" not in p.module.__dict__ for p in projections)


def test_an_adapter_on_an_expert_is_part_of_its_output():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(UnfusedMoE(), LoraConfig(r=2, target_modules=["w2"])).eval()
    (_, projections), *_ = by_scope(model).items()
    for p in projections:
        nn.init.normal_(p.module.lora_B["default"].weight)
    with torch.no_grad():
        calls, _ = seen_by(projections, lambda: model(token_ids() % 50))
        for p, _, x, y, _ in calls:
            torch.testing.assert_close(y, p.module(x))
            assert not torch.allclose(y, x @ p.matrix().T)
    assert calls


def test_gradients_flow_through_an_observed_mixture():
    for implementation in ("eager", "grouped_mm"):  # batched_mm differs from itself in the last bit
        model = build("mixtral", implementation)
        p = find_down_projections(model)[0]
        run(model, token_ids()).logits.sum().backward()
        expected = p.weight.grad.clone()
        model.zero_grad()
        seen_by([p], lambda model=model: run(model, token_ids()).logits.sum().backward())
        assert torch.equal(p.weight.grad, expected) and expected.abs().max() > 0


def test_products_that_cannot_be_seen_are_said_to_be_unseen(monkeypatch):
    model = tiny_model("mixtral")
    p = find_down_projections(model)[0]
    experts = p.module

    def forward(hidden, index, weights):
        gate, up = torch.einsum("th,eih->tei", hidden, experts.gate_up_proj).chunk(2, -1)
        return torch.einsum("tei,ehi->th", F.silu(gate) * up, experts.down_proj)

    monkeypatch.setattr(experts, "forward", forward)
    with pytest.warns(RuntimeWarning, match=f"no product with the experts of {p.name}.*eager"):
        calls, _ = seen_by([p], lambda: run(model, token_ids()))
    assert calls == []


def test_a_failing_forward_leaves_the_modules_as_they_were():
    model = UnfusedMoE()
    (scope, projections), *_ = by_scope(model).items()

    def fail(*seen):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observe_experts(projections, fail):
        model(token_ids() % 50)
    assert "forward" not in scope.__dict__
    assert all("forward" not in p.module.__dict__ for p in projections)


def test_calls_without_positional_arguments_are_passed_over():
    p = find_down_projections(tiny_model("gpt_oss"))[0]
    with ExpertObserver([p], 0, lambda *seen: None):
        y = torch.zeros(size=(2, 2)) @ F.linear(input=torch.ones(2, 2), weight=torch.ones(2, 2))
        held = torch.ones(3, p.columns) @ p.weight[1]  # waits for its bias
        torch.zeros(size=(1,))
    assert y.sum() == 0 and held.shape == (3, p.rows)
