"""Coordinates: checks, set operations, neighbourhoods, files, and the rules that choose them."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.models import ProjectionNotFound, find_down_projections
from swkernels.train import Coordinates, Site, down_projection_shapes
from swkernels.train.weights import find_weights
from tests.detect import fake_report
from tests.models.tiny import H, I, tiny_model

DOWN = "model.layers.1.mlp.down_proj"
A, B = Site("a"), Site("b", 3)


def listed(coordinates: Coordinates) -> dict[Site, list[tuple[int, int]]]:
    return {site: [tuple(p) for p in rc.tolist()] for site, rc in coordinates.weights.items()}


def of(entries: list) -> Coordinates:
    return Coordinates.of({"a": entries}, {"a": (5, 7)})


@st.composite
def sets_of_coordinates(draw) -> Coordinates:
    """Coordinates of one to three small weights, some of them experts."""
    weights, shapes = {}, {}
    for number in range(draw(st.integers(1, 3))):
        D, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        site = Site(f"m.{number}", draw(st.sampled_from([None, 0, 5])))
        flat = draw(st.sets(st.integers(0, D * columns - 1), min_size=1))
        weights[site] = draw(st.permutations([[f // columns, f % columns] for f in flat]))
        shapes[site] = (D, columns)
    return Coordinates(weights, shapes)


# What coordinates are


def test_sorted_int32_and_counted():
    c = Coordinates.of({"a": [[4, 0], [0, 6], [4, 6], [0, 2]], ("b", 3): [[1, 1]]},
                       {"a": (5, 7), ("b", 3): (2, 2), "unused": (9, 9)})  # fmt: skip
    assert listed(c) == {A: [(0, 2), (0, 6), (4, 0), (4, 6)], B: [(1, 1)]}
    assert all(rc.dtype == torch.int32 and rc.is_contiguous() for rc in c.weights.values())
    assert c.shapes == {A: (5, 7), B: (2, 2)}
    assert len(c) == 5 and repr(c) == "Coordinates(5 in 2 weights)"


@pytest.mark.parametrize(
    "form",
    [lambda x: x, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.uint8)],
    ids=["list", "tuple", "numpy", "int64", "uint8"],
)
def test_any_integers_will_do(form):
    c = Coordinates.of({"a": form([[3, 1], [0, 2]])}, {"a": (5, 7)})
    assert listed(c) == {A: [(0, 2), (3, 1)]}


def test_what_was_given_is_not_aliased():
    given_ = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    c = Coordinates.of({"a": given_}, {"a": (5, 7)})
    given_.zero_()
    assert listed(c)[A] == [(0, 1), (2, 3)]


def test_positions_beyond_31_bits():
    shape = (100_000, 100_000)
    last = [[99_999, 99_998], [99_999, 99_999], [99_998, 99_999]]
    c = Coordinates.of({"a": last}, {"a": shape})
    assert listed(c)[A] == [(99_998, 99_999), (99_999, 99_998), (99_999, 99_999)]
    assert len(c.neighborhood(1)) == 8


@pytest.mark.parametrize(
    "entries, words",
    [
        ([[5, 0]], ["[5, 0]", "outside", "[5, 7]"]),
        ([[0, 7]], ["[0, 7]", "outside"]),
        ([[0, 0], [-1, 3]], ["[-1, 3]", "outside"]),
        ([[1, 2], [0, 0], [1, 2]], ["[1, 2]", "more than once"]),
        ([[1.0, 2.0]], ["integers", "float32"]),
        (torch.tensor([[True, False]]), ["integers", "bool"]),
        ([[1, 2, 3]], ["[k, 2]", "[1, 3]"]),
        ([1, 2], ["[k, 2]", "[2]"]),
        ([[1, 2], [3]], ["[k, 2]"]),
        ([["x", 2]], ["[k, 2]"]),
        ([[1, 2**70]], ["[k, 2]"]),
        ([], ["no coordinate of a"]),
        (None, ["[k, 2]"]),
    ],
)
def test_bad_coordinates_are_one_line(entries, words):
    with pytest.raises(InvalidInput) as error:
        Coordinates.of({"a": entries}, {"a": (5, 7)})
    message = str(error.value)
    assert "\n" not in message and "a" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "weights, shapes, words",
    [
        ({}, {"a": (5, 7)}, "no coordinate"),
        ({"layer.1": [[0, 0]]}, {"layer.2": (5, 7)}, "layer.2"),
        ({"a": [[0, 0]], Site("a"): [[1, 1]]}, {"a": (5, 7)}, "twice"),
        ({"a": [[0, 0]]}, {"a": (5,)}, r"\(D, H\)"),
        ({"a": [[0, 0]]}, {"a": (5, 0)}, r"\(D, H\)"),
        ({"a": [[0, 0]]}, {"a": 5}, r"\(D, H\)"),
        ({("a", -1): [[0, 0]]}, {"a": (5, 7)}, "expert"),
        ({("a", True): [[0, 0]]}, {"a": (5, 7)}, "expert"),
        ({7: [[0, 0]]}, {"a": (5, 7)}, "name of a module"),
    ],
)
def test_bad_weights_and_shapes(weights, shapes, words):
    with pytest.raises(InvalidInput, match=words):
        Coordinates.of(weights, shapes)


# As sets


@given(sets_of_coordinates(), st.data())
def test_union_and_difference_are_those_of_sets(c, data):
    some = {site: rc[: data.draw(st.integers(1, len(rc)))] for site, rc in c.weights.items()}
    other = Coordinates(some, c.shapes)
    union, both = c | other, listed(c)
    assert union == c and (other | c) == c
    rest = {site: [p for p in both[site] if p not in listed(other)[site]] for site in both}
    rest = {site: points for site, points in rest.items() if points}
    if rest:
        assert listed(c - other) == rest
        assert (c - other) | other == c
    else:
        with pytest.raises(InvalidInput, match="no coordinate is left"):
            c - other


def test_union_of_different_weights():
    one = Coordinates.of({"a": [[1, 2]]}, {"a": (5, 7)})
    two = Coordinates.of({("b", 3): [[0, 0]], "a": [[1, 1], [1, 2]]}, {"a": (5, 7), B: (2, 2)})
    assert listed(one | two) == {A: [(1, 1), (1, 2)], B: [(0, 0)]}
    assert listed(two - one) == {B: [(0, 0)], A: [(1, 1)]}
    assert (one | two).shapes == {A: (5, 7), B: (2, 2)}


@pytest.mark.parametrize("operation", ["__or__", "__sub__"])
def test_shapes_must_agree(operation):
    one, two = of([[1, 2]]), Coordinates.of({"a": [[1, 2]]}, {"a": (7, 5)})
    with pytest.raises(InvalidInput, match=r"\[5, 7\].*\[7, 5\]"):
        getattr(one, operation)(two)


def test_equality():
    c = of([[1, 2], [3, 4]])
    assert c == of([[3, 4], [1, 2]]) == copy.deepcopy(c)
    assert c != of([[1, 2]]) and c != of([[1, 2], [3, 5]])
    assert c != Coordinates.of({"a": [[1, 2], [3, 4]]}, {"a": (5, 8)})
    assert c != Coordinates.of({"b": [[1, 2], [3, 4]]}, {"b": (5, 7)})
    assert c != "c"


# Neighbourhoods


@given(sets_of_coordinates(), st.integers(0, 8))
def test_neighborhood_is_every_position_within_the_radius(c, radius):
    expected = {
        site: [
            (i, j)
            for i in range(c.shapes[site][0])
            for j in range(c.shapes[site][1])
            if any(abs(i - row) <= radius and abs(j - column) <= radius for row, column in points)
        ]
        for site, points in listed(c).items()
    }
    assert listed(c.neighborhood(radius)) == expected


def test_neighborhood_is_clipped_and_counts_overlaps_once():
    assert len(of([[0, 0]]).neighborhood(1)) == 4
    assert len(of([[2, 3]]).neighborhood(1)) == 9
    assert len(of([[2, 3], [2, 4]]).neighborhood(1)) == 12
    assert len(of([[2, 3]]).neighborhood(10**9)) == 35


@pytest.mark.parametrize("radius", [-1, 1.0, "1", None, True])
def test_bad_radius(radius):
    with pytest.raises(InvalidInput, match="radius"):
        of([[0, 0]]).neighborhood(radius)


# Files


@settings(deadline=None)
@given(c=sets_of_coordinates(), suffix=st.sampled_from([".json", ".safetensors", ".JSON"]))
def test_files_give_back_what_was_saved(tmp_path_factory, c, suffix):
    path = tmp_path_factory.mktemp("files") / f"some{suffix}"
    c.save(path)
    again = Coordinates.load(str(path))
    assert again == c and list(again.weights) == list(c.weights)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    of([[0, 0]]).save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(InvalidInput, match="full"):
        of([[1, 1]]).save(path)
    assert Coordinates.load(path) == of([[0, 0]])
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_bad_paths(tmp_path):
    c = of([[0, 0]])
    for name in ("c.bin", "c"):
        with pytest.raises(InvalidInput, match=".json or .safetensors"):
            c.save(tmp_path / name)
        with pytest.raises(InvalidInput, match=".json or .safetensors"):
            Coordinates.load(tmp_path / name)
    with pytest.raises(InvalidInput, match="cannot write"):
        c.save(tmp_path / "no" / "c.json")
    for name in ("no.json", "no.safetensors"):
        with pytest.raises(InvalidInput, match="cannot read"):
            Coordinates.load(tmp_path / name)


GOOD = {"name": "a", "expert": None, "shape": [5, 7], "coordinates": [[1, 2]]}


@pytest.mark.parametrize(
    "weights, words",
    [
        ([GOOD | {"coordinates": [[5, 2]]}], "outside"),
        ([GOOD | {"coordinates": [[1.5, 2]]}], "integer"),
        ([GOOD | {"shape": [5.0, 7]}], "shape"),
        ([GOOD | {"expert": "x"}], "expert"),
        ([GOOD | {"name": 5}], "name"),
        ([GOOD, GOOD], "twice"),
        ([], "no coordinate"),
        ([{"name": "a"}], "damaged"),
        ([5], "damaged"),
        (5, "damaged"),
        ({"a": 1}, "damaged"),
    ],
)
def test_damaged_json(tmp_path, weights, words):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"schema": "swkernels.coordinates/1", "weights": weights}))
    with pytest.raises(InvalidInput, match=words) as error:
        Coordinates.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "other/1"}', "\xff"])
def test_no_coordinates_in_the_json(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput, match="c.json"):
        Coordinates.load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"schema": "other/1"},
        {"schema": "swkernels.coordinates/1"},
        {"schema": "swkernels.coordinates/1", "weights": "{"},
        {"schema": "swkernels.coordinates/1", "weights": "5"},
        {"schema": "swkernels.coordinates/1", "weights": '[{"name": "a"}, {"name": "b"}]'},
        {"schema": "swkernels.coordinates/1", "weights": '[{"name": "a"}]'},
    ],
)
def test_damaged_safetensors(tmp_path, metadata):
    path = tmp_path / "c.safetensors"
    save_file({"0": torch.tensor([[1, 2]])}, path, metadata)
    with pytest.raises(InvalidInput, match="c.safetensors"):
        Coordinates.load(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InvalidInput, match="c.safetensors is truncated"):
        Coordinates.load(path)


# Chance


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.data(),
)
def test_random_is_distinct_reproducible_and_excludes(sizes, seed, data):
    shapes = {Site(f"w.{i}"): size for i, size in enumerate(sizes)}
    total = sum(D * columns for D, columns in sizes)
    exclude = None
    if total > 1 and data.draw(st.booleans()):
        exclude = Coordinates.random(shapes, data.draw(st.integers(1, total - 1)), seed=seed + 1)
    room = total - (len(exclude) if exclude else 0)
    k = data.draw(st.integers(1, room))
    c = Coordinates.random(shapes, k, exclude=exclude, seed=seed)
    assert len(c) == k  # different and inside, or the constructor would have raised
    assert c == Coordinates.random(shapes, k, exclude=exclude, seed=seed)
    if exclude:
        assert len(c | exclude) == k + len(exclude)
    with pytest.raises(InvalidInput, match=f"from 1 to {room}"):
        Coordinates.random(shapes, room + 1, exclude=exclude, seed=seed)


@pytest.mark.parametrize("k, excluded", [(2, 0), (2, 3), (7, 3)])
def test_random_is_uniform_over_the_entries_of_all_weights(k, excluded):
    shapes = {A: (2, 3), B: (1, 5)}  # 11 entries
    exclude = Coordinates.of({"a": [[0, 1], [1, 0]], B: [[0, 4]]}, shapes) if excluded else None
    draws, counts = 3000, Counter()
    for seed in range(draws):
        points = listed(Coordinates.random(shapes, k, exclude=exclude, seed=seed))
        counts.update((site, point) for site, own in points.items() for point in own)
    entries = 11 - excluded
    p = k / entries
    spread = math.sqrt(draws * p * (1 - p))
    assert len(counts) == entries
    assert all(abs(count - draws * p) < 5 * spread for count in counts.values())


def test_random_of_a_model_draws_from_every_expert():
    model = tiny_model("mixtral")
    shapes = down_projection_shapes(model)
    assert len(shapes) == 3 * 4 and set(shapes.values()) == {(H, I)}
    c = Coordinates.random(model, 600, seed=4)
    assert set(c.weights) == set(shapes)
    assert c != Coordinates.random(model, 600, seed=5)
    assert Coordinates.random(model, 12 * H * I).shapes == shapes


def test_random_does_not_list_all_entries():
    """10^12 entries: a permutation of them would take 8 TB."""
    shapes = {"huge": (10**6, 10**6), "small": (1, 1)}
    exclude = Coordinates.of({"huge": [[0, 0]], "elsewhere": [[0, 0]]},
                             {"huge": (10**6, 10**6), "elsewhere": (1, 1)})  # fmt: skip
    assert len(Coordinates.random(shapes, 10_000, exclude=exclude)) == 10_000


def test_random_refuses_to_exclude_from_other_weights():
    shapes = {"layers.1.down": (5, 7)}
    with pytest.raises(InvalidInput, match="layers.1.down"):
        exclude = Coordinates.of({"layers.2.down": [[0, 0]]}, {"layers.2.down": (5, 7)})
        Coordinates.random(shapes, 3, exclude=exclude)
    with pytest.raises(InvalidInput, match=r"\[5, 7\].*\[7, 5\]"):
        exclude = Coordinates.of({"layers.1.down": [[0, 0]]}, {"layers.1.down": (7, 5)})
        Coordinates.random(shapes, 3, exclude=exclude)


@pytest.mark.parametrize("k", [0, -1, 1.0, True, None])
def test_bad_k(k):
    with pytest.raises(InvalidInput, match="k from 1"):
        Coordinates.random({"a": (5, 7)}, k)
    with pytest.raises(InvalidInput, match="k from 1"):
        Coordinates.from_magnitude(tiny_model("llama"), k)


# Magnitude


def by_sorting(matrices: dict[Site, torch.Tensor], k: int) -> dict[Site, list[tuple[int, int]]]:
    """The definition: all entries in one list, sorted."""
    every = [
        (-abs(value), number, row, column)
        for number, matrix in enumerate(matrices.values())
        for row, values in enumerate(matrix.tolist())
        for column, value in enumerate(values)
    ]
    chosen: dict[Site, list] = {}
    for _, number, row, column in sorted(every)[:k]:
        chosen.setdefault(list(matrices)[number], []).append((row, column))
    return {site: sorted(points) for site, points in chosen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "dbrx"])
def test_magnitude_of_every_layout_with_ties(name):
    """Few different values, so that ties within and between weights decide."""
    model = tiny_model(name)
    matrices = {}
    for p in find_down_projections(model):
        generator = torch.Generator().manual_seed(p.layer)
        for expert in [None] if p.experts is None else range(p.experts):
            values = torch.randint(-6, 7, (p.rows, p.columns), generator=generator) / 2
            with torch.no_grad():
                p.matrix(expert).copy_(values)
            matrices[Site(p.name, expert)] = values
    for k in (1, 37, 1500):
        assert listed(Coordinates.from_magnitude(model, k)) == by_sorting(matrices, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_magnitude_in_any_dtype(dtype):
    model = tiny_model("llama").to(dtype)
    matrices = {Site(p.name): p.matrix().detach().double() for p in find_down_projections(model)}
    assert listed(Coordinates.from_magnitude(model, 50)) == by_sorting(matrices, 50)


def test_magnitude_of_named_modules():
    model = tiny_model("mixtral")
    names = ["model.layers.0.self_attn.q_proj", ("model.layers.2.mlp.experts", 1),
             "model.layers.1.mlp.experts"]  # fmt: skip
    c = Coordinates.from_magnitude(model, 4 * H * I // 2, names)
    assert {(site.name, site.expert) for site in c.weights} <= {
        ("model.layers.0.self_attn.q_proj", None),
        ("model.layers.2.mlp.experts", 1),
        *(("model.layers.1.mlp.experts", expert) for expert in range(4)),
    }
    everything = H * H + 5 * H * I
    assert len(Coordinates.from_magnitude(model, everything, names)) == everything
    with pytest.raises(InvalidInput, match=str(everything)):
        Coordinates.from_magnitude(model, everything + 1, names)


def test_magnitude_of_a_square_conv1d():
    """c_proj of GPT-2's attention is stored transposed, and nothing in its shape says so."""
    model = tiny_model("gpt2")
    name = "transformer.h.0.attn.c_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 9] = 50.0  # [input, output]
    assert listed(Coordinates.from_magnitude(model, 1, [name])) == {Site(name): [(9, 3)]}


