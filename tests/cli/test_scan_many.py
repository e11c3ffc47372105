"""``swkernels scan-many``, from the command line, with tasks that run in this process."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from swkernels.cli import main
from swkernels.integrations import ray as over_ray
from swkernels.integrations.fleet import run_task

SMALL = ["--samples", "2", "--length", "16", "--no-verify", "--device", "cpu"]


@pytest.fixture
def here(monkeypatch):
    """Run tasks in this process; returns the tasks that ran."""
    ran = []

    class Here:
        slots = 1

        def __init__(self, address, **resources):
            self.resources = resources

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, task):
            return task

        def finished(self, handles, timeout):
            ran.append(handles[0])
            if handles[0].model.endswith("/stop"):
                raise KeyboardInterrupt
            return [(handles[0], run_task(handles[0]))]

        def cancel(self, handles):
            pass

    monkeypatch.setattr(over_ray, "RayExecutor", Here)
    return ran


def test_a_good_and_a_damaged_one_and_again(planted, tmp_path, capfd, here):
    damaged = tmp_path / "damaged"
    shutil.copytree(planted, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    names = tmp_path / "list"
    names.write_text(json.dumps({"path": str(planted), "seed": 7}) + f"\n{damaged}\n")
    out = tmp_path / "out"
    arguments = ["scan-many", str(names), "-o", str(out), *SMALL]
    assert main(arguments) == 1
    told = capfd.readouterr()
    assert told.err == ""
    assert "1 of 2 scanned" in told.out
    assert told.out.splitlines()[-1].startswith("failed: damaged: ") and "truncated" in told.out
    report = json.loads((out / "planted" / "report.json").read_text())
    assert report["settings"]["seed"] == 7 and report["settings"]["samples"] == 2
    assert not (out / "damaged" / "report.json").exists()
    assert (out / "fleet.csv").read_text().count("\n") == 3

    shutil.copy(planted / "model.safetensors", weights)
    here.clear()
    assert main(arguments) == 0
    assert [task.name for task in here] == ["damaged"]
    assert "skipped: planted: " in capfd.readouterr().out


def test_ctrl_c_leaves_a_table(tmp_path, capfd, here):
    (tmp_path / "stop").mkdir()
    (tmp_path / "list").write_text(f"{tmp_path}/stop\n")
    assert main(["scan-many", str(tmp_path / "list"), "-o", str(tmp_path / "out")]) == 130
    assert "cancelled" in (tmp_path / "out" / "fleet.csv").read_text()
    assert capfd.readouterr().err == "swkernels: interrupted\n"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--retries", "-1"], "--retries must be at least 0"),
        (["--cpus", "nan"], "--cpus must be at least 0"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--memory", "much"], "expected a size"),
    ],
)
def test_wrong_options(tmp_path, capfd, here, extra, says):
    (tmp_path / "list").write_text("org/model\n")
    assert main(["scan-many", str(tmp_path / "list"), "-o", str(tmp_path / "out"), *extra]) == 2
    error = capfd.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not here and not (tmp_path / "out").exists()


def test_a_wrong_list_starts_nothing(tmp_path, capfd, here):
    (tmp_path / "list").write_text("org/model\norg/model\n")
    assert main(["scan-many", str(tmp_path / "list"), "-o", str(tmp_path / "out")]) == 2
    assert "line 2: org/model is already in line 1" in capfd.readouterr().err
    assert not here and not (tmp_path / "out").exists()


def test_without_ray(tmp_path, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a)
    )
    (tmp_path / "list").write_text("org/model\n")
    assert main(["scan-many", str(tmp_path / "list"), "-o", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert "pip install 'swkernels[ray]'" in error and error.count("\n") == 1
