"""A model quantized for a while: the values it computes with, and that every bit comes back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from swkernels import QuantConfig, quantize
from swkernels.backends.plan import Clip
from swkernels.errors import InvalidInput
from swkernels.quant import (
    simulate,
    simulated_activations,
    simulated_weights,
    super_channels_of,
)
from tests.cli.checkpoints import make_model
from tests.evidence.bytes import digest
from tests.interrupts import interrupted
from tests.models.tiny import run, tiny_model, token_ids
from tests.ops import quant_oracle

from .dense import unpacked

DOWN, FIRST = (f"model.layers.{layer}.mlp.down_proj" for layer in (1, 0))
WEIGHTS = {DOWN: [[5, 7], [3, 4]], FIRST: [[2, 9]]}


@pytest.fixture
def model():
    return make_model()


def logits(model, ids=None):
    with torch.no_grad():
        return run(model, token_ids(length=8) % 10 if ids is None else ids).logits


def tensors(model) -> dict:
    """Where each parameter's values lie."""
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def hooks(model) -> list:
    return [list(module._forward_pre_hooks.values()) for module in model.modules()]


# --- weights ---


@pytest.mark.parametrize(("code", "block", "clip"), [("int4", 40, 2.0), ("int8", "tensor", None)])
def test_weights_are_rounded_to_nearest_and_what_is_listed_is_exact(model, code, block, clip):
    config = QuantConfig(
        code=code, symmetric=False, block_size=block, clip=clip and Clip("zscore", clip)
    )
    before = copy.deepcopy(model)
    with simulated_weights(model, config, WEIGHTS) as simulated:
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
    linear = [name for name in found if "_proj" in name]
    assert (simulated.matrices, simulated.elements) == (len(linear), 32 * 48)
    assert simulated.kept == 3 and len(linear) == 14
    for name, original in before.named_parameters():
        if name not in linear:
            assert torch.equal(found[name], original)
            continue
        w = original.detach().numpy()
        listed = WEIGHTS.get(name.removesuffix(".weight"), [])
        apart = [row * w.shape[1] + column for row, column in listed]
        cut = clip and ("zscore", clip)
        packed = quant_oracle.quantize(w, code, False, block, cut, apart=apart)
        want = quant_oracle.dequantize(packed, code, False)
        want[apart] = w.reshape(-1)[apart]
        assert np.array_equal(found[name].numpy().reshape(-1), want), name


def test_one_weight_alone_makes_a_tensor_coarse(model):
    """What the study is about, by hand: with it in the range, all others round to 0."""
    weight = model.get_submodule(DOWN).weight
    with torch.no_grad():
        weight[5, 7] = 100 * weight.abs().max()
    config = QuantConfig(code="int4", symmetric=False, block_size="tensor")
    with simulated_weights(model, config):
        assert weight.count_nonzero() == 1
    with simulated_weights(model, config, {DOWN: [[5, 7]]}):
        assert weight.count_nonzero() > weight.numel() / 2


@pytest.mark.parametrize("arch", ["gpt2", "mixtral", "gpt_oss", "dbrx"])
def test_every_layout_has_the_values_that_quantize_packs(arch):
    config = QuantConfig(block_size=24)
    packed = tiny_model(arch)
    quantize(packed, config, progress=False)
    want = unpacked(packed, tiny_model(arch)).state_dict()
    model = tiny_model(arch)
    bits, places = digest(model), tensors(model)
    with simulated_weights(model, config):
        assert all(torch.equal(p, want[name]) for name, p in model.state_dict().items())
        assert digest(model) != bits
    assert digest(model) == bits and tensors(model) == places


def test_hooks_and_a_tied_head_are_no_hindrance():
    model = tiny_model("llama", tie_word_embeddings=True)
    model.get_submodule(DOWN).register_forward_hook(lambda *args: None)
    bits = digest(model)
    config = QuantConfig(code="int4", block_size="tensor", embeddings="int8")
    with simulated_weights(model, config) as simulated:
        assert simulated.matrices == 3 * 7 + 1
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert len(model.lm_head.weight.unique()) <= 255
    assert digest(model) == bits


# --- activations ---


def through_int8(x: np.ndarray, per: str, places=()) -> np.ndarray:
    """x [B, S, H] in symmetric int8; ``places`` (sequence, token, channel) are set aside."""
    aside = np.zeros(x.shape, bool)
    for place in places:
        aside[place] = True
    others = np.where(aside, 0, x)
    most = np.abs(others).max(axis=-1 if per == "token" else None, keepdims=True)
    scale = most / np.float32(127)
    return np.where(aside, x, np.rint(others / scale) * scale)


