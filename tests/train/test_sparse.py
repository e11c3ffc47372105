"""Sparse training of whole models in plain PyTorch."""

from __future__ import annotations

import copy
import io
import math
import os

import pytest
import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.nn import SparseDelta
from swkernels.train import Coordinates, Site, sparse
from tests.models.tiny import tiny_model, token_ids
from tests.ops.listed import Allocations

# Linear, Conv1D with bias, expert modules or fused experts in each layout
ARCHITECTURES = ("llama", "gpt2", "mixtral", "gpt_oss", "dbrx")
DOWN = "model.layers.1.mlp.down_proj"


def model_of(arch: str = "llama", dtype=torch.float64) -> nn.Module:
    model = tiny_model(arch).to(dtype).eval()
    if dtype == torch.float64 and arch in ("mixtral", "gpt_oss"):
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model


def loss_of(model, **more):
    ids = token_ids()
    return model(input_ids=ids, labels=ids, use_cache=False, **more).loss


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def set_random(handle, scale: float = 0.05, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in handle.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * scale)


def train(model, parameters, steps: int = 4, optimizer=None, **more):
    """Some steps; returns the losses."""
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, **more)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def dense_entries(arch: str, coordinates: Coordinates, deltas=None, dtype=torch.float64):
    """The entries of the dense gradient, by site; with deltas written into the weights first."""
    model = model_of(arch, dtype)
    handle = sparse(model, coordinates)
    targets = {site: handle.target(site) for site in coordinates.weights}
    if deltas is not None:
        for site, target in targets.items():
            rows, cols = coordinates.weights[site].long().unbind(1)
            target.matrix()[rows, cols] += deltas[site].to(dtype)
    handle.remove()
    for target in targets.values():
        target.parameter.requires_grad_(True)
    loss_of(model).backward()
    found = {}
    for site, target in targets.items():
        rows, cols = coordinates.weights[site].long().unbind(1)
        found[site] = target.as_matrix(target.parameter.grad)[rows, cols]
    return found


# --- gradients ---


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("k", [1, 200])
def test_gradients_are_entries_of_the_dense_gradient(arch, k):
    model = model_of(arch)
    coordinates = Coordinates.random(model, k, seed=1)
    handle = sparse(model, coordinates)
    for delta in (m for m in model.modules() if isinstance(m, SparseDelta)):
        delta.values["default"] = nn.Parameter(delta.values["default"].double())
    set_random(handle)
    deltas = {site: value.detach().clone() for site, value in handle.values().items()}
    loss_of(model).backward()
    exact = dense_entries(arch, coordinates, deltas)
    for site, value in handle.values().items():
        grad = torch.zeros_like(exact[site]) if value.grad is None else value.grad
        assert torch.allclose(grad, exact[site], rtol=1e-9, atol=1e-13), site


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts(arch, implementation):
    def make():
        model = model_of(arch, torch.float32)
        model.set_experts_implementation(implementation)
        return model

    model = make()
    coordinates = Coordinates.random(model, 200, seed=1)
    handle = sparse(model, coordinates)
    loss_of(model).backward()
    exact = dense_entries(arch, coordinates)
    for site, value in handle.values().items():
        want = exact[site]
        grad = torch.zeros_like(want) if value.grad is None else value.grad.double()
        assert torch.allclose(grad, want, rtol=1e-3, atol=1e-6), site


