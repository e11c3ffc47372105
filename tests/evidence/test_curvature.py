"""Second derivatives by single weights, against dense ones and against the papers' formulas."""

from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from swkernels.errors import InvalidInput
from swkernels.evidence.curvature import Curvature, curvature
from swkernels.evidence.probe import probe
from swkernels.evidence.sensitivity import Sensitivity, sensitivity
from swkernels.evidence.spread import Spread
from swkernels.train import Coordinates
from tests.evidence.bytes import digest
from tests.models.tiny import tiny_model, token_ids

LLAMA = "model.layers.{}.mlp.down_proj"
GPT2 = "transformer.h.{}.mlp.c_proj"
IDS = list(token_ids(2, 12))


def build(name, **changes):
    changes.setdefault("initializer_range", 0.3)
    return tiny_model(name, **changes).double()


def loss_of(model, ids):
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:])


def dense(model, parameter, index, ids):
    """The gradient and the diagonal of the Hessian by some elements of a parameter."""
    weight = model.get_parameter(parameter).detach()
    index = tuple(torch.tensor(axis) for axis in zip(*index))

    def loss(moved):
        changed = {parameter: weight.index_put(index, moved, accumulate=True)}
        out = functional_call(model, changed, (ids[None],), {"use_cache": False})
        return F.cross_entropy(out.logits[0, :-1], ids[1:])

    at = torch.zeros(len(index[0]), dtype=weight.dtype)
    gradient = torch.autograd.functional.jacobian(loss, at)
    return gradient, torch.autograd.functional.hessian(loss, at).diagonal()


def assert_exact(found, model, parameter, index, tolerance=1e-4):
    """Compare the entries' part of a probe with ``dense``; ``index``: into the parameter.

    The norms of Llama and its kin compute in float32 whatever the model is in, hence the tolerance.
    """
    largest = 0.0
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    for number, ids in enumerate(IDS):
        gradient, curve = dense(model, parameter, index, ids)
        largest = max(largest, float(curve.abs().max()))
        own = found.own(found.gradients)[number], found.own(found.curvatures)[number]
        for ours, theirs in zip(own, (gradient, curve)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max())
    assert largest > 1e-6