def test_magnitude_refuses_nan_and_meta():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] = math.nan
    with pytest.raises(InvalidInput, match=r"layers\.2.*NaN"):
        Coordinates.from_magnitude(model, 5)
    with pytest.raises(InvalidInput, match="meta"):
        Coordinates.from_magnitude(tiny_model("llama").to("meta"), 5)
    with pytest.raises(InvalidInput, match="meta"):
        name = "model.layers.0.self_attn.q_proj"
        Coordinates.from_magnitude(tiny_model("llama").to("meta"), 5, [name])


# A model by hand


def test_of_a_model_takes_its_shapes():
    c = Coordinates.of({DOWN: [[H - 1, I - 1]]}, tiny_model("llama").to("meta"))
    assert c.shapes == {Site(DOWN): (H, I)}
    model = tiny_model("gpt2")
    c = Coordinates.of({"transformer.h.0.mlp.c_fc": [[I - 1, H - 1]]}, model)
    assert c.shapes == {Site("transformer.h.0.mlp.c_fc"): (I, H)}
    c = Coordinates.of({("model.layers.1.mlp.experts", 3): [[0, 1]]}, tiny_model("mixtral"))
    assert c.shapes == {Site("model.layers.1.mlp.experts", 3): (H, I)}


@pytest.mark.parametrize(
    "name, key, words",
    [
        ("llama", "model.layers.9.mlp.down_proj", r"no module.*model\.layers\.\d\.mlp\.down_proj"),
        ("llama", "model.layers.1.mlp", r"LlamaMLP.*model\.layers\.1\.mlp\."),
        ("llama", "model.norm", "LlamaRMSNorm"),
        ("llama", (DOWN, 0), "no fused experts"),
        ("mixtral", "model.layers.1.mlp.experts", "several experts"),
        ("mixtral", ("model.layers.1.mlp.experts", 4), "experts 0 to 3, got 4"),
    ],
)
def test_wrong_layers(name, key, words):
    with pytest.raises(InvalidInput, match=words) as error:
        Coordinates.of({key: [[0, 0]]}, tiny_model(name))
    assert "\n" not in str(error.value)


