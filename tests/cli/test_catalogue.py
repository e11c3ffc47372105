"""``swkernels catalogue`` and ``verify-catalogue``, and the catalogue against its source."""

from __future__ import annotations

import importlib
import json
from inspect import signature
from pathlib import Path

import pytest

from swkernels.cli import main
from swkernels.detect.perplexity import perplexity, tokens_of
from swkernels.evidence.verify_catalogue import verify_catalogue
from swkernels.train import catalogue, published
from tests.cli.checkpoints import TEXT, files, make_model, make_tokenizer, plant, save

catalogue_cli = importlib.import_module("swkernels.cli.catalogue")  # cli.catalogue is a function
FACTS = Path(__file__).parents[3] / "shared" / "facts" / "super_weights.json"


def printed(capfd) -> str:
    out, error = capfd.readouterr()
    assert error == ""
    return out


def test_all_entries(capfd):
    capfd.readouterr()
    assert main(["catalogue"]) == 0
    found = printed(capfd)
    for entry in catalogue():
        assert entry.model in found and entry.source.split()[0] in found
        for layer, expert, row, column in entry.positions:
            place = f"layer {layer} " if expert is None else f"layer {layer} expert {expert} "
            assert f"{place}[{row}, {column}]" in found
    for tier, meaning in published.tiers().items():
        assert f"{tier}: {meaning}" in found


@pytest.mark.parametrize("name", ["OLMo-1B-0724-hf", "ALLENAI/olmo-1b-0724-HF"])
def test_one_entry(capfd, name):
    capfd.readouterr()
    assert main(["catalogue", name]) == 0
    lines = printed(capfd).splitlines()
    entry = published.find_entry("allenai/OLMo-1B-0724-hf")
    assert lines[:3] == [
        "allenai/OLMo-1B-0724-hf",
        "  layer 1 [1764, 1710], value 0.6323",
        "  layer 2 [1764, 8041], value -0.5924",
    ]
    assert "tier: A: published by the authors in paper and code" in lines
    assert f"source: {entry.source}" in lines and f"note: {entry.note}" in lines


def test_json(capfd):
    capfd.readouterr()
    assert main(["catalogue", "--json"]) == 0
    found = json.loads(printed(capfd))
    assert found["schema"] == "swkernels.catalogue/1" and len(found["models"]) == 20
    assert main(["catalogue", "qwen3-30b-a3b", "--json"]) == 0
    [entry] = json.loads(printed(capfd))["models"]
    assert entry["coordinates"][0] == {
        "layer": 1, "expert": 68, "row": 940, "column": 711, "value": None
    }  # fmt: skip
    assert entry["tier"] == "C" and entry["tier_means"] == "one source"


def test_an_unknown_model(capfd):
    capfd.readouterr()
    assert main(["catalogue", "olmo-1b"]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and "allenai/OLMo-1B-0724-hf" in error


def test_published_values_stand_beside_their_positions():
    entries = [entry for entry in catalogue() if entry.values]
    assert len(entries) == 5
    for entry in entries:
        assert len(entry.values) == len(entry.positions)
        for value in entry.values:  # the note is where they were published
            assert f"{abs(value)}" in entry.note


@pytest.mark.skipif(not FACTS.exists(), reason="the project's facts are not here")
def test_the_catalogue_is_what_the_facts_say():
    facts = json.loads(FACTS.read_text())
    entries = {e.model + (f" ({e.variant})" if e.variant else ""): e for e in catalogue()}
    assert list(entries) == [fact["model"] for fact in facts["models"]]
    assert published.tiers().keys() == facts["tiers"].keys()
    for fact in facts["models"]:
        entry = entries[fact["model"]]
        positions = [(c["layer"], c.get("expert"), c["row"], c["column"])
                     for c in fact["coordinates"]]  # fmt: skip
        assert list(entry.positions) == positions
        assert (entry.tier, entry.source) == (fact["tier"], fact["source"])
        assert entry.note == fact.get("note", "")
        # Since transformers 5 the experts of a layer are one module.
        assert entry.module == fact["module"].replace(".{expert}.down_proj", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model(initializer_range=0.3)
    plant(model)
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT * 6, encoding="utf-8")
    save(model, folder / "tiny")
    return folder


@pytest.fixture
def go(folder, monkeypatch):
    entry = published.CatalogueEntry(
        "owner/Planted", "model.layers.{layer}.mlp.down_proj", (32, 48),
        ((1, None, 5, 7), (0, None, 1, 1)), "C", "nobody", "", "", (10.0, 0.5),
    )  # fmt: skip
    monkeypatch.setattr(published, "_entries", lambda: (entry,))
    monkeypatch.chdir(folder)

    def go(*options):
        return main(["verify-catalogue", "tiny", "--device", "cpu", *map(str, options)])

    return go


def test_verify(go, folder, tmp_path, capfd):
    before = files(folder)
    options = ["--as", "planted", "--text", "text.txt", "--window", 32, "--controls", 1]
    assert go(*options, "-o", tmp_path / "out") == 0
    assert files(folder) == before
    shown = printed(capfd)
    found = json.loads((tmp_path / "out" / "catalogue-check.json").read_text())
    assert found["published"]["model"] == "owner/Planted"
    entries = {(e["layer"], e["row"], e["column"]): e for e in found["entries"]}
    assert (tmp_path / "out" / "catalogue-check.png").exists()

    model, ids = make_model(initializer_range=0.3), tokens_of(TEXT * 6, make_tokenizer())
    plant(model)
    intact = perplexity(model, ids, window=32).value
    model.model.layers[1].mlp.down_proj.weight.data[5, 7] = 0
    ratio = perplexity(model, ids, window=32).value / intact
    assert entries[1, 5, 7]["ratio"] == pytest.approx(ratio, rel=1e-9)
    assert entries[1, 5, 7]["verdict"] == "mild" and entries[0, 1, 1]["verdict"] == "inert"
    assert [c["kind"] for c in found["ablation"]["conditions"]] == [
        "intact", "set", "each", "each", "random", "magnitude"
    ]  # fmt: skip
    assert found["summary"] in " ".join(shown.split()) and f"{ratio:.4g}" in shown
    assert "layer 1 [5, 7]" in shown and "built-in text" not in shown


def test_defaults_are_those_of_the_function():
    of_command, of_function = map(signature, (catalogue_cli.verify_catalogue, verify_catalogue))
    for name in ("controls", "seed"):
        assert of_command.parameters[name].default == of_function.parameters[name].default


def test_the_built_in_text_is_noted(go, capfd):
    assert go("--as", "owner/planted", "--tokens", 64, "--controls", 0) == 0
    assert "The built-in text under-reports damage" in printed(capfd)


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "the catalogue has no 'tiny'; the nearest are owner/Planted"),
        ([], "--as NAME says which entry MODEL is"),
        (["--as", "else"], "the catalogue has no 'else'"),
        (["--as", "planted", "--controls", -1], "--controls must be at least 0"),
        (["--as", "planted", "--text", "nowhere"], "nowhere"),
        (["--as", "planted", "--window", 1], "--window must be at least 2"),
    ],
)
def test_errors_are_one_line_and_write_nothing(go, folder, tmp_path, capfd, options, words):
    before = files(folder)
    assert go(*options, "-o", tmp_path / "a") == 2
    out, error = capfd.readouterr()
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir()) and files(folder) == before
