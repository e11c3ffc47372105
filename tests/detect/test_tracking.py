from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import swkernels
from swkernels import ops
from swkernels.errors import InvalidInput, NonFiniteActivation
from swkernels.models import ProjectionNotFound, find_down_projections
from tests.models.test_projections import HandWritten, UnfusedMoE
from tests.models.tiny import VOCABULARY, run, tiny_model, token_ids
from tests.ops import oracle


def captured(model, ids, **keywords):
    """The input and output of every dense down projection, by plain hooks."""
    seen, hooks = {}, []
    for p in find_down_projections(model):

        def hook(module, args, y, name=p.name):
            seen[name] = (args[0].detach().clone(), y.detach().clone())

        hooks.append(p.module.register_forward_hook(hook))
    with torch.no_grad():
        run(model, ids, **keywords)
    for hook in hooks:
        hook.remove()
    return seen


def keys_of(handle):
    return [(state.inputs.clone(), state.outputs.clone()) for state in handle.states]


def equal(a, b):
    return all(torch.equal(x, y) for pair in zip(a, b) for x, y in zip(*pair))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gemma2", "lfm2"])
def test_peaks_are_those_of_the_activations(name):
    model, ids = tiny_model(name), token_ids(3, 20)
    seen = captured(model, ids)
    with swkernels.track(model) as handle, torch.no_grad():
        run(model, ids)
    for state in handle.states:
        x, y = seen[state.projection.name]
        assert torch.equal(state.inputs[0], oracle.column_absmax(x.flatten(0, -2)))
        assert torch.equal(state.outputs[0], oracle.column_absmax(y.flatten(0, -2)))
    site = handle.peaks()[1]
    assert site.layer == 1 and site.inputs.values.shape == (state.projection.columns,)


def test_padding_left_or_right_does_not_count():
    model = tiny_model("llama")
    ids = token_ids(2, 12)
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        padding = slice(0, 5) if side == "left" else slice(7, None)
        mask[1, padding] = 0
        seen = captured(model, ids, attention_mask=mask)
        with swkernels.track(model) as handle, torch.no_grad():
            run(model, ids, attention_mask=mask)
        for state in handle.states:
            x, _ = seen[state.projection.name]
            kept = x[mask.bool()]  # the unpadded tokens, in order
            assert torch.equal(state.inputs[0], oracle.column_absmax(kept))
            assert int(ops.peaks(state.inputs).tokens.max()) < 19


def test_batches_splits_and_orders_give_the_same_keys():
    """Token labels are the caller's, so samples can run in any grouping and order.

    The activations are replayed bit for bit: how a matrix product rounds may depend on the shape
    of the batch, which is the model's doing and not the peaks'.
    """
    model, ids = tiny_model("llama"), token_ids(6, 16)
    one_by_one = [captured(model, row[None]) for row in ids]
    name = find_down_projections(model)[1].name
    rows = torch.cat([seen[name][1].flatten(0, -2) for seen in one_by_one])
    expected = oracle.column_absmax(rows)
    for order in ([0, 1, 2, 3, 4, 5], [3, 5, 0, 4, 2, 1]):
        with swkernels.track(model) as handle, torch.no_grad():
            for sample in order:
                handle.label_next_token(16 * sample)
                run(model, ids[sample : sample + 1])
        assert torch.equal(handle.states[1].outputs[0], expected)
    for split in (1, 5, 40, 96):
        keys = None
        for start in range(0, 96, split):
            keys = ops.column_absmax(rows[start : start + split], keys, token_offset=start)
        assert torch.equal(keys, expected)


def test_backends_give_the_same_keys_in_a_model():
    model, ids = tiny_model("mistral"), token_ids(2, 10)
    results = []
    for backend in ("reference", "cpu", "triton"):
        with swkernels.track(model, backend=backend) as handle, torch.no_grad():
            run(model, ids)
        results.append(keys_of(handle))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_per_sample_peaks_merge_to_the_running_ones():
    model, ids = tiny_model("llama"), token_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 9:] = 0
    with swkernels.track(model) as plain, torch.no_grad():
        run(model, ids, attention_mask=mask)
        run(model, ids)
    with swkernels.track(model, per_sample=True) as handle, torch.no_grad():
        run(model, ids, attention_mask=mask)
        first = [state.sample_outputs.clone() for state in handle.states]
        run(model, ids)
    assert equal(keys_of(plain), keys_of(handle))
    seen = captured(model, ids, attention_mask=mask)
    for state, keys in zip(handle.states, first):
        _, y = seen[state.projection.name]
        for sample in range(3):
            kept = y[sample][mask[sample].bool()]
            assert torch.equal(keys[sample, 0], oracle.column_absmax(kept))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "jetmoe", "llama4"])
