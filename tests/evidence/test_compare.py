"""Scan reports side by side: fates, values, super activations, and reports that do not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from swkernels.detect.report import ScanReport
from swkernels.detect.scan import ScanConfig, scan
from swkernels.errors import InvalidInput
from swkernels.evidence.compare import compare
from swkernels.evidence.compare_fates import FATES, activation_fate, fate_of
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, plant, save
from tests.evidence.bytes import digest

CONFIG = ScanConfig(samples=2, length=64, eval_tokens=128, eval_length=64, null_draws=2)
SUPER, PART, MILD, INERT = "super weight", "part of a critical set", "mild", "inert"


def planted():
    model = make_model(initializer_range=0.3)
    plant(model)
    return model


def scanned(model, config=CONFIG) -> ScanReport:
    return scan(model, TEXT * 20, tokenizer=make_tokenizer(), config=config, name="owner/tiny")


@pytest.fixture(scope="module")
def real() -> ScanReport:
    return scanned(planted())


def with_candidates(real, found: dict, peaks=None, layers=2) -> dict:
    """A document of {(layer, row, column[, out_peak]): verdict}, made of a real one.

    ``peaks``: by layer (channel, whether it stands out); else none does.
    """
    data = copy.deepcopy(real.data)
    [like] = data["candidates"]
    data["candidates"] = []
    for (layer, row, column, *out_peak), verdict in found.items():
        place = {"layer": layer, "module": f"model.layers.{layer}.mlp.down_proj"}
        place |= {"row": row, "column": column, "verdict": verdict}
        place |= {"weight": 1.0 + row, "out_peak": out_peak[0] if out_peak else 9.0}
        data["candidates"].append(like | place | {"id": len(data["candidates"])})
    of_layer = data["layers"][0]
    data["layers"] = []
    for layer in range(layers):
        channel, stands_out = (peaks or {}).get(layer, (layer, False))
        entry = copy.deepcopy(of_layer)
        entry |= {"layer": layer, "module": f"model.layers.{layer}.mlp.down_proj"}
        entry["out_peak"] |= {"channel": channel, "value": 500.0 if stands_out else 2.0 + layer}
        data["layers"].append(entry | {"out_median": 1.0})
    return data


def fates(result) -> dict:
    return {(t.place.layer, t.place.row, t.place.column): t.fate for t in result.traces}


def test_two_real_scans(real, tmp_path):
    """The weight is there in one model and not in the other; its value is of the checkpoint."""
    bare, model = make_model(initializer_range=0.3), planted()
    before = digest(bare), digest(model)
    reports = [scanned(bare), real]
    paths = [save(bare, tmp_path / "bare"), save(model, tmp_path / "planted")]
    result = compare(reports, names=["bare", "planted"], values_from=paths)
    assert (digest(bare), digest(model)) == before
    [trace] = result.traces
    assert trace.place == (1, "model.layers.1.mlp.down_proj", None, 5, 7)
    absent, there = trace.sightings
    assert trace.fate == "appears" and absent.verdict is None and absent.out_peak is None
    assert absent.value == bare.model.layers[1].mlp.down_proj.weight[5, 7].item()
    [candidate] = real.candidates
    for figure in ("verdict", "in_peak", "out_peak", "ratio"):
        assert getattr(there, figure) == candidate[figure]
    assert there.value == 10.0

    of_layer = {a.layer: a for a in result.activations}
    assert of_layer[0].fate == "unchanged" and of_layer[1].fate == "appears"
    for index, report in enumerate(reports):
        for entry in report.data["layers"]:
            peak = of_layer[entry["layer"]].peaks[index]
            assert (peak.channel, peak.value) == tuple(
                entry["out_peak"][key] for key in ("channel", "value")
            )
            assert peak.text == entry["out_peak"]["text"]
            assert peak.prominence == peak.value / entry["out_median"]
    assert of_layer[1].peaks[1].channel == 5 and of_layer[1].peaks[1].super
    layer, peak = result.largest[1]
    assert layer == 1 and peak.channel == 5
    assert result.notes == ()

    [row] = result.rows()
    assert row["fate"] == "appears" and row["verdict bare"] is None
    assert row["value bare"] == absent.value and row["value planted"] == 10.0
    assert result.to_dataframe()["layer"].tolist() == [1]
    assert [row["fate"] for row in result.activation_rows()] == ["unchanged", "appears"]
    result.save(tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["schema"] == "swkernels.compare/1"
    assert [report["name"] for report in found["reports"]] == ["bare", "planted"]
    assert found["coordinates"][0]["sightings"][1]["value"] == 10.0
    assert found["activations"][1]["peaks"][1]["channel"] == 5
    assert found["summary"] == str(result) and "1 appears" in str(result)
    assert "none -> layer 1, channel 5" in str(result)
    result.plot(tmp_path / "c.svg")
    assert "layer 1 [5, 7]" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    "series, fate",
    [
        ([SUPER, SUPER, SUPER], "stays"),
        ([SUPER, PART, SUPER], "stays"),
        ([None, None, SUPER], "appears"),
        ([None, INERT, MILD], "appears"),
        ([MILD, SUPER, SUPER], "appears"),
        ([SUPER, MILD, INERT], "fades"),
        ([PART, None, None], "fades"),
        ([SUPER, None, SUPER], "flickers"),
        ([None, SUPER, None], "flickers"),
        ([MILD, MILD, MILD], "unchanged"),
        ([INERT, INERT, INERT], "unchanged"),
    ],
)
def test_fates_of_a_coordinate(real, series, fate):
    reports = [with_candidates(real, {} if v is None else {(1, 5, 7): v}) for v in series]
    result = compare(reports, names="abc")
    assert fates(result) == {(1, 5, 7): fate} and fate in FATES
    assert [s.verdict for s in result.traces[0].sightings] == series


def moved(real, *series, layers=4) -> dict:
    result = compare([with_candidates(real, found, layers=layers) for found in series])
    return {(t.place.layer, t.place.row, t.place.column): (t.fate, t.moved_to, t.moved_from)
            for t in result.traces}  # fmt: skip


def test_a_move_to_another_column(real):
    assert moved(real, {(1, 5, 7): SUPER}, {(1, 5, 9): PART}) == {
        (1, 5, 7): ("moves", "layer 1 [5, 9]", None),
        (1, 5, 9): ("moves", None, "layer 1 [5, 7]"),
    }


def test_a_move_to_a_neighbouring_layer_and_no_further(real):
    found = moved(real, {(1, 5, 7): SUPER}, {(2, 5, 20): MILD})
    assert found[1, 5, 7] == ("moves", "layer 2 [5, 20]", None)
    found = moved(real, {(1, 5, 7): SUPER}, {(3, 5, 7): SUPER})
    assert found == {(1, 5, 7): ("fades", None, None), (3, 5, 7): ("appears", None, None)}


@pytest.mark.parametrize(
    "series",
    [
        [{(1, 5, 7): SUPER}, {(1, 6, 7): SUPER}],  # another row: another channel
        [{(1, 5, 7): SUPER}, {(1, 5, 9): INERT}],  # what comes does no harm
        [{(1, 5, 7): INERT}, {(1, 5, 9): SUPER}],  # what goes did none
        [{(1, 5, 7): SUPER}, {}, {(1, 5, 9): SUPER}],  # not at once
        [{(1, 5, 7): SUPER}, {(1, 5, 7): SUPER, (1, 5, 9): SUPER}, {(1, 5, 9): SUPER}],
    ],
)
def test_no_moves(real, series):
    assert {fate for fate, *_ in moved(real, *series).values()} == {"appears", "fades"}


def test_a_move_while_the_old_one_lingers_inert(real):
    found = moved(real, {(1, 5, 7): SUPER}, {(1, 5, 7): INERT, (1, 5, 9): SUPER})
    assert found[1, 5, 7] == ("moves", "layer 1 [5, 9]", None)


def test_one_takes_over_from_one_the_nearest_first(real):
    """Of three that come the one of the same layer, and of those the largest spike."""
    found = moved(
        real,
        {(1, 5, 7): SUPER},
        {(2, 5, 7, 90.0): SUPER, (1, 5, 8, 10.0): SUPER, (1, 5, 9, 20.0): SUPER},
    )
    assert found[1, 5, 7][1] == "layer 1 [5, 9]"
    assert found[2, 5, 7][0] == found[1, 5, 8][0] == "appears"
    found = moved(real, {(1, 5, 7): SUPER, (1, 5, 6): SUPER}, {(1, 5, 9): SUPER})
    assert sorted(fate for fate, *_ in found.values()) == ["fades", "moves", "moves"]


def test_without_verification_presence_counts(real):
    unverified = with_candidates(real, {(1, 5, 7): "candidate"})
    there = with_candidates(real, {(1, 5, 7): INERT, (1, 6, 7): SUPER})
    result = compare([unverified, there])
    assert fates(result) == {(1, 5, 7): "stays", (1, 6, 7): "appears"}
    assert len(result.notes) == 1 and "tiny (1) was not verified" in result.notes[0]


def test_order_of_traces(real):
    first = with_candidates(real, {(1, 1, 1): SUPER, (0, 2, 2): SUPER, (0, 3, 3): INERT})
    second = with_candidates(real, {(0, 2, 2): SUPER, (0, 3, 3): INERT, (1, 4, 4): SUPER})
    result = compare([first, second])
    assert list(fates(result).values()) == ["stays", "appears", "fades", "unchanged"]
    assert "4 coordinates are" in str(result)
    assert "1 stays, 1 appears, 1 fades, 1 is unchanged" in str(result)


@pytest.mark.parametrize(
    "channels, fate",
    [
        ([5, 5, 5], "stays"),
        ([None, 5, 5], "appears"),
        ([5, None, None], "fades"),
        ([5, 5, 6], "moves"),
        ([None, 5, 6], "moves"),
        ([5, 6, None], "moves"),
        ([5, 6, 5], "flickers"),
        ([5, None, 5], "flickers"),
        ([5, None, 6], "flickers"),
        ([None, 5, None], "flickers"),
        ([None, None, None], "unchanged"),
    ],
)
def test_fates_of_a_layer(real, channels, fate):
    assert activation_fate(channels) == fate
    reports = [with_candidates(real, {}, {1: (c or 0, c is not None)}) for c in channels]
    result = compare(reports)
    assert [a.fate for a in result.activations] == ["unchanged", fate]
    assert "No candidate in any of 3 reports" in str(result)


def test_a_super_activation_moves_to_the_next_layer(real):
    series = [{1: (5, True)}, {1: (5, True)}, {2: (5, True)}]
    result = compare([with_candidates(real, {}, peaks, layers=4) for peaks in series])
    one, two = result.activations[1:3]
    assert (one.fate, one.moved_to, two.fate, two.moved_from) == ("moves", 2, "moves", 1)
    assert "layer 1, channel 5 (500) -> layer 1, channel 5 (500) -> layer 2" in str(result)
    for other in ({2: (6, True)}, {3: (5, True)}, {1: (5, True), 2: (5, True)}):
        result = compare([with_candidates(real, {}, p, layers=4) for p in ({1: (5, True)}, other)])
        assert not any(a.moved_to for a in result.activations)


def test_what_stands_out_is_what_the_scan_asks(real):
    data = with_candidates(real, {})
    data["layers"][1]["out_peak"]["value"] = 20.0
    other = copy.deepcopy(data)
    other["settings"]["prominence"] = 20.1
    result = compare([data, other])
    assert [peak.super for peak in result.activations[1].peaks] == [True, False]


def test_experts(real):
    """The largest over a layer's experts; an expert without a token has no entry."""
    reports = []
    for experts in ((0, 2), (1, 2)):
        data = with_candidates(real, {(1, 5, 7): SUPER})
        entry = data["layers"].pop()
        for expert in experts:
            of_expert = copy.deepcopy(entry)
            of_expert |= {"expert": expert, "module": "model.layers.1.mlp.experts"}
            of_expert["out_peak"]["value"] = 100.0 * (expert + 1)
            data["layers"].append(of_expert)
        data["candidates"][0] |= {"expert": 2, "module": "model.layers.1.mlp.experts"}
        reports.append(data)
    values = {"model.layers.1.mlp.experts": torch.arange(3 * 32 * 48.0).view(3, 32, 48)}
    result = compare(reports, values_from=[{f"{k}.down_proj": v for k, v in values.items()}, None])
    assert [peak.value for peak in result.activations[1].peaks] == [300.0, 300.0]
    [trace] = result.traces
    assert trace.place.label == "layer 1 expert 2 [5, 7]" and trace.fate == "stays"
    [note] = result.notes  # the value was read, and of this expert
    assert f"{2 * 32 * 48 + 5 * 48 + 7:.4g}" in note and "6 in the report tiny (1)" in note


