"""A fleet without Ray: the list, names, one scan with its retries, results, going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swkernels.errors import InvalidInput
from swkernels.integrations.fleet import Results, Task, read_list, run_task, scan_all
from swkernels.integrations.fleet.listing import OPTIONS, arguments, safe_names
from swkernels.integrations.fleet.results import key_of

# Stands for ``swkernels scan MODEL -o FOLDER ...``: MODEL says what each attempt does.
SCAN = """
import json, os, pathlib, signal, sys, time
_, model, _, folder, *rest = sys.argv[1:]
folder = pathlib.Path(folder)
tried = folder / "tried"
n = len(tried.read_text()) if tried.exists() else 0
tried.write_text("x" * (n + 1))
(folder / "rest").write_text(json.dumps(rest))
what = model.split(",")[min(n, len(model.split(",")) - 1)]
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "slow":
    time.sleep(60)
if what == "passing":
    print("swkernels: error: no connection", file=sys.stderr)
    sys.exit(75)
if what == "wrong":
    print("swkernels: error: no model", file=sys.stderr)
    sys.exit(2)
if what == "bug":
    raise ZeroDivisionError("a bug")
(folder / "report.json").write_text(json.dumps({
    "summary": "one", "model": {"parameters": 7}, "candidates": [
        {"verdict": "super weight", "layer": 1, "expert": None, "row": 2, "column": 3},
        {"verdict": "part of a critical set", "layer": 2, "expert": 0, "row": 5, "column": 6},
        {"verdict": "inert", "layer": 1, "expert": None, "row": 2, "column": 4}]}))