def test_every_entry_of_a_weight():
    model = model_of()
    D, H = model.get_submodule(DOWN).weight.shape
    pairs = torch.cartesian_prod(torch.arange(D), torch.arange(H))
    coordinates = Coordinates.of({DOWN: pairs}, model)
    handle = sparse(model, coordinates)
    loss_of(model).backward()
    (exact,) = dense_entries("llama", coordinates).values()
    assert torch.allclose(handle.parameters()[0].grad.double(), exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_pytorch(dtype):
    model = model_of(dtype=dtype)
    coordinates = Coordinates.random(model, 300, seed=1)
    handle = sparse(model, coordinates)
    loss_of(model).backward()
    dense = dense_entries("llama", coordinates, dtype=dtype)
    rounded = tiny_model("llama").to(dtype).double()  # the same weights, computed exactly
    exact = {}
    again = sparse(rounded, coordinates)
    for site, target in [(site, again.target(site)) for site in coordinates.weights]:
        target.parameter.requires_grad_(True)
        exact[site] = target
    loss_of(rounded).backward()
    error = torch.zeros(2, dtype=torch.float64)
    for site, value in handle.values().items():
        rows, cols = coordinates.weights[site].long().unbind(1)
        want = exact[site].as_matrix(exact[site].parameter.grad)[rows, cols]
        error[0] += (value.grad.double() - want).square().sum()
        error[1] += (dense[site].double() - want).square().sum()
    assert value.grad.dtype == torch.float32
    assert error[0] <= 4 * error[1]  # squares: twice


# --- what a user sees ---


def test_k_trainable_values_and_a_state_of_the_same_size():
    model = model_of()
    handle = sparse(model, Coordinates.random(model, 37))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 37
    assert {id(p) for p in trainable} == {id(p) for p in handle.parameters()}
    assert all(p.dtype == torch.float32 and not p.any() for p in trainable)
    optimizer = torch.optim.AdamW(handle.parameters())
    train(model, None, 1, optimizer)
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values())
    assert held <= 3 * 37


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_of_the_weights_size_is_made(dense):
    D, H = 320, 640
    model = nn.Sequential(nn.Linear(8, H), nn.Linear(H, D, bias=False))
    handle = sparse(model, Coordinates.random({"1": (D, H)}, 50))
    if dense:  # so that the watch is known to see one
        model[1].weight.requires_grad_(True)
    x = torch.randn(16, 8)  # activations are far smaller than the weight
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Allocations() as made:
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (max(made.sizes) >= D * H) is dense
    assert handle.parameters()[0].any()


def test_non_contiguous_and_batched_inputs():
    layer = nn.Linear(24, 16, bias=True)
    whole, model = copy.deepcopy(layer), nn.Sequential(layer)
    handle = sparse(model, Coordinates.random({"0": (16, 24)}, 30))
    set_random(handle)
    rows, cols = handle.coordinates.weights[Site("0")].long().unbind(1)
    with torch.no_grad():
        whole.weight[rows, cols] += handle.parameters()[0]
    whole.weight.requires_grad_(True)
    x = torch.randn(24, 5, 7).permute(2, 1, 0)
    for module in (model, whole):
        module(x).square().sum().backward()
    assert torch.allclose(model(x), whole(x), atol=1e-5)
    dense = whole.weight.grad[rows, cols]
    assert torch.allclose(handle.parameters()[0].grad, dense, rtol=1e-4, atol=1e-4)


# --- merge, disable, several adapters ---


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_disabled_removed(arch):
    model = model_of(arch, torch.float32)
    base, state = logits(model), {n: v.clone() for n, v in model.state_dict().items()}
    handle = sparse(model, Coordinates.random(model, 60, seed=2))
    assert torch.equal(logits(model), base)
    set_random(handle)
    with_deltas = logits(model)
    assert not torch.allclose(with_deltas, base, atol=1e-4)
    with handle.disable():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_deltas)
    handle.merge()
    assert handle.merged and torch.allclose(logits(model), with_deltas, atol=1e-5)
    with pytest.raises(InvalidInput, match="merged already"):
        handle.merge()
    handle.unmerge()
    assert torch.equal(logits(model), with_deltas)
    with pytest.raises(InvalidInput, match="not merged"):
        handle.unmerge()
    handle.remove()
    assert torch.equal(logits(model), base)
    assert not any(isinstance(m, SparseDelta) for m in model.modules())
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[n], v) for n, v in state.items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_adapters_add_up(arch):
    model = model_of(arch, torch.float32)
    first = sparse(model, Coordinates.random(model, 40, seed=1), name="first")
    set_random(first)
    alone = logits(model)
    second = sparse(model, Coordinates.random(model, 40, seed=2), name="second")
    set_random(second, seed=9)
    both = logits(model)
    loss_of(model).backward()
    for handle in (first, second):
        assert any(p.grad is not None and p.grad.any() for p in handle.parameters())
    with first.disable():
        assert not torch.equal(logits(model), both)
    second.remove()
    assert torch.equal(logits(model), alone)
    with pytest.raises(InvalidInput, match="'first' already"):
        sparse(model, Coordinates.random(model, 4), name="first")
    assert torch.equal(logits(model), alone)


def test_a_copy_is_independent():
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.random(model, 40, seed=1))
    set_random(handle)
    copied = copy.deepcopy(model)
    before = logits(copied)
    assert torch.equal(before, logits(model))
    train(model, handle.parameters())
    assert torch.equal(logits(copied), before) and not torch.equal(logits(model), before)


# --- trainers ---