def test_outside_the_models_weight():
    with pytest.raises(InvalidInput, match=rf"outside {DOWN}, which is \[{H}, {I}\]"):
        Coordinates.of({DOWN: [[I - 1, H - 1]]}, tiny_model("llama"))


def test_a_model_without_down_projections():
    model = torch.nn.Linear(3, 4)
    with pytest.raises(ProjectionNotFound):
        down_projection_shapes(model)
    found = find_weights(torch.nn.ModuleDict({"only": model}), ["only"])
    assert [weight.shape for weight in found] == [(4, 3)]
    assert torch.equal(found[0].matrix(), model.weight)


# A report


def test_report_takes_super_weights_and_critical_sets(tmp_path):
    document = fake_report.found()
    expected = {
        Site("model.layers.2.mlp.down_proj"): [(3968, 7003)],
        Site("model.layers.4.mlp.down_proj"): [(2533, 7890), (2533, 10411)],
    }
    report = ScanReport(document)
    report.save(tmp_path / "report.json")
    for source in (report, document, tmp_path / "report.json", str(tmp_path / "report.json")):
        c = Coordinates.from_report(source)
        assert listed(c) == expected
        assert set(c.shapes.values()) == {(4096, 11008)}


@pytest.mark.parametrize(
    "verdicts, ids",
    [
        (["mild"], [3, 4]),
        ("inert", [5]),
        (["critical set"], [1, 2]),
        (["super weight", "mild", "inert"], [0, 3, 4, 5]),
    ],
)
def test_report_by_verdict(verdicts, ids):
    document = fake_report.found()
    c = Coordinates.from_report(document, verdicts)
    wanted = {(x["module"], x["row"], x["column"])
              for x in document["candidates"] if x["id"] in ids}  # fmt: skip
    assert {(s.name, *p) for s, points in listed(c).items() for p in points} == wanted


