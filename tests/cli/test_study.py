"""``swkernels study``, from the command line to the page."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys

import pytest
from rich.console import Console

from swkernels.cli import main, studying
from swkernels.studies import kinds
from swkernels.studies.book import RUNS, Book
from swkernels.studies.budget import BUDGETS
from swkernels.studies.data import PARTS
from swkernels.studies.recipes import RECIPES
from swkernels.studies.study import Step
from tests.cli.checkpoints import files
from tests.studies import tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("study") / "data")


@pytest.fixture
def go(planted, data, tmp_path, monkeypatch):
    monkeypatch.setitem(BUDGETS, "tiny", tiny.TINY)
    tiny.PLANTED.save(tmp_path / "weights.json")

    def go(*names, **changed):
        options = {
            "model": planted, "data": data, "budget": "tiny", "device": "cpu",
            "super-weights": tmp_path / "weights.json", "output": tmp_path / "out",
        } | {name.replace("_", "-"): value for name, value in changed.items()}  # fmt: skip
        given = [[f"--{name}", value] for name, value in options.items() if value is not None]
        return main([str(word) for word in ["study", *names, *sum(given, [])]])

    return go


def fails(capfd, code: int, *words: str) -> None:
    printed, error = capfd.readouterr()
    assert code == 2, error
    assert error.startswith("swkernels: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert "run 1 of" not in printed


def test_from_a_name_to_a_page_and_the_page_again(go, tmp_path, capfd):
    out = tmp_path / "deep" / "out"
    assert go("direct", output=out, seeds="7") == 0
    printed, error = capfd.readouterr()
    assert error == ""
    *runs, last = printed.splitlines()
    words = ["evaluate", "detect", "train k = 4", "train k = 8", "train k = 16", "train k = 32"]
    assert [line.partition(" (")[0] for line in runs] == [
        f"run {n} of 6, direct: {text}" for n, text in enumerate(words, 1)
    ]
    assert runs[0].endswith(" s so far)") and " left)" in runs[-1]
    assert last == f"wrote {out / 'README.md'}"
    assert {record["seeds"][0] for record in Book(out / RUNS)} == {7}
    before = files(out)
    (out / "README.md").unlink()
    shutil.rmtree(out / "figures")
    assert main(["study", "page", "-o", str(out)]) == 0
    assert capfd.readouterr().out == f"wrote {out / 'README.md'}\n"
    assert files(out) == before
    assert go("direct", output=out, seeds="7") == 0
    assert capfd.readouterr().out == f"wrote {out / 'README.md'}\n"
    assert files(out) == before


@pytest.mark.parametrize("width", [100, 120])
def test_the_list_is_readable(width, capfd):
    console = Console(width=width, highlight=False, record=True)
    studying.show_list(console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for recipe in RECIPES.values():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{recipe.name} "))
        assert f" {recipe.minutes} " in line
    joined = "".join(text.split())
    for part, (places, dataset) in PARTS.items():
        assert part in joined and places[0] in joined
        assert width < 120 or dataset in joined
    assert main(["study", "list"]) == 0
    assert "consistency" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("names", "changed", "words"),
    [
        (["colour"], {}, ["there is no study 'colour': expected one of", "direct", "all"]),
        (["direct", "list"], {}, ["there is no study 'list'"]),
        (["direct"], {"model": None}, ["--model"]),
        (["direct"], {"output": None}, ["-o"]),
        (["page"], {"output": None}, ["-o"]),
        (["page"], {}, ["runs.jsonl holds no such runs"]),
        (["direct"], {"model": "./nowhere"}, ["there is no model at './nowhere'"]),
        (["direct"], {"data": "./nowhere"}, ["expected a folder with the data"]),
        (["direct"], {"seeds": "51-42"}, ["seeds", "51-42"]),
        (["direct"], {"seeds": "x"}, ["expected seeds such as 42-51"]),
        (["direct"], {"budget": "large"}, ["expected a budget of small, long, full", "large"]),
        (["direct"], {"task": "boolq"}, ["expected a task of arc, winogrande, got 'boolq'"]),
        (["direct"], {"device": "tpu"}, ["device"]),
        (["direct"], {"dtype": "int8"}, ["int8"]),
        (["direct"], {"super_weights": "nowhere.json"}, ["nowhere.json"]),
        (["direct"], {"output": "/dev/null/out"}, ["/dev/null/out"]),
    ],
)
def test_refused_before_a_model_is_loaded(go, tmp_path, capfd, names, changed, words, monkeypatch):
    monkeypatch.setattr("swkernels.cli.inputs.load_model", lambda *_, **__: pytest.fail("loaded"))
    fails(capfd, go(*names, **changed), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["no file", "no column", "no json"])
def test_data_that_cannot_be_used(go, data, tmp_path, capfd, fault, monkeypatch):
    monkeypatch.setattr("swkernels.cli.inputs.load_model", lambda *_, **__: pytest.fail("loaded"))
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "arc" / "test.jsonl"
    lines = path.read_text().splitlines()
    if fault == "no file":
        path.unlink()
        words = [str(tmp_path / "data"), "arc/ARC-Easy-Test.jsonl", "allenai/ai2_arc"]
    elif fault == "no column":
        row = json.loads(lines[3])
        del row["choices"]
        path.write_text("\n".join([*lines[:3], json.dumps(row), *lines[4:]]))
        words = ["test.jsonl, line 4: choices is missing"]
    else:
        path.write_text("\n".join([lines[0], lines[1][:-5]]))
        words = ["test.jsonl, line 2: not JSON"]
    fails(capfd, go("direct", data=tmp_path / "data"), *words)
    assert not (tmp_path / "out").exists()


def test_another_dtype_needs_another_folder(go, tmp_path, capfd):
    assert go("consistency") == 0
    before = files(tmp_path / "out")
    capfd.readouterr()
    fails(capfd, go("consistency", dtype="bfloat16"), "another dtype (float32, now bfloat16)")
    assert files(tmp_path / "out") == before


def test_a_damaged_line_is_named(go, tmp_path, capfd):
    assert go("consistency") == 0
    path = tmp_path / "out" / RUNS
    path.write_text(path.read_text().replace('"kind":"con', '"kind":"con '))
    capfd.readouterr()
    fails(capfd, go("consistency"), f"{path}, line 1 was changed after it was written")
    fails(capfd, go("page", budget=None), f"{path}, line 1 was changed")


def test_without_peft(go, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "swkernels.integrations.peft", None)
    monkeypatch.delattr("swkernels.integrations.peft", raising=False)
    fails(capfd, go("lora"), "pip install 'swkernels[peft]'")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_done(go, tmp_path, capfd, monkeypatch):
    own = kinds.KINDS["train"]
    begun = []

    def interrupted(lab, config, path):
        begun.append(config)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return own(lab, config, path)

    monkeypatch.setitem(kinds.KINDS, "train", interrupted)
    assert go("direct") == 130
    _, error = capfd.readouterr()
    words = "the runs that are done are kept, and the same command goes on"
    assert error == f"swkernels: interrupted: {words}\n"
    kept = (tmp_path / "out" / RUNS).read_bytes()
    assert len(kept.splitlines()) == 3
    assert go("direct") == 0
    assert (tmp_path / "out" / RUNS).read_bytes().startswith(kept)
    assert "run 1 of 3, direct: train k = 8" in capfd.readouterr().out


def test_no_super_weight_is_one_line_and_the_rest_is_kept(go, tmp_path, capfd):
    assert go("direct", super_weights=None) == 2
    printed, error = capfd.readouterr()
    assert error.count("\n") == 1 and "no super weight was found in this model" in error
    assert str(tmp_path / "out" / "README.md") in error and "wrote" not in printed
    assert len(Book(tmp_path / "out" / RUNS)) == 2


def test_bars_on_a_terminal():
    console = Console(width=100, force_terminal=True, file=io.StringIO())
    with studying.Shown(console) as shown:
        shown.begin(Step(1, 3, "direct", "train k = 4", None))
        shown.progress("steps", 5, 16)
        shown.begin(Step(2, 3, "direct", "train [bold]k", 125.0))
        shown.progress("perplexity", 1, 2)
    text = console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)
    assert "run 1 of 3, direct: train k = 4\n" in plain
    assert "train [bold]k" in plain and ", about 2 min left)" in plain and "perplexity" in plain
