"""``track(fused=True)``: one kernel for the gated product and its peaks."""

from __future__ import annotations

import copy

import pytest
import torch

import swkernels
from swkernels import ops
from swkernels.models import find_down_projections
from tests.detect.test_tracking import keys_of
from tests.models.tiny import run, tiny_model, token_ids
from tests.ops import oracle

FUSES = ["llama", "qwen3", "gemma2", "phi3", "olmo2", "stablelm", "granite", "lfm2", "glm4"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def states_and_activations(model, ids, **keywords):
    """The handle's states, and what each down projection got and gave while tracked."""
    seen = {}
    handle = swkernels.track(model, fused=True)
    hooks = []
    for p in find_down_projections(model):

        def hook(module, args, y, name=p.name):
            seen[name] = args[0].detach().clone(), y.detach().clone()

        hooks.append(p.module.register_forward_hook(hook))
    with torch.no_grad():
        logits = run(model, ids, **keywords).logits
    for hook in hooks:
        hook.remove()
    handle.remove()
    return handle, seen, logits


@pytest.mark.parametrize("name", FUSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaks_are_those_of_what_the_projection_gets(name, dtype):
    model, ids = tiny_model(name).to(dtype).eval(), token_ids(2, 20)
    handle, seen, logits = states_and_activations(model, ids)
    names = [state.projection.name for state in handle.states]
    assert handle.report.fused == tuple(name.rpartition(".")[0] for name in names)
    assert handle.report.unfused == ()
    for state in handle.states:
        x, y = seen[state.projection.name]
        assert torch.equal(state.inputs[0], oracle.column_absmax(x.flatten(0, -2)))
        assert torch.equal(state.outputs[0], oracle.column_absmax(y.flatten(0, -2)))
    exact = run(copy.deepcopy(model).double(), ids).logits
    plain = run(model, ids).logits
    assert error(logits, exact) <= 2 * error(plain, exact)


def error(logits, exact):
    return ((logits.double() - exact).norm() / exact.norm()).item()


def test_padding_and_several_forwards_are_numbered_as_without():
    model, ids = tiny_model("llama").eval(), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    handles = []
    for fused in (False, True):
        with swkernels.track(model, fused=fused) as handle, torch.no_grad():
            run(model, ids, attention_mask=mask)
            run(model, ids[:, :7])
        handles.append(handle)
    for plain, fused in zip(*(handle.states for handle in handles)):
        of_plain, of_fused = (ops.peaks(state.inputs[0]) for state in (plain, fused))
        torch.testing.assert_close(of_fused.values, of_plain.values)
        assert (of_fused.tokens == of_plain.tokens).float().mean() > 0.98
        assert int(of_fused.tokens.max()) < 12 + 7 + 14


def test_the_model_is_restored_exactly_and_without_fused_nothing_changes():
    model, ids = tiny_model("llama").eval(), token_ids(2, 9)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    plain = run(model, ids).logits
    keys = list(model.state_dict())
    with swkernels.track(model, fused=True):
        assert list(model.state_dict()) == keys
        run(model, ids)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    with swkernels.track(model) as handle:
        assert torch.equal(run(model, ids).logits, plain)
    assert handle.report.fused == ()


def test_gradients_are_those_of_the_plain_model():
    model, ids = tiny_model("llama").double(), token_ids(2, 9)
    plain = copy.deepcopy(model)
    run(plain, ids).logits.square().sum().backward()
    with swkernels.track(model, fused=True):
        run(model, ids).logits.square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_checkpointing_repeats_is_not_counted_again(reentrant):
    model, ids = tiny_model("llama").train(), token_ids(2, 9)
    with swkernels.track(model, fused=True) as once:
        run(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with swkernels.track(model, fused=True) as handle:
        run(model, ids).logits.sum().backward()
    assert all(
        torch.equal(a, b) for x, y in zip(keys_of(once), keys_of(handle)) for a, b in zip(x, y)
    )
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())


def test_compiled():
    model, ids = tiny_model("llama").eval(), token_ids(2, 9)
    with swkernels.track(model, fused=True) as eager, torch.no_grad():
        run(model, ids)
    with swkernels.track(model, fused=True) as handle, torch.no_grad():
        torch.compile(model, backend="aot_eager")(input_ids=ids, use_cache=False)
    for ours, theirs in zip(handle.states, eager.states):
        torch.testing.assert_close(
            ops.peaks(ours.inputs[0]).values, ops.peaks(theirs.inputs[0]).values
        )


def test_what_is_not_fused_is_tracked_as_before_and_says_why():
    for name, reason in (("gpt2", "is not known"), ("mixtral", "it is an expert")):
        model, ids = tiny_model(name).eval(), token_ids(2, 9)
        with swkernels.track(model) as plain, torch.no_grad():
            run(model, ids)
        with swkernels.track(model, fused=True) as handle, torch.no_grad():
            run(model, ids)
        assert handle.report.fused == ()
        assert len(handle.report.unfused) == len(handle.states)
        assert all(reason in why for _, why in handle.report.unfused)
        assert all(
            torch.equal(a, b) for x, y in zip(keys_of(plain), keys_of(handle)) for a, b in zip(x, y)
        )


def test_peaks_of_each_sample_are_kept_without_fusing():
    model, ids = tiny_model("llama").eval(), token_ids(2, 9)
    with swkernels.track(model, fused=True, per_sample=True) as handle, torch.no_grad():
        run(model, ids)
    assert handle.report.fused == ()
    assert "each sample" in handle.report.unfused[0][1]
    assert handle.states[0].sample_inputs is not None