def test_experts_have_the_peaks_of_their_own_tokens(name):
    model, ids = tiny_model(name), token_ids(2, 12)
    with swkernels.track(model) as handle, torch.no_grad():
        run(model, ids)
    from tests.models.test_experts import observe

    _, calls = observe(model, ids)
    for state in handle.states:
        if state.projection.experts is None:
            continue
        expected = torch.zeros_like(state.outputs)
        mine = next(seen for p, seen in calls.items() if p.name == state.projection.name)
        for e, _, y, tokens, _ in mine:
            expected[e] = torch.maximum(expected[e], oracle.column_absmax(y, tokens))
        assert torch.equal(state.outputs, expected)


def test_experts_that_are_modules_of_their_own():
    torch.manual_seed(0)
    model, ids = UnfusedMoE(), token_ids() % 50
    with swkernels.track(model, per_sample=True) as handle, torch.no_grad():
        model(ids)
    assert [site.expert for site in handle.peaks()] == [0, 1, 2, 0, 1, 2]
    tokens = torch.cat([site.outputs.tokens for site in handle.peaks()])
    assert int(tokens.max()) > 24  # tokens of the second sample are named as such


def state_of(model):
    return {
        "keys": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "own": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "dtypes": [(p.dtype, p.device) for p in model.parameters()],
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_remove_restores_the_model_exactly(name):
    model, ids = tiny_model(name), token_ids()
    before, logits = state_of(model), run(model, ids).logits
    handle = swkernels.track(model)
    tracked = state_of(model)
    for what in ("keys", "modules", "hooks", "grads", "training", "dtypes"):
        assert tracked[what] == before[what], what
    assert torch.equal(run(model, ids).logits, logits)
    with pytest.raises(InvalidInput, match="tracked already"):
        swkernels.track(model)
    handle.remove()
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(run(model, ids).logits, logits)


def test_the_report_names_what_was_replaced_and_strict_raises():
    model = tiny_model("llama")
    with swkernels.track(model) as handle:
        assert handle.report.replaced == tuple(p.name for p in find_down_projections(model))
    with pytest.raises(ProjectionNotFound):
        swkernels.track(nn.Linear(3, 3))
    with swkernels.track(nn.Linear(3, 3), strict=False) as handle:
        assert handle.report.replaced == () and handle.peaks() == []


@pytest.mark.parametrize("first", ["track", "compile"])
def test_under_compile(first):
    model, ids = tiny_model("llama"), token_ids()
    with swkernels.track(model) as plain, torch.no_grad():
        run(model, ids)
        run(model, token_ids(seed=1))
    torch._dynamo.reset()
    if first == "track":
        handle = swkernels.track(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        handle = swkernels.track(compiled)
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
        compiled(input_ids=token_ids(seed=1), use_cache=False)
    handle.remove()
    for (a, b), (c, d) in zip(keys_of(plain), keys_of(handle)):
        for ours, theirs in ((a, c), (b, d)):
            values, tokens = ops.peaks(ours), ops.peaks(theirs)
            torch.testing.assert_close(values.values, tokens.values)
    assert equal(keys_of(plain)[:1], keys_of(handle)[:1])


def test_under_autocast():
    model, ids = tiny_model("llama"), token_ids()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(model, ids).logits
        with swkernels.track(model) as handle:
            assert torch.equal(run(model, ids).logits, expected)
        seen = captured(model, ids)
    for state in handle.states:
        x, y = seen[state.projection.name]
        assert y.dtype == torch.bfloat16
        assert torch.equal(state.outputs[0], oracle.column_absmax(y.flatten(0, -2)))
        assert torch.equal(state.inputs[0], oracle.column_absmax(x.flatten(0, -2)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradient_checkpointing_does_not_count_twice(name, reentrant):
    model, ids = tiny_model(name).train(), token_ids()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handle = swkernels.track(model, moments=True)
    loss = run(model, ids).logits.square().mean()
    before, moments = keys_of(handle), [s.moments.clone() for s in handle.states]
    run(model, token_ids(seed=1))  # the numbering moves on before the backward comes
    handle.reset()
    loss.backward()
    handle.remove()
    assert all(int(state.outputs.max()) == 0 for state in handle.states)
    assert all(int(m[..., 0].min()) > 0 for m in moments) and len(before) == 3
    reference = copy.deepcopy(model)
    reference.zero_grad()
    run(reference, ids).logits.square().mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_training_sees_the_same_gradients():
    model, ids = tiny_model("llama").train(), token_ids()
    run(model, ids).logits.square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with swkernels.track(model):
        run(model, ids).logits.square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))


def test_a_trainer_logs_the_peaks(tmp_path):
    from transformers import Trainer, TrainingArguments

    from swkernels.integrations.transformers import log_peaks

    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 12)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(tiny_model("llama"), arguments, train_dataset=rows)
    with log_peaks(trainer, every=2):
        trainer.train()
    entries = [log for log in trainer.state.log_history if "peaks/layer_0_out" in log]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(entry["peaks/layer_2_in"] > 0 for entry in entries)
    with pytest.raises(InvalidInput, match="at least 1"):
        log_peaks(trainer, every=0)


def test_a_model_dispatched_by_accelerate(tmp_path):
    """device_map with one layer offloaded to disk: hooks move weights in and out."""
    from transformers import AutoModelForCausalLM

    model, ids = tiny_model("llama"), token_ids()
    with swkernels.track(model) as plain, torch.no_grad():
        run(model, ids)
    model.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm"]
    device_map = {name: "cpu" for name in [*names, "model.rotary_emb", "lm_head"]}
    dispatched = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    assert dispatched.model.layers[1].mlp.down_proj.weight.is_meta
    with swkernels.track(dispatched) as handle, torch.no_grad():
        run(dispatched, ids)
    assert equal(keys_of(plain), keys_of(handle))


def test_generation_numbers_tokens_through_the_cache():
    model, ids = tiny_model("llama"), token_ids(1, 5)
    with swkernels.track(model) as handle:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False,
            eos_token_id=VOCABULARY - 1,
        )  # fmt: skip
    tokens = torch.cat([site.outputs.tokens for site in handle.peaks()])
    assert int(tokens.max()) > 5 and int(tokens.max()) <= 11