def test_grouped_query_attention():
    model = build("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    places = [[1, 2], [1, 7], [5, 7]]
    found = probe(model, Coordinates.of({LLAMA.format(1): places}, model), IDS)
    assert [(e.row, e.column) for e in found.entries] == [tuple(p) for p in places]
    assert_exact(found, model, f"{LLAMA.format(1)}.weight", places)


def test_the_gradient_is_that_of_a_plain_backward():
    model = build("llama")
    places = [[1, 2], [5, 7]]
    found = probe(model, Coordinates.of({LLAMA.format(0): places}, model), IDS, random=3)
    for number, ids in enumerate(IDS):
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
        grad = model.get_submodule(LLAMA.format(0)).weight.grad
        entries = [*found.entries, *(e for drawn in found.controls for e in drawn)]
        expected = torch.stack([grad[e.row, e.column] for e in entries])
        torch.testing.assert_close(found.gradients[number], expected, rtol=1e-4, atol=1e-7)


def test_several_layers_together():
    model = build("llama")
    listed = {LLAMA.format(2): [[0, 1]], LLAMA.format(0): [[3, 4]]}
    together = probe(model, Coordinates.of(listed, model), IDS)
    for column, (name, places) in enumerate(listed.items()):
        alone = probe(model, Coordinates.of({name: places}, model), IDS)
        torch.testing.assert_close(
            together.own(together.curvatures)[:, column], alone.own(alone.curvatures)[:, 0]
        )


def test_conv1d():
    model = build("gpt2")
    places = [[1, 2], [5, 7]]
    found = probe(model, Coordinates.of({GPT2.format(1): places}, model), IDS)
    assert_exact(found, model, f"{GPT2.format(1)}.weight", [p[::-1] for p in places], 1e-9)


def test_a_head_that_is_tied_to_the_embedding():
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    seen = int(IDS[0][3])  # a row that the embedding uses
    places = [[seen, 4], [127, 9]]
    found = probe(model, Coordinates.of({"lm_head": places}, model), IDS)
    order = [[e.row, e.column] for e in found.entries]
    assert_exact(found, model, "model.embed_tokens.weight", order)
    assert "tied" in found.notes[0]


def test_a_weight_that_another_kind_of_module_holds_too():
    class Scaled(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    model = build("llama")
    name = "model.layers.1.mlp.down_proj"
    model.other = Scaled(model.get_submodule(name).weight)
    with pytest.raises(InvalidInput, match="is tied to other, a Scaled: expected a layer of its"):
        probe(model, Coordinates.of({name: [[1, 2]]}, model), IDS)


def test_layers_that_share_a_weight():
    model = build("gpt2")
    first, last = (model.get_submodule(GPT2.format(n)) for n in (0, 2))
    last.weight = first.weight
    coordinates = Coordinates.of({GPT2.format(0): [[1, 2]]}, model)
    found = probe(model, coordinates, IDS)
    assert_exact(found, model, f"{GPT2.format(0)}.weight", [[2, 1]], 1e-9)
    last.weight = torch.nn.Parameter(first.weight.detach().clone())
    alone = probe(model, coordinates, IDS)
    assert (found.curvatures - alone.curvatures)[:, 0].abs().max() > 1e-5


@pytest.mark.parametrize("name", ["mixtral", "llama4", "jetmoe"])
def test_fused_experts(name):
    model = build(name)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    layer, parameter, stored = {
        "mixtral": ("model.layers.1.mlp.experts", "down_proj", lambda r, c: (r, c)),
        "llama4": ("model.layers.1.feed_forward.experts", "down_proj", lambda r, c: (c, r)),
        "jetmoe": ("model.layers.1.mlp.output_linear", "weight", lambda r, c: (r, c)),
    }[name]
    for expert in {"llama4": (0, 1)}.get(name, (0, 2)):
        places = [[3, 5], [4, 6]]
        found = probe(model, Coordinates.of({(layer, expert): places}, model), IDS)
        index = [(expert, *stored(r, c)) for r, c in places]
        assert_exact(found, model, f"{layer}.{parameter}", index)


def test_the_grouped_product_of_experts():
    model = build("mixtral").float()
    coordinates = Coordinates.of({("model.layers.1.mlp.experts", 2): [[3, 5], [4, 6]]}, model)
    model.set_experts_implementation("grouped_mm")
    found = probe(model, coordinates, IDS)
    model.set_experts_implementation("eager")
    expected = probe(model.double(), coordinates, IDS)
    scale = float(expected.curvatures.abs().max())
    torch.testing.assert_close(found.curvatures, expected.curvatures, rtol=0, atol=1e-3 * scale)


def test_an_expert_that_no_token_reaches():
    model = build("mixtral")
    model.set_experts_implementation("eager")
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():  # the first two experts for every token, whose channel 0 is one
        gate.weight.zero_()
        gate.weight[:2, 0] = torch.tensor([100.0, 90.0])
    gate.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
    coordinates = Coordinates.of({("model.layers.1.mlp.experts", 3): [[1, 2]]}, model)
    found = probe(model, coordinates, IDS)
    assert found.gradients.eq(0).all() and found.curvatures.eq(0).all()
    assert Curvature(found).ratios.undefined == 2 and math.isnan(Curvature(found).ratios.mean)


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_finite_differences_in_float64(eps):
    model = build("gpt2")
    name = GPT2.format(1)
    found = curvature(model, Coordinates.of({name: [[1, 2], [5, 7]]}, model), IDS, eps=eps)
    copied = copy.deepcopy(model)
    weight = copied.get_submodule(name).weight
    with torch.no_grad():
        for number, ids in enumerate(IDS):
            for place, (row, column) in enumerate([(1, 2), (5, 7)]):
                kept, losses = float(weight[column, row]), []
                for step in (eps, 0, -eps):
                    weight[column, row] = kept + step
                    losses.append(float(loss_of(copied, ids)))
                weight[column, row] = kept
                estimate = (losses[0] - 2 * losses[1] + losses[2]) / eps**2
                ours = float(found.finite_differences[number, place])
                assert abs(ours - estimate) < 1e-8 / eps
    scale = found.exact.abs().max()
    assert (found.finite_differences - found.exact).abs().max() < 10 * eps**2 * scale + 1e-9
    assert found.buried == 0


def test_noise_says_what_rounding_does():
    model, name = build("gpt2"), GPT2.format(1)
    places = [[row, 3 * row] for row in range(8)]
    exact = curvature(model, Coordinates.of({name: places}, model), IDS).exact
    model.float()
    found = curvature(model, Coordinates.of({name: places}, model), IDS)
    # In float32 the exact ones agree with float64, and the differences are off by the noise.
    torch.testing.assert_close(found.exact, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))
    off = (found.finite_differences - exact).square().mean().sqrt()
    assert 0.2 < off / found.noise.square().mean().sqrt() < 3
    assert off > exact.abs().max()
    assert found.buried == 1.0
    rounding = found.probe.rounding
    torch.testing.assert_close(found.noise[:, 0], rounding * math.sqrt(6) / 1e-8, rtol=0.02, atol=0)


def test_steps_that_are_not_equal():
    """A parabola's second derivative is exact whatever the two steps are."""
    model = build("gpt2")
    found = curvature(model, Coordinates.of({GPT2.format(0): [[1, 2]]}, model), IDS)
    above, below = 0.5, 0.125
    steps = torch.tensor([[above, above], [below, below]], dtype=torch.float64)
    up, down = 3 + 2 * above + 7 * above**2, 3 - 2 * below + 7 * below**2
    ones = torch.ones(2, 2, dtype=torch.float64)
    fields = {**vars(found.probe), "steps": steps, "losses": 3 * ones[:, 0]}
    parabola = Curvature(type(found.probe)(**{**fields, "up": up * ones, "down": down * ones}))
    torch.testing.assert_close(parabola.finite_differences, 14 * ones)


def test_ratios_and_rows():
    model = build("llama")
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2], [5, 7]]}, model)
    found = curvature(model, coordinates, IDS, random=3)
    exact, pairs = found.exact.tolist(), []
    for row in exact:
        controls = [row[2:5], row[5:8]]
        pairs += [own / one for own, drawn in zip(row[:2], controls) for one in drawn]
    ratios = found.ratios
    assert ratios.count == len(pairs) == 12 and ratios.undefined == 0
    expected = statistics.mean(pairs), statistics.median(pairs), max(pairs)
    assert (ratios.mean, ratios.median, ratios.maximum) == pytest.approx(expected)
    assert ratios.deviation == pytest.approx(statistics.pstdev(pairs))
    assert found.magnitude_ratios.median == pytest.approx(statistics.median(map(abs, pairs)))
    first, second = found.rows()
    assert (first["layer"], first["row"], first["column"]) == (1, 1, 2)
    assert first["curvature"] == pytest.approx((exact[0][0] + exact[1][0]) / 2)
    random = statistics.mean(exact[0][5:8] + exact[1][5:8])
    assert second["random_curvature"] == pytest.approx(random)
    assert second["ratio"] == pytest.approx(second["curvature"] / random)
    noise = found.noise[:, 1].tolist()
    assert second["noise"] == pytest.approx(math.hypot(*noise) / 2)


