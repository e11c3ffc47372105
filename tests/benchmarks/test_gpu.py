"""The GPU run, without a GPU: once dry from end to end, and its order with steps of the tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks import records
from benchmarks.gpu import run, sanitize
from benchmarks.gpu.context import ROOT, Outcome, outcome_of
from benchmarks.gpu.jobs import run_all
from benchmarks.gpu.run import STEPS, Step, main

NAMES = [step.name for step in STEPS]
SOURCE = ("swkernels/_native", "swkernels/tuning", "benchmarks/results", "build", ".")


def source_tree():
    """What the run could change by mistake: path -> time of its last change."""
    found = {}
    for name in SOURCE:
        pattern = "*" if name in (".", "build") else "**/*"
        for path in (ROOT / name).glob(pattern):
            if path.is_file() or name == ".":
                found[path] = path.stat().st_mtime_ns if path.is_file() else None
    return found


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(output folder, exit code, summary, what it printed) of one real dry run."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    before = source_tree()
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry", "-o", str(out)]
    result = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert source_tree() == before
    return out, result, json.loads((out / "summary.json").read_text())


def test_every_step_of_a_dry_run_passes(dry_run):
    _, result, summary = dry_run
    expected = {name: "ok" for name in [*NAMES, "report"]}
    if shutil.which("nvcc") is None:
        expected["build"] = "skipped"
    assert {s["name"]: s["status"] for s in summary["steps"]} == expected, result.stdout
    assert result.returncode == 0
    by_name = {s["name"]: s for s in summary["steps"]}
    assert by_name["tests"]["note"].startswith("11 passed")
    kernels = by_name["sanitize"]["parts"]
    assert {name for name, said in kernels.items() if said == "ok"} == {
        name for name in sanitize.KERNELS if name.startswith("triton")
    }
    assert all(said.startswith("skipped: ") for name, said in kernels.items() if "cuda-" in name)


def test_what_a_dry_run_leaves(dry_run):
    out, result, summary = dry_run
    (tuning,) = (out / "tuning").iterdir()
    (record,) = (out / "results").iterdir()
    assert tuning.name == "interpreter.json" and record.suffix == ".jsonl"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        "summary.txt", "summary.json", "gpu-run.tar.gz",
        f"tuning/{tuning.name}", f"results/{record.name}",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 16 << 20
    with tarfile.open(out / "gpu-run.tar.gz") as archive:
        packed = set(archive.getnames())
    for name in ("environment", "tests-gpu-test_on_gpu", "sanitize", "tune", "bench"):
        assert f"gpu-run/logs/{name}.log" in packed
    assert f"gpu-run/results/{record.name}" in packed
    (measured,) = records.read(record.parent)
    assert measured.header["dry"] and measured.header["suite"] == "gpu"
    assert {row["op"] for row in summary["results"]} == {r["op"] for r in measured.results}
    # Nothing does the work of topk_low_rank without its extra work.
    assert all(row["op"] == "topk_low_rank" or row["ratio"] > 0 for row in summary["results"])
    assert (out / "summary.txt").read_text() in result.stdout
    assert "a dry run" in (out / "summary.txt").read_text()


# --- the runner ---


def fine(context, seconds):
    return Outcome("ok", "fine")


def described(context, seconds):
    context.about.update(commit="c" * 40, gpus=[{"name": "NVIDIA X1", "architecture": "sm_90"}])
    return Outcome("ok")


def raises(context, seconds):
    raise RuntimeError("a step\nthat breaks")


def sleeps(context, seconds):
    job = context.job("sleeps", ["-c", "print('begun'); import time; time.sleep(60)"])
    (finished,) = run_all([job], seconds)
    return outcome_of(finished)


def go(out, *chosen, options=()):
    code = main(["--dry", "-o", str(out), *options], chosen)
    return code, json.loads((out / "summary.json").read_text())


def statuses(summary):
    return {step["name"]: (step["status"], step["note"]) for step in summary["steps"]}


def test_a_step_that_fails_and_one_that_is_late_are_reported_and_the_rest_run(tmp_path, capsys):
    chosen = [
        Step("environment", fine, 30), Step("breaks", raises, 30), Step("late", sleeps, 1),
        Step("last", fine, 30),
    ]  # fmt: skip
    started = time.monotonic()
    code, summary = go(tmp_path / "out", *chosen)
    assert time.monotonic() - started < 20
    assert code == 1
    found = statuses(summary)
    assert found["breaks"] == ("failed", "RuntimeError: a step that breaks")
    assert found["late"] == ("timed out", "ended after 1 s")
    assert found["last"] == ("ok", "fine")
    printed = capsys.readouterr().out
    assert "timed out" in printed and "RuntimeError: a step that breaks" in printed
    with tarfile.open(tmp_path / "out" / "gpu-run.tar.gz") as archive:
        log = archive.extractfile("gpu-run/logs/sleeps.log").read()
    assert log == b"begun\n"


def test_a_skipped_step_is_no_failure(tmp_path):
    skipped = Step("skipped", lambda *_: Outcome("skipped", "no tool"), 30)
    code, summary = go(tmp_path / "out", skipped)
    assert code == 0 and statuses(summary)["skipped"] == ("skipped", "no tool")


def test_only_some_steps_and_always_the_environment(tmp_path):
    chosen = [Step(name, fine, 30) for name in ("environment", "build", "tests", "bench")]
    code, summary = go(tmp_path / "out", *chosen, options=["--only", "tests", "bench"])
    assert code == 0
    assert list(statuses(summary)) == ["environment", "tests", "bench", "report"]


def test_later_steps_get_what_is_left_and_the_last_has_its_share_kept(tmp_path):
    given = {}

    def step(name, most, least=0.0):
        return Step(
            name, lambda _, seconds: given.update({name: seconds}) or fine(_, 0), most, least
        )

    chosen = [step("environment", 30), step("tests", 500), step("tune", 150, 60),
              step("bench", None, 150)]  # fmt: skip
    go(tmp_path / "out", *chosen)
    expected = {"environment": 30, "tests": 600 - 150 - 60 - 10, "tune": 150, "bench": 590}
    assert given == pytest.approx(expected, abs=2)
    go(tmp_path / "half", *chosen, options=["--minutes", "5"])
    assert given == pytest.approx({name: s / 2 for name, s in expected.items()}, abs=2)


def test_the_limits_of_the_steps_leave_the_benchmarks_their_time():
    *before, last = STEPS
    assert last.name == "bench" and last.most is None and last.least >= 150
    assert {step.name: step.most for step in before} == {
        "environment": 30, "build": 60, "tests": 180, "sanitize": 90, "tune": 150,
    }  # fmt: skip


def test_no_time_left_is_a_failure(tmp_path):
    code, summary = go(
        tmp_path / "out", Step("environment", fine, 30), Step("tests", fine, 30),
        Step("bench", fine, None, 1000), options=["--minutes", "10"],
    )  # fmt: skip
    assert code == 1
    assert statuses(summary)["tests"] == ("timed out", "no time was left for it")
    assert statuses(summary)["bench"][0] == "ok"


def test_ctrl_c_leaves_what_is_there(tmp_path):
    def interrupted(context, seconds):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    code, summary = go(out, Step("a", fine, 9), Step("b", interrupted, 9), Step("c", fine, 9))
    assert code == 130
    assert [name for name in statuses(summary)] == ["a", "b", "report"]
    assert statuses(summary)["b"][0] == "interrupted"
    assert (out / "gpu-run.tar.gz").exists()


def test_without_a_gpu_it_says_so_and_stops(tmp_path, capsys):
    def nothing(context, seconds):
        context.about.update(gpus=[], commit=None)
        return Outcome("ok")

    ran = []
    chosen = [Step("environment", nothing, 9), Step("tests", lambda *a: ran.append(a), 9)]
    assert main(["-o", str(tmp_path / "out")], chosen) == 2
    assert "PyTorch sees no GPU: take --dry" in capsys.readouterr().err
    assert not ran


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "old").write_text("")
    assert main(["--dry", "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_results_are_put_into_the_tree_but_not_those_of_a_dry_run(
    tmp_path, monkeypatch, small_record
):
    tuning, results = tmp_path / "tuning", tmp_path / "results"
    tuning.mkdir()
    monkeypatch.setattr(run, "TUNING", tuning)
    monkeypatch.setattr(records, "RESULTS", results)

    def tune(context, seconds):
        context.tuning.parent.mkdir()
        context.tuning.write_text("{}")
        return fine(context, seconds)

    def bench(context, seconds):
        context.record.parent.mkdir()
        context.record.write_text(small_record)
        return fine(context, seconds)

    chosen = [Step("environment", described, 9), Step("tune", tune, 9), Step("bench", bench, 9)]
    assert main(["--dry", "-o", str(tmp_path / "dry")], chosen) == 0
    assert not any(tuning.iterdir()) and not results.exists()
    for place in ("one", "again"):
        assert main(["-o", str(tmp_path / place)], chosen) == 0
    assert [path.name for path in tuning.iterdir()] == ["nvidia-x1.json"]
    assert [path.name for path in results.iterdir()] == [f"nvidia-x1-{'c' * 12}.jsonl"]
    assert len(records.read(results)) == 1

    chosen[1] = Step("tune", raises, 9)
    shutil.rmtree(tuning)
    tuning.mkdir()
    assert main(["-o", str(tmp_path / "third")], chosen) == 1
    assert not any(tuning.iterdir())


# --- the commands ---


def test_the_script_says_when_there_is_no_pytorch(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    script = shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    (tmp_path / "bin").mkdir()
    for name in ("dirname", "bash"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    command = [shutil.which("bash"), str(script), "--dry"]
    environment = {"PATH": str(tmp_path / "bin"), "PYTHON": "no-such-python"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: no Python with PyTorch was found: name one in PYTHON\n"


def test_sigterm_ends_the_run_like_ctrl_c(tmp_path):
    def asked(context, seconds):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    code, summary = go(tmp_path / "out", Step("asked", asked, 9), Step("next", fine, 9))
    assert code == 130 and "next" not in statuses(summary)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu():
    def shown(*words):
        command = ["make", "-n", "-C", str(ROOT), "gpu", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "bash benchmarks/gpu.sh\n" in shown().replace(" \n", "\n")
    assert "bash benchmarks/gpu.sh --dry\n" in shown("DRY=1")
