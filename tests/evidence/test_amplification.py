"""M of the inputs of down projections, against hooks by hand."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from swkernels import find_down_projections
from swkernels.errors import InvalidInput, NonFiniteActivation
from swkernels.evidence.amplification import amplification
from swkernels.models.experts import observe_experts
from swkernels.train import Coordinates, Site
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, plant
from tests.evidence.bytes import digest
from tests.models.test_projections import UnfusedMoE
from tests.models.tiny import run, tiny_model, token_ids

DOWN = "model.layers.{}.mlp.down_proj"
PROMPTS = [ids[: 6 + 3 * n] for n, ids in enumerate(token_ids(3, 16))]


def by_hand(model, name, ids):
    """M [tokens, channels] of one prompt, from a hook of our own."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].double()))
    with torch.no_grad():
        run(model, ids[None])
    handle.remove()
    x = seen[0].flatten(0, -2).abs()
    return x / x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "path"), [("llama", DOWN), ("gpt2", "transformer.h.{}.mlp.c_proj"), ("opt", None)]
)
def test_layers_and_columns(name, path):
    model = tiny_model(name)
    path = path or "model.decoder.layers.{}.fc2"
    coordinates = Coordinates.of({path.format(1): [[0, 9], [4, 9], [2, 3]]}, model)
    found = amplification(model, PROMPTS, coordinates=coordinates)
    assert found.prompts == 3 and found.tokens == sum(map(len, PROMPTS))
    assert [one.layer for one in found.layers] == [0, 1, 2]
    for one in found.layers:
        ratios = [by_hand(model, path.format(one.layer), ids) for ids in PROMPTS]
        largest = [float(each.max()) for each in ratios]
        assert one.values == pytest.approx(largest, rel=1e-12)
        best = ratios[one.prompt][one.token, one.channel]
        assert float(best) == pytest.approx(max(largest), rel=1e-12)
        row = one.row()
        assert row["mean"] == pytest.approx(statistics.mean(largest))
        assert row["median"] == pytest.approx(statistics.median(largest))
        assert row["maximum"] == pytest.approx(max(largest))
    assert [one.column for one in found.columns] == [3, 9]
    for one in found.columns:
        ratios = [by_hand(model, path.format(1), ids)[:, one.column] for ids in PROMPTS]
        assert one.values == pytest.approx([float(each.max()) for each in ratios], rel=1e-12)
        assert int(ratios[one.prompt].argmax()) == one.token and one.channel == one.column
    assert found.at(Site(path.format(1)), 9) is found.columns[1]
    assert found.at(Site(path.format(1)), 4) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_summed_in_float64(dtype):
    model = tiny_model("llama").to(dtype)
    found = amplification(model, PROMPTS)
    for one in found.layers:
        expected = [float(by_hand(model, DOWN.format(one.layer), ids).max()) for ids in PROMPTS]
        assert one.values == pytest.approx(expected, rel=1e-12)


def calls_of(projections, run_it):
    """What ``observe_experts`` sees of some experts."""
    calls = []
    with torch.no_grad(), observe_experts(projections, lambda *call: calls.append(call)):
        run_it()
    return calls


@pytest.mark.parametrize("name", ["mixtral", "llama4", "dbrx"])
def test_experts_see_the_rows_routed_to_them(name):
    model = tiny_model(name)
    projection = [p for p in find_down_projections(model) if p.experts is not None][0]
    coordinates = Coordinates.of({(projection.name, 1): [[0, 5]]}, model)
    found = amplification(model, PROMPTS, coordinates=coordinates)
    values = {expert: [] for expert in range(projection.experts)}
    columns = []
    for ids in PROMPTS:
        seen = {}
        for _, expert, x, _, tokens in calls_of(
            [projection], lambda ids=ids: run(model, ids[None])
        ):
            kept = x.double().abs()[slice(None) if tokens is None else tokens >= 0]
            seen.setdefault(expert, []).append(kept)
        for expert, parts in seen.items():
            x = torch.cat(parts)
            if len(x):
                ratios = x / x.mean(1, keepdim=True)
                values[expert].append(float(ratios.max()))
                columns += [float(ratios[:, 5].max())] if expert == 1 else []
    own = [one for one in found.layers if one.module == projection.name]
    assert [one.expert for one in own] == list(values)
    for one in own:
        assert one.values == pytest.approx(values[one.expert], rel=1e-12)
        assert one.row()["prompts"] == len(values[one.expert])
    beside = [one for one in found.layers if one.layer == projection.layer]
    best = max(beside, key=lambda one: sum(one.values) / len(one.values) if one.values else 0)
    assert best in found.by_layer() and len(found.by_layer()) == 3
    [column] = found.columns
    assert (column.expert, column.column) == (1, 5)
    assert column.values == pytest.approx(columns, rel=1e-12)


