"""Running studies: what is refused at once, what is kept, one process in a folder, the words."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from swkernels.cli import main
from swkernels.errors import InvalidInput
from swkernels.studies import lock, study
from swkernels.studies.book import RUNS, Book
from swkernels.studies.budget import SMALL
from swkernels.studies.data import Data
from swkernels.studies.lab import NotInModel
from swkernels.studies.recipes import RECIPES
from swkernels.studies.recipes.direct import run_of
from swkernels.studies.run import Run, in_order
from swkernels.studies.words import describe, duration, seconds_left
from swkernels.train import Coordinates
from tests.processes import ROOT
from tests.studies import tiny

SMALL_PLAN = study.make_plan()


@pytest.fixture(scope="module")
def direct(planted, data, tmp_path_factory):
    """(folder, steps) of ``direct`` that ran once."""
    out = tmp_path_factory.mktemp("direct") / "out"
    steps = []
    tiny.run(["direct"], planted, data, out, on_run=steps.append)
    return out, steps


def lines(out) -> list[tuple]:
    return [(r["run"], r["kind"], r["config"], r["figures"]) for r in Book(out / RUNS)]


def test_runs_are_made_in_order_and_said_in_words(direct):
    out, steps = direct
    words = ["evaluate", "detect", *(f"train k = {k}" for k in tiny.TINY.counts)]
    assert [step.text for step in steps] == words
    assert [(step.number, step.total, step.study) for step in steps] == [
        (n, 6, "direct") for n in range(1, 7)
    ]
    assert steps[2].seconds_left is None  # no training run is done yet
    assert steps[3].seconds_left > steps[5].seconds_left > 0
    record = list(Book(out / RUNS))[-1]
    assert record["seeds"] == list(tiny.PLAN.seeds) and record["task"] == "arc"
    assert {path.name for path in out.iterdir()} == {RUNS, "README.md", "figures"}


def test_a_second_time_and_once_more_are_the_same(direct, planted, data, tmp_path):
    out, _ = direct
    before = (out / RUNS).read_bytes(), (out / "README.md").read_bytes()
    tiny.run(["direct"], planted, data, out, on_run=lambda step: pytest.fail("measured again"))
    assert ((out / RUNS).read_bytes(), (out / "README.md").read_bytes()) == before
    tiny.run(["direct"], planted, data, tmp_path / "out")
    assert lines(tmp_path / "out") == lines(out)  # bit for bit


def test_only_what_is_missing_is_measured(direct, planted, data, tmp_path):
    out, _ = direct
    whole = (out / RUNS).read_bytes().splitlines(keepends=True)
    (tmp_path / RUNS).write_bytes(b"".join(whole[:3] + whole[4:]))
    steps = []
    tiny.run(["direct"], planted, data, tmp_path, on_run=steps.append)
    assert [step.text for step in steps] == ["train k = 8"]
    assert sorted(map(str, lines(tmp_path))) == sorted(map(str, lines(out)))


@pytest.mark.parametrize("other", ["data", "dtype", "super weights"])
def test_a_folder_of_something_else_is_refused(direct, planted, data, tmp_path, other):
    out, _ = direct
    before = (out / RUNS).read_bytes()
    options: dict = {"super_weights": tiny.PLANTED}
    if other == "data":
        data = tiny.write_data(tmp_path / "data")
        path = data / "arc" / "test.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    if other == "super weights":
        options["super_weights"] = Coordinates.of(
            {"model.layers.0.mlp.down_proj": [(1, 2)]}, tiny.SHAPES
        )
    dtype = "bfloat16" if other == "dtype" else "float32"
    model = study.Model("planted", lambda: study_model(planted, dtype))
    name = "arc/test" if other == "data" else other
    with pytest.raises(InvalidInput, match=f"line 1: a run with another {name} .*another folder"):
        study.study(["direct"], model, out, tiny.PLAN, data=Data(data), **options)
    assert (out / RUNS).read_bytes() == before and not (out / lock.LOCK).exists()


def study_model(path, dtype):
    from swkernels.detect.loading import load_model

    return load_model(str(path), dtype=dtype)


def test_what_the_model_lacks_leaves_the_rest(planted, data, tmp_path):
    """The short text gives the scan no spike: nothing is trained, what else there is is kept."""
    steps = []
    with pytest.raises(InvalidInput, match=r"^4 runs could not be made \(no super weight was fo"):
        tiny.run(
            ["direct"], planted, data, tmp_path, super_weights=None, on_run=steps.append
        )  # fmt: skip
    assert [r["kind"] for r in Book(tmp_path / RUNS)] == ["evaluate", "detect"]
    assert (tmp_path / "README.md").exists()
    with pytest.raises(InvalidInput, match="could not be made"):
        tiny.run(["direct"], planted, data, tmp_path, super_weights=None)


def test_what_needs_a_run_that_failed_is_not_tried(planted, data, tmp_path, monkeypatch):
    tried = []

    def perform(lab, config, path):
        tried.append(config["n"])
        if config["n"] == 0:
            raise NotInModel("there is none")
        return {}

    first = Run("made up", {"n": 0})
    second = Run("made up", {"n": 1}, (first,))
    recipe = replace(RECIPES["direct"], runs=lambda plan: [second, Run("made up", {"n": 2})])
    recipe = replace(recipe, section=lambda found: None)
    monkeypatch.setattr(study, "RECIPES", {"direct": recipe})
    monkeypatch.setitem(study.KINDS, "made up", perform)
    with pytest.raises(InvalidInput, match=r"^2 runs could not be made \(there is none\)"):
        tiny.run(["direct"], planted, data, tmp_path)
    assert tried == [0, 2] and len(Book(tmp_path / RUNS)) == 1


def test_a_model_that_does_not_go_on_with_a_text(data, tmp_path):
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)
    model = study.Model("t5", lambda: (T5ForConditionalGeneration(T5Config(**sizes)), None, None))
    with pytest.raises(InvalidInput, match="an encoder and a decoder"):
        study.study(["direct"], model, tmp_path, tiny.PLAN, data=Data(data))
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short_is_told_before_anything_is_measured(planted, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (text,) = folder.rglob("*.txt")
    text.write_text(text.read_text()[:60])
    began = []
    with pytest.raises(InvalidInput, match="expected 64 to choose a clip on"):
        tiny.run(["direct", "quantization"], planted, folder, tmp_path / "out", on_run=began.append)
    assert not began and not Book(tmp_path / "out" / RUNS)


def test_too_few_seeds(monkeypatch):
    recipe = replace(RECIPES["direct"], least_seeds=3)
    study.check_seeds([recipe], study.make_plan(seeds=[1, 2, 3]))
    with pytest.raises(InvalidInput, match="direct needs 3 seeds at least, got 2: give more"):
        study.check_seeds([recipe], study.make_plan(seeds=[1, 2]))


def test_a_plan_from_names():
    assert study.make_plan() == study.Plan(SMALL, SMALL.seeds, "arc")
    assert study.make_plan("small", [7], "winogrande").seed == 7
    for options in ({"budget": "large"}, {"task": "boolq"}):
        with pytest.raises(InvalidInput, match=next(iter(options.values()))):
            study.make_plan(**options)


HOLD = """
import sys, time
from pathlib import Path
from swkernels.studies.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_and_a_kill_lets_go(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            words = f"{tmp_path} is in use by process {holder.pid} on .*: wait for it, or"
            with pytest.raises(InvalidInput, match=words), lock.locked(tmp_path):
                pytest.fail("both held it")
        finally:
            holder.send_signal(signal.SIGKILL)
    assert (tmp_path / lock.LOCK).exists()  # left by the kill, and in nobody's way
    with lock.locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / lock.LOCK).read_text()
    assert not (tmp_path / lock.LOCK).exists()


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Else two could hold the folder: one the file that is gone, one the file that others find."""
    own = fcntl.flock
    removed = []

    def flock(file, how):
        if not removed:
            removed.append((tmp_path / lock.LOCK).unlink())
        own(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.locked(tmp_path):
        with pytest.raises(InvalidInput, match="is in use by process"), lock.locked(tmp_path):
            pytest.fail("both held it")
    assert removed


def test_no_two_runs_of_a_study_have_the_same_words():
    for recipe in RECIPES.values():
        runs = in_order(recipe.runs(SMALL_PLAN))
        words = [describe(run, runs) for run in runs]
        assert len(set(words)) == len(words), recipe.name
        assert all(text.startswith(run.kind) for text, run in zip(words, runs))
        assert max(map(len, words)) < 100


def test_words():
    runs = [
        Run("train", {"same": 1, "adapter": {"at": "rows", "scale": 0.1, "held": True}, "k": 4096}),
        Run("train", {"same": 1, "adapter": {"at": None, "scale": 0.0, "held": False}, "k": 8}),
        Run("detect", {"same": 2}),
    ]
    assert [describe(run, runs) for run in runs] == [
        "train rows, scale = 0.1, held, k = 4,096",
        "train no at, scale = 0, no held, k = 8",
        "detect",
    ]


def test_how_long_it_takes(tmp_path):
    book = Book(tmp_path / RUNS)
    missing = [run_of(SMALL_PLAN, k) for k in (100, 1000)]
    assert seconds_left(missing, book) is None
    for seed, seconds in enumerate((10.0, 20.0, 90.0)):
        book.add(Run("train", {"seed": seed}), tiny.ABOUT | {"seconds": seconds}, {})
    assert seconds_left(missing, book) == 2 * 20
    assert seconds_left([*missing, Run("detect", {})], book) is None
    assert seconds_left([], book) == 0
    shown = [duration(seconds) for seconds in (0.2, 89, 100, 3600, 9000)]
    assert shown == ["0 s", "89 s", "2 min", "60 min", "2.5 h"]


def test_what_a_kill_left_aside_goes_with_its_run(planted, data, tmp_path):
    run = run_of(tiny.PLAN, 4)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / f".{run.key}.json.x1y2").write_text("[")
    tiny.run(["direct"], planted, data, tmp_path)
    assert not (tmp_path / "work").exists()


def test_records_hold_no_path_of_this_machine(planted, data, tmp_path, capfd):
    command = ["study", "direct", "--model", str(planted), "--data", str(data)]
    command += ["--budget", "small", "-o", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "budget_named", lambda name: tiny.TINY)
        listed = tmp_path / "super-weights.json"
        tiny.PLANTED.save(listed)
        assert main([*command, "--super-weights", str(listed)]) == 0
    records = (tmp_path / RUNS).read_text()
    assert '"model":"planted"' in records and '"source":"arc/test"' in records
    assert str(planted.parent) not in records and str(data) not in records