def test_accumulated_gradients_are_those_of_the_whole_batch():
    found = []
    for parts in (1, 2):
        model = model_of(dtype=torch.float32)
        handle = sparse(model, Coordinates.random(model, 50))
        for ids in token_ids(4, 12).chunk(parts):
            (model(input_ids=ids, labels=ids).loss / parts).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        found.append([norm, *(p.grad for p in handle.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant, first):
    plain = model_of(dtype=torch.float32).train()
    coordinates = Coordinates.random(plain, 50)
    expected = sparse(plain, coordinates)
    loss_of(plain).backward()
    model = model_of(dtype=torch.float32).train()
    options = {"use_reentrant": reentrant}
    if first:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    handle = sparse(model, coordinates)
    if not first:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    loss_of(model).backward()
    for ours, theirs in zip(handle.parameters(), expected.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_autocast():
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.random(model, 50))
    loss_of(model).backward()
    exact = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    for value, want in zip(handle.parameters(), exact):
        assert value.grad.dtype == torch.float32
        assert (value.grad - want).norm() < 0.05 * want.norm()


def test_a_grad_scaler_skips_a_step_that_overflows():
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.random(model, 50))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model)).backward()
    handle.parameters()[0].grad[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7 and not any(p.any() for p in handle.parameters())
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    assert all(p.any() for p in handle.parameters())


@pytest.mark.parametrize("made", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_an_optimizer_does_what_it_does_on_the_dense_weight(made):
    """The weight itself, trained with its gradient masked, moves as weight plus delta."""
    model = model_of()
    coordinates = Coordinates.random(model, 50, seed=1)
    handle = sparse(model, coordinates)
    losses = train(model, None, 3, made(handle.parameters(), lr=0.01, weight_decay=0.0))

    twin = model_of()
    twin_handle = sparse(twin, coordinates)
    targets = {site: twin_handle.target(site) for site in coordinates.weights}
    twin_handle.remove()
    entries = []
    for site, target in targets.items():
        rows, cols = coordinates.weights[site].long().unbind(1)
        entries.append((target, rows, cols, nn.Parameter(torch.zeros(len(rows)).double())))
    optimizer = made([entry[-1] for entry in entries], lr=0.01, weight_decay=0.0)
    start = [target.matrix()[rows, cols].clone() for target, rows, cols, _ in entries]
    expected = []
    for _ in range(3):
        twin.zero_grad()
        loss = loss_of(twin)
        loss.backward()
        expected.append(loss.item())
        for target, rows, cols, entry in entries:
            entry.grad = target.as_matrix(target.parameter.grad)[rows, cols]
        optimizer.step()
        for (target, rows, cols, entry), before in zip(entries, start):
            target.matrix()[rows, cols] = before + entry.detach()
    assert losses == pytest.approx(expected, rel=1e-5)
    for value, (*_, entry) in zip(handle.parameters(), entries):
        assert torch.allclose(value.double(), entry, rtol=1e-3, atol=1e-5)


def test_compiled():
    layers = nn.Sequential(nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16))
    handle = sparse(layers, Coordinates.random({"2": (16, 40)}, 30))
    set_random(handle)
    x = torch.randn(6, 16)
    layers(x).square().sum().backward()
    value = handle.parameters()[0]
    expected, value.grad = value.grad, None
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.allclose(y, layers(x), atol=1e-6)
    y.square().sum().backward()
    assert torch.allclose(value.grad, expected, rtol=1e-5, atol=1e-6)


# --- files ---


def test_save_and_resume_bit_for_bit(tmp_path):
    def make():
        model = model_of(dtype=torch.float32)
        handle = sparse(model, Coordinates.random(model, 50, seed=4))
        return model, handle, torch.optim.AdamW(handle.parameters(), lr=0.01)

    model, handle, optimizer = make()
    whole = train(model, None, 6, optimizer)
    values = [p.detach().clone() for p in handle.parameters()]
    model, handle, optimizer = make()
    train(model, None, 3, optimizer)
    handle.save(tmp_path / "a.safetensors")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    model, handle, optimizer = make()
    handle.load(tmp_path / "a.safetensors")
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert train(model, None, 3, optimizer) == whole[3:]
    assert all(torch.equal(a, b) for a, b in zip(values, handle.parameters()))


def test_a_state_dict_holds_the_values():
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.random(model, 50, seed=4))
    set_random(handle)
    state = {name: v.clone() for name, v in model.state_dict().items()}
    assert sum(handle.owns(name) for name in state) == len(handle.coordinates.weights)
    want = logits(model)
    set_random(handle, seed=8)
    assert not torch.equal(logits(model), want)
    model.load_state_dict(state)
    assert torch.equal(logits(model), want)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.random(model, 50))
    path = tmp_path / "a.safetensors"
    handle.save(path)
    before = path.read_bytes()
    assert before[8:9] == b"{"  # safetensors, no pickle
    set_random(handle)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(InvalidInput, match="No space"):
            handle.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("base", "another base.*load the model"),
        ("coordinates", "other coordinates of model.layers"),
        ("fewer", "which this adapter does not train"),
        ("more", "no values for model.layers"),
        ("foreign", "no file of swkernels.sparse/1"),
        ("torn", "cannot read"),
    ],
)
def test_a_file_of_something_else(tmp_path, change, message):
    from safetensors.torch import save_file

    names = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    listed = {name: [[1, 2], [3, 4]] for name in names}
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.of(listed, model))
    set_random(handle)
    path = tmp_path / "a.safetensors"
    handle.save(path)
    if change == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    elif change == "torn":
        path.write_bytes(path.read_bytes()[:40])
    other = model_of(dtype=torch.float32)
    if change == "base":
        with torch.no_grad():
            other.get_submodule(names[0]).weight[3, 4] += 1e-3
    elif change == "coordinates":
        listed[names[0]] = [[1, 2], [3, 5]]
    elif change == "fewer":
        del listed[names[1]]
    elif change == "more":
        listed[DOWN.replace("1", "2")] = [[0, 0]]
    loaded = sparse(other, Coordinates.of(listed, other))
    with pytest.raises(InvalidInput, match=message):
        loaded.load(path)
    assert not any(value.any() for value in loaded.parameters())