def test_experts_that_are_modules():
    """The token is the prompt's, not the row's."""
    torch.manual_seed(0)
    model = UnfusedMoE()
    found = amplification(model, [ids % 50 for ids in PROMPTS])
    assert [one.expert for one in found.layers] == [0, 1, 2, 0, 1, 2]
    reached = [one for one in found.layers if one.values]
    assert len(reached) >= 3
    for one in reached:
        ids = PROMPTS[one.prompt][None] % 50
        projections = [p for p in find_down_projections(model) if p.name == one.module]
        [(_, _, x, _, tokens)] = calls_of(projections, lambda ids=ids: model(ids))
        x = x.double().abs()[tokens == one.token]
        assert float((x / x.mean(1))[0, one.channel]) == pytest.approx(max(one.values), rel=1e-12)


def test_another_linear_layer():
    model = tiny_model("llama")
    coordinates = Coordinates.of({"lm_head": [[3, 4]]}, model)
    [column] = amplification(model, PROMPTS, coordinates=coordinates).columns
    assert column.layer is None and column.module == "lm_head"
    expected = [float(by_hand(model, "lm_head", ids)[:, 4].max()) for ids in PROMPTS]
    assert column.values == pytest.approx(expected, rel=1e-12)


def test_tokens_whose_input_is_zero_do_not_count():
    model = tiny_model("llama")
    ids = PROMPTS[2]
    plain = by_hand(model, DOWN.format(0), ids)

    def blank(module, args):
        x = args[0].clone()
        x[:, 2:] = 0
        return (x,)

    model.get_submodule(DOWN.format(0)).register_forward_pre_hook(blank)
    first = amplification(model, [ids]).layers[0]
    assert first.values[0] == pytest.approx(float(plain[:2].max()), rel=1e-12)

    def dark(module, args):
        return (torch.zeros_like(args[0]),)

    model.get_submodule(DOWN.format(0)).register_forward_pre_hook(dark)
    first = amplification(model, [ids]).layers[0]
    assert first.values == () and first.channel is None and first.row()["prompts"] == 0


def test_texts_and_a_planted_weight(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    plant(model)
    coordinates = Coordinates.of({DOWN.format(1): [[5, 7]]}, model)
    found = amplification(
        model, TEXT * 9, tokenizer=tokenizer, coordinates=coordinates, samples=4, length=20
    )
    assert (found.prompts, found.tokens) == (4, 80)
    assert found.layers[1].channel == 7
    assert found.columns[0].values == found.layers[1].values
    found.save(tmp_path / "m.json")
    document = json.loads((tmp_path / "m.json").read_text())
    assert document["schema"] == "swkernels.amplification/1"
    assert document["columns"][0]["values"] == list(found.columns[0].values)
    assert [row["column"] for row in found.rows()] == [None, None, 7]
    found.plot(tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 5000


def test_the_model_is_as_before():
    for name in ("llama", "mixtral"):
        model = tiny_model(name).train()
        before = digest(model)
        amplification(model, PROMPTS[:1])
        model.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
        coordinates = Coordinates.of({"lm_head": [[3, 4]]}, model)
        with pytest.raises(ZeroDivisionError):
            amplification(model, PROMPTS, coordinates=coordinates)
        assert digest(model) == before and all(m.training for m in model.modules())
        hooks = [m for m in model.modules() if m._forward_pre_hooks or "forward" in m.__dict__]
        assert hooks == [model.lm_head]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad):
    model = tiny_model("llama")

    def spoil(module, args):
        x = args[0].clone()
        x[0, 3, 11] = bad
        return (x,)

    model.get_submodule(DOWN.format(1)).register_forward_pre_hook(spoil)
    where = f"{bad} in the input of {DOWN.format(1)}, channel 11"
    with pytest.raises(NonFiniteActivation, match=where):
        amplification(model, PROMPTS)


def test_bad_input():
    model = tiny_model("llama")
    with pytest.raises(InvalidInput, match="texts need a tokenizer"):
        amplification(model, ["a text"])
    with pytest.raises(InvalidInput, match="outside the model's vocabulary"):
        amplification(model, [torch.tensor([1000])])
    other = Coordinates.of({DOWN.format(0): [[0, 0]]}, {DOWN.format(0): (8, 8)})
    with pytest.raises(InvalidInput, match=r"is \[32, 80\] in this model"):
        amplification(model, PROMPTS, coordinates=other)