def test_random_positions():
    model = build("llama")
    listed = {LLAMA.format(0): [[1, 2], [1, 3]], LLAMA.format(2): [[4, 4], [4, 5]]}
    coordinates = Coordinates.of(listed, model)
    drawn = {}
    for seed in (0, 0, 1):
        found = probe(model, coordinates, IDS[:1], random=2, seed=seed)
        places = []
        for entry, controls in zip(found.entries, found.controls):
            for one in controls:
                assert one.site == entry.site and len(controls) == 2
                matrix = model.get_submodule(one.site.name).weight
                assert one.value == float(matrix[one.row, one.column])
                places.append((one.layer, one.row, one.column))
        assert len(set(places)) == 8
        assert not set(places) & {(e.layer, e.row, e.column) for e in found.entries}
        assert {p[1:] for p in places if p[0] == 0} != {p[1:] for p in places if p[0] == 2}
        drawn.setdefault(seed, []).append((places, found.curvatures.tolist()))
    assert drawn[0][0] == drawn[0][1] and drawn[0][0] != drawn[1][0]


def test_random_positions_of_the_same_row():
    model, name = build("llama"), LLAMA.format(0)
    coordinates = Coordinates.of({name: [[1, 2], [1, 3], [4, 0]]}, model)
    model.set_attn_implementation("eager")
    found = probe(model, coordinates, IDS[:1], random=2, same_row=True)
    assert [[one.row for one in drawn] for drawn in found.controls] == [[1, 1], [1, 1], [4, 4]]
    places = {(e.row, e.column) for e in found.entries}
    places |= {(one.row, one.column) for drawn in found.controls for one in drawn}
    assert len(places) == 9
    again = probe(model, coordinates, IDS[:1], random=2, same_row=True)
    assert torch.equal(again.curvatures, found.curvatures)
    other = probe(model, coordinates, IDS[:1], random=2, same_row=True, seed=1)
    assert not torch.equal(other.curvatures, found.curvatures)
    indices = [[e.row, e.column] for e in (*found.entries, *(o for d in found.controls for o in d))]
    _, curve = dense(model, f"{name}.weight", indices, IDS[0])
    torch.testing.assert_close(found.curvatures[0], curve, rtol=0, atol=1e-4 * float(curve.max()))
    with pytest.raises(InvalidInput, match="row 1 .* expected 98"):
        probe(model, coordinates, IDS[:1], random=49, same_row=True)


