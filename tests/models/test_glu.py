"""Which forwards are taken for down(act(gate(x)) * up(x)), and which are not."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from swkernels.models.glu import GatedMLP, NotGated, gated_mlp


class MLP(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.gate_up = nn.Linear(4, 12)
        self.down_proj = nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.1)
        self.act_fn = nn.SiLU() if act is None else act


class Plain(MLP):
    def forward(self, x):
        """With a docstring."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Renamed(MLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        a = self.up_proj(hidden)
        b = self.act_fn(self.gate_proj(hidden))
        h = a * b
        out = self.down_proj(h)
        return out


class Chunked(MLP):
    def forward(self, x):
        both = self.gate_up(x)
        gate, up = both.chunk(2, dim=-1)
        up = up * self.act_fn(gate)
        return self.down_proj(up)


class Functional(MLP):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Dropped(MLP):
    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Scaled(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


class Summed(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Squared(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x))
        return self.down_proj(h * h)


class OtherInput(MLP):
    def forward(self, x):
        g = self.gate_proj(x)
        return self.down_proj(self.act_fn(g) * self.up_proj(g))


class SwappedHalves(MLP):
    def forward(self, x):
        up, gate = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate))


class OtherChunk(MLP):
    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=1)
        return self.down_proj(up * self.act_fn(gate))


class Branched(MLP):
    def forward(self, x):
        if self.training:
            return x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Longer(MLP):
    def forward(self, x, scale=1.0):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class InPlace(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        h += 1
        return self.down_proj(h)


@pytest.mark.parametrize("cls", [Plain, Renamed, Functional])
def test_two_projections(cls):
    assert gated_mlp(cls()) == GatedMLP("gate_proj", "up_proj", "down_proj", "silu")


def test_one_projection_in_halves():
    assert gated_mlp(Chunked()) == GatedMLP("gate_up", "gate_up", "down_proj", "silu")


@pytest.mark.parametrize(
    "cls",
    [Dropped, Scaled, Summed, Squared, OtherInput, SwappedHalves, OtherChunk, Branched, Longer,
     InPlace],
)  # fmt: skip
def test_any_other_forward_is_not_taken(cls):
    with pytest.raises(NotGated, match=rf"{cls.__name__}\.forward is not known"):
        gated_mlp(cls())


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (ACT2FN["silu"], "silu"), (ACT2FN["gelu"], "gelu"), (ACT2FN["relu"], "relu"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"), (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"), (F.silu, "silu"), (F.relu, "relu"),
    ],
)  # fmt: skip
def test_activations_compute_what_their_name_says(act, name):
    assert gated_mlp(Plain(act)).activation == name
    reference = {
        "silu": F.silu, "relu": F.relu, "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }  # fmt: skip
    x = torch.linspace(-4, 4, 33)
    assert torch.equal(act(x), reference[name](x))


@pytest.mark.parametrize("act", [ACT2FN["gelu_new"], ACT2FN["gelu_python"], nn.Tanh(), "silu"])
def test_other_activations_are_not_taken(act):
    with pytest.raises(NotGated, match="its activation is"):
        gated_mlp(Plain(act))


def test_hooks_on_the_activation_and_replaced_forwards_are_respected():
    module = Plain()
    module.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(NotGated, match="has hooks"):
        gated_mlp(module)
    module = Plain()
    module.forward = types.MethodType(Plain.forward, module)
    with pytest.raises(NotGated, match="replaced on the instance"):
        gated_mlp(module)


def test_a_forward_without_source_is_not_taken():
    namespace = {"MLP": MLP}
    exec("class Made(MLP):\n    def forward(self, x):\n        return x\n", namespace)
    with pytest.raises(NotGated, match="cannot be read"):
        gated_mlp(namespace["Made"]())


def test_a_function_of_the_same_name_is_not_taken_for_it(monkeypatch):
    from swkernels.models import glu

    glu._read.cache_clear()
    monkeypatch.setitem(globals(), "F", types.SimpleNamespace(silu=torch.tanh))
    with pytest.raises(NotGated, match="is not known"):
        gated_mlp(Functional())
    monkeypatch.undo()
    glu._read.cache_clear()
    assert gated_mlp(Functional()).activation == "silu"
