"""Weights changed for a while: what they become, and that every bit is back, whatever happens."""

from __future__ import annotations

import math

import pytest
import torch

from swkernels.detect import evaluate
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.evidence import edits as module_under_test
from swkernels.evidence.edits import CATALOGUE, Edits, weights_of
from swkernels.quant import QuantConfig, quantize
from swkernels.train import Coordinates
from tests.cli.checkpoints import make_model
from tests.detect.fake_report import candidate, report
from tests.evidence.bytes import digest
from tests.interrupts import interrupted
from tests.models.tiny import tiny_model

NAME, FIRST = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
WEIGHTS = {NAME: [[5, 7], [3, 4]], FIRST: [[2, 9]]}
PLACES = {(name, *place) for name, listed in WEIGHTS.items() for place in listed}


@pytest.fixture
def model():
    return make_model()


def values(model) -> dict:
    """Every parameter, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changes(model, before: dict) -> dict:
    """(name, row, column): the value, of every entry that is not as before."""
    found = {}
    for name, p in model.named_parameters():
        for place in (p.detach() != before[name]).nonzero().tolist():
            found[(name.removesuffix(".weight"), *place)] = p[tuple(place)].item()
    return found


def test_only_the_entries_change_and_all_come_back(model):
    before, bits = values(model), digest(model)
    edits = Edits(model, Coordinates.of(WEIGHTS, model))
    assert {(e.site.name, e.row, e.column) for e in edits.entries} == PLACES
    for entry in edits.entries:
        assert entry.value == float(before[f"{entry.site.name}.weight"][entry.row, entry.column])
    with edits.zeroed():
        assert changes(model, before) == dict.fromkeys(PLACES, 0.0)
    assert digest(model) == bits
    with edits.scaled(-2.0, edits.entries[1:]):
        assert changes(model, before) == {
            (e.site.name, e.row, e.column): -2 * e.value for e in edits.entries[1:]
        }  # fmt: skip
        with edits.zeroed(edits.entries[:2]), edits.scaled(4.0):
            found = changes(model, before)
            first, second, third = ((e.site.name, e.row, e.column) for e in edits.entries)
            assert found[first] == found[second] == 0
            assert found[third] == -8 * edits.entries[2].value
    assert digest(model) == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_that_arithmetic_would_lose(model, dtype):
    """An infinite weight becomes zero, and what overflows or vanishes comes back."""
    model = model.to(dtype)
    with torch.no_grad():
        weight = model.get_submodule(NAME).weight
        weight[0, 0], weight[0, 1] = math.inf, -math.inf
        weight[0, 2], weight[0, 3] = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
    bits = digest(model)
    edits = Edits(model, Coordinates.of({NAME: [[0, c] for c in range(4)]}, model))
    with edits.zeroed():
        assert weight[0, :4].tolist() == [0, 0, 0, 0]
    assert digest(model) == bits
    with edits.scaled(1e-30), edits.scaled(1e30):
        pass
    assert digest(model) == bits


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_inside(model, error):
    bits = digest(model)
    edits = Edits(model, Coordinates.of(WEIGHTS, model))
    with pytest.raises(error):
        with edits.zeroed():
            assert digest(model) != bits
            raise error
    assert digest(model) == bits


def test_ctrl_c_at_any_point(model):
    """Before, while and after weights change, and while they are put back."""
    bits, seen = digest(model), set()
    edits = Edits(model, Coordinates.of(WEIGHTS, model))

    def run():
        with edits.zeroed():
            seen.add(digest(model))

    modules = module_under_test, evaluate
    looks = interrupted(run, -1, modules)
    assert looks > 20 and seen != {bits}
    for at in range(1, looks + 1):
        assert interrupted(run, at, modules) >= at
        assert digest(model) == bits, f"look {at} of {looks}"


def test_ctrl_c_twice_while_weights_are_put_back(model, monkeypatch):
    bits = digest(model)
    edits = Edits(model, Coordinates.of(WEIGHTS, model))
    left, put_back = [2], evaluate._put_back_last

    def interrupts(saved):
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        put_back(saved)

    monkeypatch.setattr(evaluate, "_put_back_last", interrupts)
    with pytest.raises(KeyboardInterrupt):
        with edits.zeroed():
            assert digest(model) != bits
    assert left == [0] and digest(model) == bits


def test_entries_that_cannot_be_changed(model):
    with torch.no_grad():
        model.get_submodule(NAME).weight[1, 1] = 0.0
        model.get_submodule(NAME).weight[1, 2] = math.nan
    bits = digest(model)
    for column, words in ((1, "zero already"), (2, "NaN")):
        with pytest.raises(InvalidInput, match=rf"layer 1 \[1, {column}\] is {words}"):
            Edits(model, Coordinates.of({NAME: [[0, 0], [1, column]]}, model))
    wrong = Coordinates.of({NAME: [[0, 0]]}, {NAME: (32, 49)})
    with pytest.raises(InvalidInput, match=r"is \[32, 48\] in this model"):
        Edits(model, wrong)
    elsewhere = Coordinates.of({"model.layers.9.mlp.down_proj": [[0, 0]]},
                               {"model.layers.9.mlp.down_proj": (32, 48)})  # fmt: skip
    with pytest.raises(InvalidInput, match="no module 'model.layers.9.mlp.down_proj'"):
        Edits(model, elsewhere)
    assert digest(model) == bits


def test_packed_weights_are_refused(model):
    quantize(model, QuantConfig(block_size="tensor"), progress=False)
    bits = digest(model)
    with pytest.raises(InvalidInput, match=f"{NAME} is packed .*load the model unquantized"):
        Edits(model, Coordinates.of({NAME: [[5, 7]]}, {NAME: (32, 48)}))
    with pytest.raises(InvalidInput, match="is packed"):
        Edits(model, weights_of(model, "1:5:7"))
    assert digest(model) == bits


def test_tied_weights_are_named_and_change_once():
    model = make_model(tie_word_embeddings=True)
    bits = digest(model)
    edits = Edits(model, Coordinates.of({"lm_head": [[4, 5]]}, model))
    assert edits.notes == [
        "model.embed_tokens.weight is tied to lm_head.weight: they change together"
    ]
    with edits.scaled(2.0):
        assert model.model.embed_tokens.weight[4, 5] == 2 * edits.entries[0].value
    assert digest(model) == bits
    assert Edits(model, Coordinates.of(WEIGHTS, model)).notes == []


def test_transposed_and_fused_weights():
    model = tiny_model("gpt2")
    name = "transformer.h.1.mlp.c_proj"
    edits = Edits(model, weights_of(model, "1:5:70"))
    bits = digest(model)
    with edits.zeroed():
        assert model.get_submodule(name).weight[70, 5] == 0  # [H, D]
    assert digest(model) == bits and edits.entries[0].label == "layer 1 [5, 70]"
    model = tiny_model("mixtral")
    edits = Edits(model, weights_of(model, ["1@3:2:4", "0@0:1:1"]))
    bits = digest(model)
    with edits.zeroed():
        assert model.model.layers[1].mlp.experts.down_proj[3, 2, 4] == 0
        assert model.model.layers[0].mlp.experts.down_proj[0, 1, 1] == 0
    assert digest(model) == bits
    labels = {entry.label: entry.expert for entry in edits.entries}
    assert labels == {"layer 1 expert 3 [2, 4]": 3, "layer 0 expert 0 [1, 1]": 0}
    model = tiny_model("jamba")  # has a layer of experts that are one parameter, and dense ones
    edits = Edits(model, Coordinates.of({"lm_head": [[1, 2]]}, model))
    assert edits.entries[0].label == "lm_head [1, 2]" and edits.entries[0].layer is None


def test_an_entry_as_a_document(model):
    [entry] = Edits(model, weights_of(model, "1:5:7")).entries
    assert entry.to_dict() == {
        "layer": 1, "module": NAME, "expert": None, "row": 5, "column": 7,
        "value": float(model.get_submodule(NAME).weight[5, 7].detach()),
    }  # fmt: skip


def test_weights_by_every_name(model, tmp_path):
    expected = Coordinates.of({NAME: [[5, 7]]}, model)
    path = tmp_path / "c.json"
    expected.save(path)
    expected.save(tmp_path / "c.safetensors")
    for given in (
        expected, {NAME: [[5, 7]]}, {(NAME, None): [[5, 7]]}, "1:5:7", f"{NAME}:5:7", path,
        str(path), tmp_path / "c.safetensors", ["1:5:7"], ("1:5:7", path, expected),
    ):  # fmt: skip
        assert weights_of(model, given) == expected
    both = weights_of(model, ["1:5:7", f"{FIRST}:2:9", "1:3:4"])
    assert both == Coordinates.of(WEIGHTS, model)
    other = weights_of(model, "model.layers.0.self_attn.q_proj:1:2")
    assert other == Coordinates.of({"model.layers.0.self_attn.q_proj": [[1, 2]]}, model)
    assert weights_of(tiny_model("mixtral"), "model.layers.1.mlp.experts@2:1:3") == weights_of(
        tiny_model("mixtral"), "1@2:1:3"
    )


def test_a_report_and_the_catalogue(model, tmp_path, monkeypatch):
    found = ScanReport(
        report([candidate(0, 1, 5, 7, "super weight", 41.5), candidate(1, 0, 1, 1, "inert", 1.0)])
    )
    found.save(tmp_path / "report.json")
    for given in (found, found.data, tmp_path / "report.json", str(tmp_path / "report.json")):
        places = {s: listed.tolist() for s, listed in weights_of(model, given).weights.items()}
        assert places == {(NAME, None): [[5, 7]]}
    asked = []
    monkeypatch.setattr(
        Coordinates, "from_catalogue", classmethod(lambda cls, *given: asked.append(given))
    )
    weights_of(model, CATALOGUE, "some/model")
    assert asked == [("some/model", model)]
    weights_of(model, "catalogue:other/model", "some/model")
    assert asked[1:] == [("other/model", model)]
    with pytest.raises(InvalidInput, match="needs the name of the model: catalogue:NAME"):
        weights_of(model, CATALOGUE)


def test_an_entry_that_the_catalogue_lacks(model):
    with pytest.raises(InvalidInput, match="the nearest are .*; catalogue:NAME says which entry"):
        weights_of(model, CATALOGUE, "some/folder")


@pytest.mark.parametrize(
    "given, words",
    [
        ([], "no weights are named"),
        ({}, "no weights are named"),
        (None, "no weights are named"),
        (7, "got int"),
        ("nonsense", "LAYER:ROW:COLUMN, got 'nonsense'"),
        ("1:5", "LAYER:ROW:COLUMN, got '1:5'"),
        ("1:-5:7", "got '1:-5:7'"),
        ("9:5:7", "no down projection in layer 9: it has layers 0 to 1"),
        ("1:32:0", r"\[32, 0\] lies outside"),
        ("1:0:48", r"\[0, 48\] lies outside"),
        ("1@0:5:7", "layer 1 has no expert 0"),
        ("model.layers.1.mlp.down:5:7", "no module 'model.layers.1.mlp.down'; the nearest are"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_weights_that_are_none(model, given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=words) as error:
        weights_of(model, given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, words",
    [
        ("1:0:0", "layer 1 holds experts: name one, 1@0 for the first"),
        ("1@4:0:0", "layer 1 has no expert 4"),
        ("model.layers.1.mlp.experts:0:0", "holds several experts: name one, .*experts@0"),
        ("model.layers.1.mlp.experts@9:0:0", "holds experts 0 to 3, got 9"),
    ],
)
def test_experts_that_are_none(given, words):
    with pytest.raises(InvalidInput, match=words):
        weights_of(tiny_model("mixtral"), given)