# --- bad input ---


@pytest.mark.parametrize(
    ("weights", "shapes", "message"),
    [
        ({DOWN: [[32, 0]]}, None, r"\[32, 0\] lies outside"),
        ({DOWN: [[1, 2], [1, 2]]}, None, "more than once"),
        ({DOWN: [[-1, 0]]}, None, r"\[-1, 0\] lies outside"),
        ({DOWN: [[1.0, 2.0]]}, None, "must be integers"),
        ({DOWN: []}, None, "there is no coordinate"),
        ({}, None, "expected one at least"),
        ({"model.layers.1.mlp.downproj": [[0, 0]]}, None, f"the nearest are {DOWN}"),
        ({"model.layers.1.input_layernorm": [[0, 0]]}, None, "expected a linear layer"),
        ({DOWN: [[0, 0]]}, {DOWN: (64, 80)}, r"\[32, 80\] in this model.*\[64, 80\]"),
        ({(DOWN, 0): [[0, 0]]}, {(DOWN, 0): (32, 80)}, "no fused experts"),
    ],
)
def test_wrong_coordinates_change_nothing(weights, shapes, message):
    model = model_of()
    before = [(p.requires_grad, id(p)) for p in model.parameters()]
    with pytest.raises(InvalidInput, match=message) as error:
        sparse(model, Coordinates.of(weights, shapes or model))
    assert "\n" not in str(error.value)
    assert [(p.requires_grad, id(p)) for p in model.parameters()] == before
    assert not any(isinstance(m, SparseDelta) for m in model.modules())


def test_experts_are_named_one_by_one():
    model = model_of("mixtral")
    sites = list(Coordinates.random(model, 500, seed=0).weights)
    fused = next((site for site in sites if site.expert is not None), None)
    if fused is None:
        pytest.skip("this version of transformers keeps Mixtral's experts as modules")
    listed = Coordinates.of({fused.name: [[0, 0]]}, {fused.name: (32, 80)})
    with pytest.raises(InvalidInput, match="several experts: name one of them"):
        sparse(model, listed)


def test_a_base_on_the_meta_device_is_not_merged():
    layer = nn.Linear(8, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4))
    handle = sparse(model, Coordinates.of({"0": [[0, 0]], "1": [[1, 1]]}, model))
    set_random(handle)
    before = model[0].weight.clone()
    model[1].weight = nn.Parameter(model[1].weight.to("meta"), requires_grad=False)
    with pytest.raises(InvalidInput, match="1 is packed, sharded or on the meta device"):
        handle.merge()
    assert torch.equal(model[0].weight, before) and not handle.merged


def test_nan_gradients_arrive():
    """They are neither hidden nor clamped: clipping, a GradScaler or the caller sees them."""
    model = model_of(dtype=torch.float32)
    handle = sparse(model, Coordinates.of({DOWN: [[1, 2], [3, 4]]}, model))
    (loss_of(model) * math.nan).backward()
    assert handle.parameters()[0].grad.isnan().all()
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(handle.parameters(), 1.0, error_if_nonfinite=True)