def test_sensitivity():
    model, name = build("gpt2"), GPT2.format(1)
    found = sensitivity(model, Coordinates.of({name: [[1, 2]]}, model), IDS, eps=1e-3, random=2)
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        before, kept = float(loss_of(model, IDS[1])), float(weight[2, 1])
        weight[2, 1] = kept + 1e-3
        after = float(loss_of(model, IDS[1]))
        weight[2, 1] = kept
    assert float(found.measured[1, 0]) == pytest.approx(abs(after - before), rel=1e-6)
    torch.testing.assert_close(found.foretold, found.measured, rtol=1e-4, atol=1e-9)
    # The curvature is needed to foretell: the gradient alone is further off.
    alone = (found.probe.gradients * 1e-3).abs()
    assert (alone - found.measured).norm() > 100 * (found.foretold - found.measured).norm()
    assert found.ratios.mean == pytest.approx(found.measured_ratios.mean, rel=1e-3)
    torch.testing.assert_close(found.noise, math.sqrt(2) * found.probe.rounding)
    assert found.buried == 0 and len(found.rows()) == 1


def test_spread():
    found = Spread.of([1.0, math.inf, 3.0, math.nan, -8.0])
    assert (found.count, found.undefined) == (3, 2)
    assert (found.median, found.maximum) == (1.0, 3.0)
    assert found.mean == pytest.approx(-4 / 3)
    assert found.deviation == pytest.approx(statistics.pstdev([1, 3, -8]))


@pytest.mark.parametrize("kind", [Curvature, Sensitivity])
def test_documents_and_figures(kind, tmp_path):
    model = build("llama")
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2], [5, 7]]}, model)
    found = kind(probe(model, coordinates, IDS))
    found.save(tmp_path / "found.json")
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["schema"] == kind.schema and document["rows"] == found.rows()
    assert document["probe"]["curvatures"] == found.probe.curvatures.tolist()
    assert [e["column"] for e in document["probe"]["entries"]] == [2, 7]
    found.plot(tmp_path / "found.svg")
    drawn = (tmp_path / "found.svg").read_text()
    assert "layer 1 [5, 7]" in drawn and "eps" in drawn


def state(model):
    """Everything that a caller may have set."""
    modules = [
        (m.training, list(m._forward_hooks), list(m._forward_pre_hooks), "forward" in m.__dict__)
        for m in model.modules()
    ]
    gradients = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    attention = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        model.config._attn_implementation,
    )
    return digest(model), modules, gradients, attention, torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_model_is_as_before(name):
    model = build(name).float()
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].input_layernorm.weight.requires_grad_(False)
    site = LLAMA.format(1) if name == "llama" else ("model.layers.1.mlp.experts", 1)
    coordinates = Coordinates.of({site: [[1, 2]]}, model)
    before, calls = state(model), []
    with torch.inference_mode():
        found = probe(model, coordinates, IDS)
    assert found.curvatures.abs().max() > 0
    assert state(model) == before

    class Stop(BaseException):
        pass

    limit = [0]

    def count(module, args):
        calls.append(1)
        if len(calls) == limit[0]:
            raise Stop

    handle = model.lm_head.register_forward_pre_hook(count)
    before = state(model)
    for limit[0] in (2, 4, 8):  # with the graph, with a weight moved, to see the rounding
        calls.clear()
        with pytest.raises(Stop):
            probe(model, coordinates, IDS)
        assert state(model) == before
    handle.remove()