def test_values_are_those_of_the_report_and_others_are_noted(real):
    model = planted()
    data = with_candidates(real, {(1, 5, 7): SUPER})
    data["candidates"][0]["weight"] = 10.02  # as much as rounding to bfloat16
    assert compare([data, data], values_from=[model, None]).notes == ()
    data["candidates"][0]["weight"] = 11.0
    result = compare([data, data], values_from=[model, None])
    assert [s.value for s in result.traces[0].sightings] == [11.0, 11.0]
    assert len(result.notes) == 1 and "11 in the report tiny (1) and 10 in" in result.notes[0]


def test_names(real):
    a, b = copy.deepcopy(real.data), copy.deepcopy(real.data)
    assert compare([a, b]).names == ("tiny (1)", "tiny (2)")
    b["model"]["name"] = "/models/other/"
    assert compare([a, b]).names == ("tiny", "other")
    for names in (["a"], ["a", "a"], ["a", ""], ["a", "b", "c"], []):
        with pytest.raises(InvalidInput, match="2 different names"):
            compare([a, b], names=names)


def test_paths_and_folders(real, tmp_path):
    real.save(tmp_path / "report.json")
    result = compare([tmp_path, str(tmp_path / "report.json"), real])
    assert [report["source"] for report in result.reports] == [
        str(tmp_path),
        str(tmp_path / "report.json"),
        "report 3",
    ]
    assert fates(result) == {(1, 5, 7): "unchanged"}  # mild in all three


