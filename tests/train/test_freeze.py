"""Full fine-tuning with some weights held."""

from __future__ import annotations

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, freeze
from swkernels.train.sites import find_targets
from tests.models.tiny import tiny_model, token_ids


def loss_of(model):
    ids = token_ids()
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def entries(model, coordinates):
    return [
        target.matrix()[tuple(coordinates.weights[site].long().unbind(1))].clone()
        for site, target in find_targets(model, coordinates).items()
    ]


def gradients(model, coordinates):
    return [
        target.as_matrix(target.parameter.grad)[tuple(coordinates.weights[site].long().unbind(1))]
        for site, target in find_targets(model, coordinates).items()
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "made",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
def test_frozen_weights_stay_bit_for_bit(arch, made):
    model = tiny_model(arch)
    coordinates = Coordinates.random(model, 80, seed=1)
    before, start = entries(model, coordinates), [p.detach().clone() for p in model.parameters()]
    optimizer = made(model.parameters())
    loss_of(model).backward()
    optimizer.step()  # momentum from before the freeze moves weights whose gradient is zero
    moved = entries(model, coordinates)
    assert not any(torch.equal(a, b) for a, b in zip(before, moved))
    handle = freeze(model, coordinates)
    handle.protect(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        assert all(not g.any() for g in gradients(model, coordinates))
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(moved, entries(model, coordinates)))
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters()) if b.grad.any())
    handle.remove()
    optimizer.zero_grad()
    loss_of(model).backward()
    assert any(g.any() for g in gradients(model, coordinates))
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(moved, entries(model, coordinates)))


def test_the_other_gradients_are_left_as_they_are():
    model = tiny_model("llama")
    loss_of(model).backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    coordinates = Coordinates.random(model, 80, seed=1)
    with freeze(model, coordinates, scale=0.25):
        loss_of(model).backward()
    for site, pairs in coordinates.weights.items():
        rows, cols = pairs.long().unbind(1)
        whole[f"{site.name}.weight"][rows, cols] *= 0.25
    assert all(torch.equal(p.grad, whole[n]) for n, p in model.named_parameters())
    model.zero_grad()
    loss_of(model).backward()  # outside of the context nothing is scaled
    assert any(not torch.equal(p.grad, whole[n]) for n, p in model.named_parameters())


def test_accumulated_gradients_are_zero_after_each_backward():
    model = tiny_model("llama")
    coordinates = Coordinates.random(model, 80, seed=1)
    with freeze(model, coordinates):
        for _ in range(2):
            loss_of(model).backward()
            assert all(not g.any() for g in gradients(model, coordinates))


def test_what_cannot_be_frozen():
    model = tiny_model("llama")
    coordinates = Coordinates.random(model, 8, seed=1)
    with freeze(model, coordinates, scale=0.5) as handle:
        with pytest.raises(InvalidInput, match="only frozen weights can be protected.*0.5"):
            handle.protect(torch.optim.SGD(model.parameters(), lr=0.1))
    model.to("meta")
    with pytest.raises(InvalidInput, match="meta device"):
        freeze(model, coordinates)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