@pytest.mark.parametrize("per", ["token", "tensor"])
def test_inputs_pass_through_int8_and_the_super_activation_is_set_aside(model, per):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 48, generator=generator)
    x[0, 3, 7], x[1, 1, 7], x[1, 4, 9] = 500.0, -300.0, 20.0
    down = model.get_submodule(DOWN)
    got = []
    down.register_forward_hook(lambda module, args, output: got.append(args[0]))
    with simulated_activations(model, per=per) as layers:
        down(x)
    assert layers == 14
    with simulated_activations(model, per=per, super_channels={DOWN: [7, 9]}):
        down(x)
    down(x)
    places = [(0, 3, 7), (1, 1, 7), (1, 4, 9)]
    places.append((0, int(x[0, :, 9].abs().argmax()), 9))  # no peak; the largest all the same
    for found, want in ((got[0], through_int8(x.numpy(), per)),
                        (got[1], through_int8(x.numpy(), per, places))):  # fmt: skip
        np.testing.assert_allclose(found.numpy(), want, rtol=2e-7, atol=0)
    assert all(torch.equal(got[1][place], x[place]) for place in places)
    assert got[2] is x
    error = [(values - x).abs().mean() for values in got[:2]]
    assert error[1] < error[0] / (2 if per == "token" else 10)


def test_where_super_activations_are_met(model):
    found = super_channels_of(model, {DOWN: [[5, 7], [3, 4]], FIRST: [[2, 9]]})
    into = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj"
    wide = [f"model.layers.1.{name}" for name in (*into.split(), "mlp.up_proj")]
    assert found == {FIRST: (9,), **dict.fromkeys(wide, (2,)), DOWN: (4, 7)}


def test_an_expert_without_a_token(model):
    down = model.get_submodule(DOWN)
    with simulated_activations(model, super_channels={DOWN: [7]}):
        assert down(torch.empty(0, 48)).shape == (0, 32)


# --- all of it comes back ---

CONTEXTS = {
    "weights": lambda model: simulated_weights(model, QuantConfig(), WEIGHTS),
    "activations": lambda model: simulated_activations(model, super_channels={DOWN: [7]}),
}


@pytest.mark.parametrize("what", CONTEXTS)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_the_model_is_as_it_was(model, what, error):
    keep = lambda module, args: None  # noqa: E731
    model.get_submodule(DOWN).register_forward_pre_hook(keep)
    before = digest(model), tensors(model), hooks(model), logits(model)
    try:
        with CONTEXTS[what](model):
            assert not torch.equal(logits(model), before[3])
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt, GeneratorExit) as caught:
        assert type(caught) is error
    assert (digest(model), tensors(model), hooks(model)) == before[:3]
    assert torch.equal(logits(model), before[3])
    assert all(type(module).__call__ is torch.nn.Module.__call__ for module in model.modules())


@pytest.mark.parametrize("context", [simulated_weights, simulated_activations])
def test_ctrl_c_at_any_point(context):
    model = make_model(num_hidden_layers=1)
    before = digest(model), tensors(model), hooks(model)
    two = [QuantConfig(include=("down_proj", "o_proj"))] if context is simulated_weights else []
    inside = []

    def held():
        with context(model, *two):
            inside.append((digest(model), tensors(model), hooks(model)))

    looks = interrupted(held, -1, [simulate])
    assert looks > 30 and inside != [before]
    for at in range(1, looks + 1):
        assert interrupted(held, at, [simulate]) >= at
        assert (digest(model), tensors(model), hooks(model)) == before, f"look {at} of {looks}"


# --- what is refused ---


def test_bad_input_is_said_before_anything_is_changed(model):
    bits = digest(model)
    mixture = tiny_model("mixtral")
    for context, words in (
        (lambda: simulated_weights(model, super_weights={"nowhere": [[0, 0]]}), "nowhere"),
        (lambda: simulated_weights(model, super_weights={DOWN: [[99, 0]]}), "99"),
        (lambda: simulated_activations(model, per="row"), "per must be 'token' or 'tensor'"),
        (lambda: simulated_activations(model, super_channels={"x.down_proj": [0]}), "no linear"),
        (lambda: simulated_activations(model, super_channels={DOWN: [48]}), "0 to 47, got 48"),
        (lambda: simulated_activations(mixture), "mlp.experts.* holds fused experts"),
    ):
        with pytest.raises(InvalidInput, match=words):
            with context():
                pass
    assert digest(model) == bits and hooks(model) == [[] for _ in model.modules()]
    with torch.no_grad():
        model.get_submodule(DOWN).weight[1, 2] = torch.nan
    with pytest.raises(InvalidInput, match=rf"{DOWN} holds nan at \[1, 2\]"):
        with simulated_weights(model):
            pass
    with torch.no_grad():
        model.get_submodule(DOWN).weight[1, 2] = 0
        model.model.embed_tokens.weight[:] = torch.inf
    with pytest.raises(InvalidInput, match="finite"):
        with simulated_activations(model):
            logits(model)
    assert hooks(model) == [[] for _ in model.modules()]