def test_infinities(real, tmp_path):
    data = with_candidates(real, {(1, 5, 7): SUPER})
    data["candidates"][0]["ratio"] = float("inf")
    ScanReport(data).save(tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text())  # has the string "Infinity"
    result = compare([plain, tmp_path])
    assert [s.ratio for s in result.traces[0].sightings] == [float("inf")] * 2
    result.save(tmp_path / "c.json")
    result.plot(tmp_path / "c.png")


@pytest.mark.parametrize("given", [None, "report.json", [], [1]])
def test_fewer_than_two(given):
    with pytest.raises(InvalidInput, match="two reports at least"):
        compare(given)


def damaged(change):
    def make(data):
        change(data)
        return data

    return make


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda data: 7, "report 2: expected a ScanReport, its document or the path of one"),
        (lambda data: {}, "report 2: expected a report of schema swkernels.scan/1, got None"),
        (damaged(lambda d: d.update(schema="x/2")), "schema swkernels.scan/1, got 'x/2'"),
        (damaged(lambda d: d.pop("candidates")), "report 2 is damaged .KeyError 'candidates'"),
        (damaged(lambda d: d.update(layers=[])), "damaged .ValueError no layers"),
        (damaged(lambda d: d.update(layers=None)), "damaged .TypeError"),
        (damaged(lambda d: d["layers"][0].update(rows="a")), "damaged .*number from 0, got 'a'"),
        (damaged(lambda d: d["layers"][0].pop("out_peak")), "damaged .*out_peak"),
        (damaged(lambda d: d["candidates"][0].update(verdict="bad")), "unknown verdict 'bad'"),
        (damaged(lambda d: d["candidates"][0].update(weight="x")), "could not convert"),
        (damaged(lambda d: d["candidates"][0].update(row=99)), r"lies outside \[32, 48\]"),
        (damaged(lambda d: d["candidates"][0].update(layer=9)), "damaged .KeyError 9"),
        (damaged(lambda d: d["settings"].pop("prominence")), "damaged .*prominence"),
    ],
)
def test_damaged_reports(real, make, words):
    with pytest.raises(InvalidInput, match=words) as error:
        compare([real, make(copy.deepcopy(real.data))])
    assert "\n" not in str(error.value)