"""
COMMAND = (sys.executable, "-c", SCAN)


def task(folder: Path, model: str, **changes) -> Task:
    settings = dict(name=folder.name, model=model, folder=str(folder), key="k", pause=0.01)
    return Task(**{**settings, "command": COMMAND, **changes})


class Serial:
    """An executor that runs a task when it is asked for results."""

    slots = 1

    def __init__(self, work=run_task):
        self.work = work
        self.ran: list[str] = []
        self.cancelled: list[str] = []
        self.most = 0

    def submit(self, task):
        return task

    def finished(self, handles, timeout):
        self.most = max(self.most, len(handles))
        self.ran.append(handles[0].name)
        return [(handles[0], self.work(handles[0]))]

    def cancel(self, handles):
        self.cancelled += [handle.name for handle in handles]


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_and_objects(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    one = json.dumps({"path": "org/two", "name": "second", "samples": 4, "stream": True})
    path = write(tmp_path, f"# comment\n\n{folder}  # here\n{one}\norg/three\n")
    first, second, third = read_list(path)
    assert (first.line, first.model, first.options) == (3, str(folder), {})
    assert first.folder.startswith("a-model-")
    assert (second.line, second.model, second.folder) == (4, "org/two", "second")
    assert arguments(second.options) == ["--samples", "4", "--stream"]
    assert (third.line, third.folder) == (5, safe_names(["org/three"])[0])


def test_all_wrong_lines_are_told(tmp_path):
    lines = [
        "org/one",
        "org/one",
        '{"path": "org/two", "sample": 3}',
        '{"path": "org/two", "samples": true}',
        '{"path": "org/two", "methods": [1]}',
        '{"name": "x"}',
        '{"path": "org/three"',
        "/nowhere/model",
        "a.gguf",
        "-o",
        "../up",
    ]
    with pytest.raises(InvalidInput) as error:
        read_list(write(tmp_path, "\n".join(lines)))
    message = str(error.value)
    assert [n for n in range(1, 12) if f"line {n}: " in message] == list(range(2, 12))
    assert "line 2: org/one is already in line 1" in message
    assert "\n" not in message


def test_the_same_folder_twice(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(InvalidInput, match="line 2: .* is already in line 1"):
        read_list(write(tmp_path, f"{tmp_path}/m\n{tmp_path}/./m/\n"))


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_list(tmp_path, text):
    with pytest.raises(InvalidInput, match="names no checkpoint"):
        read_list(write(tmp_path, text))


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidInput, match="cannot read the list"):
        read_list(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_list(tmp_path / "bytes")


def test_names_are_safe_and_unique():
    models = ["../../etc", "a/b", "A/B", "a--b", "..", "x" * 300, "é", "fleet.jsonl", "plain", ".h"]
    models = ["twin", "Twin", *models]  # one folder where case does not count
    names = safe_names(models)
    assert len({name.lower() for name in names}) == len(models)
    for name in names:
        assert Path(name).name == name and name.isascii() and len(name) < 100
        assert not name.startswith((".", "-")) and name != "fleet.jsonl"
    assert names[-2] == "plain"
    assert safe_names(models[::-1]) == names[::-1]


def test_every_option_is_one_of_scan():
    import inspect

    from swkernels.cli.scan import scan
    from swkernels.cli.scan_many import scan_many

    assert set(OPTIONS) <= set(inspect.signature(scan).parameters)
    assert set(OPTIONS) <= set(inspect.signature(scan_many).parameters)


@pytest.mark.parametrize(
    ("model", "status", "attempts", "error"),
    [
        ("good", "done", 1, None),
        ("killed,good", "done", 2, None),
        ("passing,passing,good", "done", 3, None),
        ("killed", "failed", 3, "the scan was ended by SIGKILL (out of memory?)"),
        ("passing", "failed", 3, "no connection"),
        ("wrong,good", "failed", 1, "no model"),
        ("bug,good", "failed", 1, "exit code 1: ZeroDivisionError: a bug"),
    ],
)
def test_one_scan(tmp_path, model, status, attempts, error):
    row = run_task(task(tmp_path / "m", model))
    assert (row["status"], row["attempts"], row["error"]) == (status, attempts, error)
    if status == "done":
        assert row["super_weights"] == [[1, None, 2, 3], [2, 0, 5, 6]] and row["summary"] == "one"
        assert row["parameters"] == 7


def test_time_runs_out(tmp_path):
    begin = time.monotonic()
    row = run_task(task(tmp_path / "m", "slow", timeout=0.3))
    assert (row["status"], row["attempts"]) == ("timeout", 1)
    assert time.monotonic() - begin < 30


def test_a_worker_that_comes_after_a_dead_one_counts_on(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "scan.log").write_text("--- attempt 1\n--- attempt 2\n")
    row = run_task(task(folder, "killed"))
    assert (row["status"], row["attempts"]) == ("failed", 3)
    assert run_task(task(folder, "good"))["error"] == "the worker died 3 times"


def test_a_state_of_other_settings_is_not_taken_up(tmp_path):
    def rest():
        return json.loads((tmp_path / "m" / "rest").read_text())

    run_task(task(tmp_path / "m", "good"))
    assert rest() == []
    run_task(task(tmp_path / "m", "good"))
    assert rest() == []
    (tmp_path / "m" / "scan.log").unlink()
    run_task(task(tmp_path / "m", "good", key="other"))
    assert rest() == ["--fresh"]


def test_a_second_run_does_what_is_left(tmp_path):
    tasks = [task(tmp_path / n, m) for n, m in [("a", "good"), ("b", "wrong,good"), ("c", "good")]]
    shown = []
    with Results(tmp_path) as results:
        first = Serial()
        rows = scan_all(tasks, first, results, lambda *told: shown.append(told[:2]))
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert first.ran == ["a", "b", "c"] and first.most == 2
    assert shown[0] == ("a", "waiting") and shown[-1] == ("c", "finished")

    with Results(tmp_path) as results:
        second = Serial()
        changed = [*tasks[:2], task(tmp_path / "c", "good", key="other")]
        rows = scan_all(changed, second, results, lambda *told: shown.append(told[:2]))
        table = results.write_table(["a", "b", "c"]).read_text().splitlines()
    assert [row["status"] for row in rows] == ["done"] * 3
    assert second.ran == ["b", "c"] and ("a", "skipped") in shown
    assert len((tmp_path / "fleet.jsonl").read_text().splitlines()) == 5
    assert len(table) == 4 and "layer 1 [2, 3]" in table[1]

    (tmp_path / "a" / "report.json").unlink()
    with Results(tmp_path) as results:
        third = Serial()
        scan_all(changed, third, results, lambda *told: None)
    assert third.ran == ["a"]


def test_ctrl_c_notes_what_was_stopped(tmp_path):
    def work(one):
        if one.name == "b":
            raise KeyboardInterrupt
        return run_task(one)

    tasks = [task(tmp_path / n, "good") for n in "abcd"]
    with Results(tmp_path) as results:
        executor = Serial(work)
        with pytest.raises(KeyboardInterrupt):
            scan_all(tasks, executor, results, lambda *told: None)
    assert executor.cancelled == ["b", "c"]
    rows = [json.loads(line) for line in (tmp_path / "fleet.jsonl").read_text().splitlines()]
    assert [(r["name"], r["status"]) for r in rows] == [
        ("a", "done"), ("b", "cancelled"), ("c", "cancelled"),
    ]  # fmt: skip


def test_a_line_that_a_kill_cut_off(tmp_path):
    row = {"name": "a", "model": "a", "key": "k", "status": "failed"}
    with Results(tmp_path) as results:
        results.add(row)
    with open(tmp_path / "fleet.jsonl", "a") as file:
        file.write('{"name": "b", "mo')
    with Results(tmp_path) as results:
        assert results.rows == {"a": row}
        results.add(row | {"name": "c"})
    lines = (tmp_path / "fleet.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a", "c"]


def test_results_that_are_none(tmp_path):
    (tmp_path / "fleet.jsonl").write_text('{"name": 3}\n')
    with pytest.raises(InvalidInput, match="line 1 of .* is no result"):
        Results(tmp_path)


def test_one_at_a_time(tmp_path):
    with Results(tmp_path), pytest.raises(InvalidInput, match="another scan-many"):
        Results(tmp_path)
    Results(tmp_path).__exit__()


def test_a_key_knows_files_and_settings(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    settings = ("--text", str(text))
    first = key_of(str(model), settings)
    assert key_of(str(model), settings) == first
    assert key_of(str(model), (*settings, "--seed", "1")) != first
    text.write_text("longer")
    second = key_of(str(model), settings)
    assert second != first
    (model / "config.json").write_text('{"a": 1}')
    third = key_of(str(model), settings)
    assert third != second
    os.utime(model / "config.json", ns=(1, 1))  # as long as before, but written to
    assert key_of(str(model), settings) != third


def test_a_scan_ends_with_its_worker(tmp_path):
    code = (
        "import subprocess, sys, os\n"
        "p = subprocess.Popen([sys.executable, '-c', "
        "'from swkernels.cli.child import _die_with_parent as d; import time, sys;"
        "d(sys.argv[1]); print(1, flush=True); time.sleep(60)', str(os.getpid())])\n"
        "print(p.pid, flush=True); p.wait()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(worker.stdout.readline())
    assert worker.stdout.readline() == "1\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert worker.stdout.read() == ""  # the scan held the pipe: it is gone
    assert not Path(f"/proc/{pid}/exe").exists()


def test_errors_that_may_pass():
    from swkernels.cli.child import may_pass

    def chained(cause):
        error = InvalidInput("cannot load")
        error.__cause__ = cause
        return error

    class ConnectTimeout(Exception):
        pass

    assert may_pass(OSError(5, "Input/output error"))
    assert may_pass(chained(ConnectionError()))
    assert may_pass(chained(chained(ConnectTimeout())))
    assert not may_pass(FileNotFoundError())
    assert not may_pass(InvalidInput("no"))
    assert not may_pass(chained(ValueError()))