def test_inputs_embeds_and_hand_written_models():
    model, ids = tiny_model("llama"), token_ids()
    with swkernels.track(model) as plain, torch.no_grad():
        run(model, ids)
    with swkernels.track(model) as handle, torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(ids), use_cache=False)
    assert equal(keys_of(plain), keys_of(handle))
    own = HandWritten()
    with swkernels.track(own) as handle, torch.no_grad():
        own(token_ids() % 50)
    assert int(ops.peaks(handle.states[0].outputs).tokens.max()) >= 24


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_named(value):
    model, ids = tiny_model("llama"), token_ids(1, 10)
    p = find_down_projections(model)[1]
    with torch.no_grad():
        p.matrix()[7, 3] = value
    with swkernels.track(model) as handle, torch.no_grad():
        run(model, ids)
        with pytest.raises(NonFiniteActivation) as error:
            handle.check_finite()
    message = str(error.value)
    assert "model.layers.1.mlp.down_proj" in message and "layer 1" in message
    assert "output" in message and "channel 7" in message and "token 0" in message
    assert "\n" not in message


def test_no_activation_is_copied_or_kept():
    """Live tensors after a tracked forward: the keys, and none the size of an activation."""
    import gc

    model, ids = tiny_model("llama"), token_ids(2, 40)
    handle = swkernels.track(model, per_sample=True)
    with torch.no_grad():
        run(model.model, ids)
        gc.collect()
        before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        sizes = []
        for _ in range(3):
            run(model.model, ids)
            gc.collect()
            sizes.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    handle.remove()
    assert sizes == [before] * 3