def test_a_hook_of_the_callers_comes_after_the_offset():
    model = build("llama")
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2]]}, model)
    plain = probe(model, coordinates, IDS)
    module = model.get_submodule(LLAMA.format(1))
    module.register_forward_hook(lambda module, args, y: 3 * y)
    found = probe(model, coordinates, IDS)
    assert (found.gradients - plain.gradients).abs().max() > 1e-6
    assert_exact(found, model, f"{LLAMA.format(1)}.weight", [[1, 2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(random=0), "random must be an integer of at least 1, got 0"),
        (dict(random=True), "random must be an integer"),
        (dict(eps=0.0), "eps must be a finite number above 0, got 0.0"),
        (dict(eps=math.nan), "eps must be a finite number"),
        (dict(eps=1e-30), "does not change in its dtype: give a larger eps"),
        (dict(inputs=[torch.tensor([5])]), "input 0 has 1 token"),
        (dict(inputs=[torch.tensor([5, 1000])]), "outside the model's vocabulary"),
        (dict(random=32 * 80), "expected k from 1 to 2559"),
    ],
)
def test_bad_arguments(changes, message):
    model = build("llama")
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2]]}, model)
    with pytest.raises(InvalidInput, match=message) as error:
        curvature(model, coordinates, **{"inputs": IDS, **changes})
    assert "\n" not in str(error.value)


def test_what_cannot_be_differentiated():
    model = build("llama").bfloat16()
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2]]}, model)
    with pytest.raises(InvalidInput, match="bfloat16, too coarse .* load the model in float32"):
        curvature(model, coordinates, IDS)
    model.float()
    mlp, down = model.model.layers[1].mlp, model.model.layers[1].mlp.down_proj
    mlp.forward = lambda x: F.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), down.weight)
    with pytest.raises(InvalidInput, match="was not called in the forward"):
        curvature(model, coordinates, IDS)
    t5 = tiny_model("t5")
    name = "decoder.block.0.layer.2.DenseReluDense.wo"
    with pytest.raises(InvalidInput, match="needs a decoder"):
        curvature(t5, Coordinates.of({name: [[1, 2]]}, t5), IDS)


def test_experts_whose_product_is_not_seen():
    model = build("mixtral").float()
    model.model.layers[1].mlp.experts.forward = lambda hidden, *routing: 2 * hidden
    coordinates = Coordinates.of({("model.layers.1.mlp.experts", 3): [[1, 2]]}, model)
    with pytest.warns(RuntimeWarning), pytest.raises(InvalidInput, match="experts of model.layers"):
        curvature(model, coordinates, IDS)


class Once(torch.autograd.Function):
    """The identity, whose backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_a_forward_without_second_derivatives():
    model = build("llama")
    model.model.norm.register_forward_hook(lambda module, args, y: Once.apply(y))
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2]]}, model)
    with pytest.raises(InvalidInput, match="cannot be differentiated twice .*eager") as error:
        curvature(model, coordinates, IDS)
    assert "\n" not in str(error.value)


def test_losses_that_are_not_finite_are_named():
    model = build("llama")
    coordinates = Coordinates.of({LLAMA.format(1): [[1, 2]]}, model)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = math.nan
    inputs = [torch.tensor([5, 6, 7]), torch.tensor([5, 77, 7])]
    with pytest.raises(InvalidInput, match="the loss of input 1 is nan"):
        curvature(model, coordinates, inputs)
    found = curvature(build("llama").float(), coordinates, IDS, eps=3e38)
    assert found.exact.isfinite().all() and found.probe.up[:, 1].isnan().all()
    assert math.isnan(found.rows()[0]["random_differences"])
    assert found.difference_ratios.undefined == 2
    assert Sensitivity(found.probe).measured_ratios.undefined == 2
