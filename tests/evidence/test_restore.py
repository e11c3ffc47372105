"""Super activations put back: against hooks written here, and exactly where only they are gone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from swkernels.detect.perplexity import perplexity
from swkernels.errors import InvalidInput
from swkernels.evidence.edits import Edits
from swkernels.evidence.restore import SuperActivations
from swkernels.train import Coordinates
from tests.detect.planting import plant
from tests.models.tiny import tiny_model, token_ids

LAYER = 1
MIXTURES = ("mixtral", "llama4", "gpt_oss", "granitemoe")  # outputs: tensors, tuples, [T, D]


def planted(name: str, **options):
    """A model with super weights in layer 1, and their edits."""
    model = tiny_model(name)
    weights: dict = {}
    for _, module, expert, row, column in plant(model, LAYER, **options):
        site = (module, expert) if "experts" in module.rpartition(".")[2] else module
        weights.setdefault(site, []).append((row, column))
    return model, Edits(model, Coordinates.of(weights, model))


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


def again(model, edits, activations, ids, **options):
    """The logits with the weights gone and the activations back."""
    with activations.restored(edits.entries), edits.zeroed():
        return logits(model, ids, **options)


def writer(model, module, row, ids):
    """A hook of our own that writes the peaks of one channel, as they are now, back."""
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, args, y: kept.append(y[..., row].clone()))
    logits(model, ids)
    handle.remove()
    peaks = kept[0].reshape(ids.shape).tolist()

    def write(module, args, output):
        output = output.clone()
        flat = output.view(-1, output.shape[-1])
        for sequence, values in enumerate(peaks):
            token = max(range(len(values)), key=lambda t: abs(values[t]))
            flat[sequence * len(values) + token, row] = values[token]
        return output

    return module.register_forward_hook(write)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_peaks_of_every_sequence_are_written_back(name):
    model, edits = planted(name)
    (entry,) = edits.entries
    ids = token_ids(5, 12)
    intact = logits(model, ids)
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        assert torch.equal(logits(model, ids), intact)
    found = again(model, edits, activations, ids)
    handle = writer(model, entry.weight.module, entry.row, ids)
    with edits.zeroed():
        expected = logits(model, ids)
    handle.remove()
    with edits.zeroed():
        gone = logits(model, ids)
    assert torch.equal(found, expected)
    assert not torch.equal(found, gone) and not torch.equal(found, intact)
    assert torch.equal(logits(model, ids), intact)  # no hook and no zero is left


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_are_back_exactly_where_the_spike_is_all_that_is_lost(name):
    model, edits = planted(name, columns=2)
    tokens = token_ids(4, 12)
    where = torch.tensor([0, 3, 7, 11])  # of the spike, in each sequence

    def only_there(module, args):
        x = args[0].clone()
        for entry in edits.entries:
            alone = torch.zeros_like(x[..., 0])
            alone[range(4), where] = x[range(4), where, entry.column].abs() + 1
            x[..., entry.column] = alone
        return (x,)

    edits.entries[0].weight.module.register_forward_pre_hook(only_there)
    intact = logits(model, tokens)
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        logits(model, tokens)
    assert torch.equal(again(model, edits, activations, tokens), intact)
    with edits.zeroed():
        assert not torch.allclose(logits(model, tokens), intact, atol=1e-3)
    (channel,) = activations.to_dict()
    assert channel["sequences"] == channel["put_back"] == 4
    assert channel["row"] == edits.entries[0].row and channel["layer"] == LAYER
    assert channel["tokens"] == {"0": 1, "3": 1, "7": 1, "11": 1}


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_restored_behind_the_mixture(name):
    """Sequences of 1 token: what is put back is all that the weight does to them."""
    model, edits = planted(name)
    ids = token_ids(24, 1)
    intact = logits(model, ids)[:, 0]
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        logits(model, ids)
    with edits.zeroed():
        gone = logits(model, ids)[:, 0]
    back = again(model, edits, activations, ids)[:, 0]
    lost = (gone - intact).abs().amax(1)  # [B], above zero where the expert was reached
    left = (back - intact).abs().amax(1)
    (channel,) = activations.to_dict()
    spikes = channel["put_back"]
    assert channel["tokens"] == {"0": spikes} and spikes < 24
    # Which tokens an expert runs together changes sums by rounding.
    restored = (lost > 1e-3) & (left < 1e-5)
    assert 3 <= int(restored.sum()) <= spikes
    untouched = (back - gone).abs().amax(1) < 1e-5
    assert torch.equal((left < 1e-5) | untouched, torch.ones(24, dtype=torch.bool))
    assert torch.equal(logits(model, ids)[:, 0], intact)


class _Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())


class _Mixture(nn.Module):
    """Each token goes through one expert, chosen by its first channel; gives [T, D] and more."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList([_Expert(), _Expert()])

    def forward(self, x):
        rows = x.reshape(-1, 8)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = (rows[:, 0] > 0) == bool(number)
            out[mine] = expert(rows[mine])
        return out, self.router(rows)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = _Mixture()

    def forward(self, x):
        return x + self.moe(x)[0].view(x.shape)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([_Block(), _Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_experts_that_are_modules_run_on_some_of_the_tokens():
    """Expert 1 sees a part of the tokens of a batch; the mixture's output holds all of them."""
    torch.manual_seed(0)
    model = _Model()
    name = "layers.0.moe.experts.1.down_proj"
    weight = model.get_submodule(name).weight
    model.get_submodule(name).bias.zero_()
    weight[3] = 0
    weight[3, 5] = 4.0
    x = torch.randn(6, 7, 8)
    x[:, :, 0] = -1
    where = torch.tensor([0, 6, 2, 3, 3, 1])
    x[range(6), where, 0] = 1  # one token of each sequence goes to expert 1
    model.get_submodule("layers.0.moe.experts.1.up_proj").bias[5] = 9.0  # and spikes there
    edits = Edits(model, Coordinates.of({name: [[3, 5]]}, model))
    assert edits.entries[0].expert == 1
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        intact = model(x)
    with edits.zeroed():
        gone = model(x)
        with activations.restored(edits.entries):
            back = model(x)
    assert torch.equal(back, intact)
    changed = (gone - intact).abs().amax(-1) > 1  # [6, 7]
    assert changed.sum() == 6 and changed[range(6), where].all()


def test_other_linear_layers_are_restored_at_their_output():
    model = tiny_model("llama")
    name = "model.layers.0.self_attn.o_proj"
    module = model.get_submodule(name)
    with torch.no_grad():
        module.weight[3, 5] = 50.0
    edits = Edits(model, Coordinates.of({name: [[3, 5]]}, model))
    ids = token_ids(3, 9)
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        logits(model, ids)
    found = again(model, edits, activations, ids)
    handle = writer(model, module, 3, ids)
    with edits.zeroed():
        expected = logits(model, ids)
    handle.remove()
    assert torch.equal(found, expected)


def test_perplexity_in_batches():
    """In windows of 2 every loss hangs on token 0, and the spikes are all there."""
    model, edits = planted("llama", rows=2)
    column = edits.entries[0].column

    def only_first(module, args):
        x = args[0].clone()
        x[:, :1, column] = x[:, :1, column].abs() + 1
        x[:, 1:, column] = 0
        return (x,)

    edits.entries[0].weight.module.register_forward_pre_hook(only_first)
    tokens = token_ids(1, 20)[0]

    def measure():
        return perplexity(model, tokens, window=2, batch_size=3).losses

    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        intact = measure()
    with edits.zeroed():
        gone = measure()
        with activations.restored(edits.entries):
            back = measure()
        with activations.restored(edits.entries[:1]):
            half = measure()
    assert [c["tokens"] for c in activations.to_dict()] == [{"0": 10}, {"0": 10}]
    assert back == intact and not set(back) & set(gone)
    assert not set(half) & (set(gone) | set(back))


def test_small_peaks_are_left_alone():
    """A call whose peaks are below a tenth of the largest runs as if nothing were put back."""
    model, edits = planted("llama")
    (entry,) = edits.entries
    scale = [1.0]
    entry.weight.module.register_forward_pre_hook(lambda module, args: (args[0] * scale[0],))
    ids = token_ids(2, 8)

    def both():
        found = []
        for scale[0] in (1.0, 1e-3):
            found.append(logits(model, ids))
        return found

    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        both()
    assert activations.to_dict()[0]["sequences"] == 4
    with edits.zeroed():
        gone = both()
    with activations.restored(edits.entries), edits.zeroed():
        back = both()
    assert not torch.equal(back[0], gone[0]) and torch.equal(back[1], gone[1])


@pytest.mark.parametrize("named", [True, False])
def test_padding_holds_no_super_activation(named):
    """Named by a mask, or as zeros behind the shorter sequences, as multiple choice pads."""
    model, edits = planted("llama")
    (entry,) = edits.entries
    ids = token_ids(2, 8)
    ids[0, 5:] = 0
    options = {"attention_mask": (ids != 0).long()} if named else {}

    def loud(module, args):
        x = args[0].clone()
        x[0, 5:] *= 1e3  # larger than any other
        return (x,)

    entry.weight.module.register_forward_pre_hook(loud)
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        logits(model, ids, **options)
    back = again(model, edits, activations, ids, **options)
    alone = ids[:1, :5]
    handle = writer(model, entry.weight.module, entry.row, alone)
    with edits.zeroed():
        expected = logits(model, alone)
        handle.remove()
        gone = logits(model, alone)
    torch.testing.assert_close(back[:1, :5], expected)
    assert (gone - expected).abs().max() > 1e-2


def test_nan_and_infinity_are_no_peaks_to_measure_by():
    model, edits = planted("llama")
    (entry,) = edits.entries
    value = [0.0]

    def spoil(module, args, output):
        output = output.clone()
        output[0, 2, entry.row] += value[0]
        return output

    entry.weight.module.register_forward_hook(spoil)
    ids = token_ids(2, 6)
    activations = SuperActivations(model, edits.entries)
    with activations.recorded():
        for value[0] in (0.0, math.nan):
            logits(model, ids)
    value[0] = 0.0
    with activations.restored(edits.entries), edits.zeroed():
        first, second = logits(model, ids), logits(model, ids)
    # The sequence that was NaN is not written to; the other one is, as in the first call.
    assert torch.isfinite(second).all() and torch.equal(first[1], second[1])


def test_other_inputs_are_an_error_and_no_hook_is_left():
    model, edits = planted("llama")
    activations = SuperActivations(model, edits.entries)
    ids = token_ids(2, 6)
    with activations.recorded():
        logits(model, ids)
    for calls, said in (
        ([ids, ids], r"call 2 of 1"),
        ([], r"0 calls of 1"),
        ([ids[:1]], r"\[1, 6\] tokens in call 1"),
    ):
        with pytest.raises(InvalidInput, match=f"ran on other inputs .*{said}"):
            with activations.restored(edits.entries):
                for call in calls:
                    logits(model, call)
    with pytest.raises(InvalidInput, match="never ran"):
        with activations.recorded():
            pass
    with pytest.raises(KeyboardInterrupt):
        with activations.recorded():
            raise KeyboardInterrupt
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_an_output_without_sequences_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(self.up(x.reshape(-1, 4)))

    model = Flat()
    edits = Edits(model, Coordinates.of({"down": [[1, 2]]}, model))
    activations = SuperActivations(model, edits.entries)
    with pytest.raises(InvalidInput, match=r"down gives \[6, 4\]: expected \[batch, tokens, 4\]"):
        with activations.recorded():
            model(torch.zeros(2, 3, 4))