def other_shape(data):
    for layer in data["layers"]:
        layer["columns"] = 64


def other_module(data):
    for entry in [*data["layers"], *data["candidates"]]:
        entry["module"] = f"language_{entry['module']}"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d["layers"].pop(0), "2 and 1 layers"),
        (lambda d: [e.update(layer=e["layer"] + 1) for e in d["layers"] + d["candidates"]],
         "other layers, 0 in one of them alone"),
        (other_shape, r"model.layers.0.mlp.down_proj is \[32, 48\] and \[32, 64\]"),
        (other_module,
         "layer 0 has model.layers.0.mlp.down_proj in one and language_model.layers.0"),
        (lambda d: d["layers"][0].update(expert=0), "layer 0 has experts in one of them alone"),
    ],
)  # fmt: skip
def test_other_architectures(real, change, words):
    data = copy.deepcopy(real.data)
    data["model"]["name"] = "owner/else"
    change(data)
    with pytest.raises(InvalidInput, match=words) as error:
        compare([real, data])
    assert "owner/tiny" in str(error.value) and "owner/else" in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoints_that_do_not_fit(real, tmp_path):
    with pytest.raises(InvalidInput, match="each of the 2 reports, got 1"):
        compare([real, real], values_from=[tmp_path])
    with pytest.raises(InvalidInput, match="no .safetensors file"):
        compare([real, real], values_from=[tmp_path, None])
    with pytest.raises(InvalidInput, match=r"\[32, 64\]"):
        compare([real, real], values_from=[make_model(intermediate_size=64), None])


def test_levels_that_are_not_monotone():
    assert fate_of([3, 2, 3]) == "flickers" and fate_of([0, 0, 1]) == "appears"