def test_report_of_fused_experts():
    document = fake_report.report(
        [
            fake_report.candidate(i, 1, 12, 34 + i, "super weight", 9.0, expert=expert, module=name)
            for i, (name, expert) in enumerate(
                [("model.layers.1.mlp.experts", 1), ("model.layers.1.mlp.experts", 3)]
            )
        ]
    )
    entry = fake_report.layer(1)
    document["layers"] = [
        entry | {"module": "model.layers.1.mlp.experts", "expert": expert} for expert in (1, 3)
    ]
    expected = {Site("model.layers.1.mlp.experts", 1): [(12, 34)],
                Site("model.layers.1.mlp.experts", 3): [(12, 35)]}  # fmt: skip
    assert listed(Coordinates.from_report(document)) == expected
    # One expert that tokens reached, of the layer's own number: the module is no expert.
    document["candidates"].pop()
    document["layers"].pop()
    assert listed(Coordinates.from_report(document)) == dict(list(expected.items())[:1])


@pytest.mark.parametrize(
    "module", ["model.layers.1.mlp.experts.7.w2", "block.1.layer.1.mlp.experts.expert_7.wo"]
)
def test_report_of_experts_that_are_modules(module):
    """Their number is in the path, and their weight has no other."""
    c = fake_report.candidate(0, 1, 12, 34, "super weight", 9.0, expert=7, module=module)
    document = fake_report.report([c])
    document["layers"] = [fake_report.layer(1) | {"module": module, "expert": 7}]
    assert listed(Coordinates.from_report(document)) == {Site(module): [(12, 34)]}


def test_bad_reports(tmp_path):
    with pytest.raises(InvalidInput, match=r"2 mild, 1 inert|1 super weight.*2 mild"):
        Coordinates.from_report(fake_report.found(), ["candidate"])
    with pytest.raises(InvalidInput, match="no candidate at all"):
        Coordinates.from_report(fake_report.none_found())
    with pytest.raises(InvalidInput, match="supreme"):
        Coordinates.from_report(fake_report.found(), ["supreme"])
    with pytest.raises(InvalidInput, match="none"):
        Coordinates.from_report(fake_report.found(), [])
    with pytest.raises(InvalidInput, match=r"swkernels\.scan/1"):
        Coordinates.from_report(fake_report.found() | {"schema": "swkernels.scan/2"})
    with pytest.raises(InvalidInput, match="cannot read"):
        Coordinates.from_report(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InvalidInput, match=r"swkernels\.scan/1"):
        Coordinates.from_report(tmp_path / "list.json")
    damaged = fake_report.found()
    del damaged["candidates"][0]["row"]
    with pytest.raises(InvalidInput, match="damaged.*row"):
        Coordinates.from_report(damaged)
