"""``swkernels tune``: from the command line to a tuning file that lookups find."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from swkernels import tuning
from swkernels.backends import tune
from swkernels.backends.triton import interpreted
from swkernels.backends.triton.tasks import Task
from swkernels.cli import app, main
from swkernels.errors import InvalidInput
from swkernels.tuning import files

DEVICE = "interpreter"
VERSIONS = {"torch": "2"}

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="Triton's interpreter is off")


@pytest.fixture(autouse=True)
def user_directory(monkeypatch, tmp_path):
    tuning.clear_cache()
    folder = tmp_path / "tuning"
    monkeypatch.setenv("SWKERNELS_TUNING", str(folder))
    yield folder
    tuning.clear_cache()


@pytest.fixture
def quick(monkeypatch):
    """Measure nothing: choose for each task a configuration that tells its place in the run."""
    done = []

    def chosen(task, device):
        done.append(task)
        record = task.record("two_pass" if task.op == "linear_absmax" else "rows", {"n": len(done)})
        return tune.Result(task, [{**record, "seconds": 2e-5, "library_seconds": 1e-5}], [])

    monkeypatch.setattr(tune, "_measure", chosen)
    return done


def run(*arguments) -> int:
    return main(["tune", "--device", "cpu", *arguments])


def look(task: Task, **options) -> tuning.Choice:
    return tuning.lookup(
        task.op, DEVICE, task.rows, task.columns, task.tokens, task.dtype,
        architecture=DEVICE, **options,
    )  # fmt: skip


def error(capsys) -> str:
    text = capsys.readouterr().err
    assert text.startswith("swkernels: error: ") and text.count("\n") == 1
    return text


# --- end to end ---


@needs_interpreter
def test_what_was_measured_is_what_lookups_find(user_directory, capsys):
    arguments = ["--shape", "16x32", "--tokens", "9", "--dtype", "float32", "--dtype", "bfloat16"]
    assert run(*arguments, "--op", "linear_absmax", "--op", "column_absmax") == 0
    shown = capsys.readouterr()
    path = user_directory / "interpreter.json"
    content = json.loads(path.read_text())
    assert content["schema"] == tuning.SCHEMA and content["device"] == DEVICE
    assert content["measured"] is False and set(content["versions"]) >= {"torch", "triton"}
    assert [(r["op"], r["columns"], r["dtypes"]) for r in content["records"]] == [
        ("column_absmax", 32, ["float32"]),
        ("column_absmax", 16, ["float32"]),
        *[("linear_absmax", 32, ["float32"])] * 3,
        ("column_absmax", 32, ["bfloat16"]),
        ("column_absmax", 16, ["bfloat16"]),
        ("linear_absmax", 32, ["bfloat16"]),
    ]
    first = {}
    for record in content["records"]:
        assert record["seconds"] > 0 and record["library_seconds"] > 0 and record["tokens"] == 16
        key = (record["op"], record["rows"], record["columns"], *record["dtypes"])
        first.setdefault(key, record)
        task = Task(record["op"], record["rows"], record["columns"], 16, *record["dtypes"])
        choice = look(task, variant=record["variant"])
        assert choice.config == record["config"] and choice.source == str(path)
    for (op, rows, columns, dtype), record in first.items():
        assert look(Task(op, rows, columns, 3, dtype)).variant == record["variant"]
        assert look(Task(op, rows, columns, 17, dtype)).source.endswith("default.json")
    assert "Triton's interpreter" in shown.out.partition("Refused")[2]  # cannot multiply bfloat16
    assert str(path) in shown.out
    assert "linear_absmax 16x32 <= 16 bfloat16 two_pass" in shown.err
    assert "note" not in shown.err


@needs_interpreter
def test_a_file_elsewhere_is_written_and_said_not_to_serve(quick, tmp_path, capsys):
    path = tmp_path / "new" / "mine.json"
    assert run("--shape", "8x8", "--tokens", "16", "-o", str(path)) == 0
    assert len(json.loads(path.read_text())["records"]) == 3
    assert f"set SWKERNELS_TUNING to {path}" in capsys.readouterr().err


@needs_interpreter
def test_defaults_and_what_is_printed(quick, capsys, user_directory):
    assert run() == 0
    assert {(task.op, task.rows, task.columns) for task in quick} == {
        ("column_absmax", 48, 48), ("column_absmax", 24, 24), ("glu_absmax", 48, 48),
        ("linear_absmax", 24, 48),
    }  # fmt: skip
    assert {(task.tokens, task.dtype) for task in quick} == {(16, "float32"), (64, "float32")}
    shown = capsys.readouterr().out
    assert "20 us" in shown and "10 us" in shown and "2.00" in shown


@needs_interpreter
def test_a_model_says_its_shapes(quick, tmp_path):
    from tests.cli.checkpoints import make_model

    model = make_model()
    model.config.save_pretrained(tmp_path)
    rows, columns = model.model.layers[0].mlp.down_proj.weight.shape
    for given in (tmp_path, tmp_path / "config.json"):
        quick.clear()
        arguments = ["--model", str(given), "--op", "linear_absmax", "--tokens", "16"]
        assert run(*arguments, "--shape", "8x16") == 0
        assert [(task.rows, task.columns) for task in quick] == [(8, 16), (rows, columns)]


# --- what is kept ---


@needs_interpreter
def test_runs_add_up_and_replace_what_they_measure_again(quick, user_directory):
    arguments = ["--shape", "8x8", "--op", "glu_absmax"]
    assert run(*arguments, "--tokens", "16,64") == 0
    assert run(*arguments, "--tokens", "60,200") == 0
    records = json.loads((user_directory / "interpreter.json").read_text())["records"]
    assert [(r["tokens"], r["config"]["n"]) for r in records] == [(16, 1), (64, 3), (256, 4)]
    assert look(Task("glu_absmax", 8, 8, 50, "float32")).config == {"n": 3}


@needs_interpreter
def test_ctrl_c_keeps_what_is_finished(quick, monkeypatch, user_directory, capsys):
    chosen = tune._measure

    def interrupted(task, device):
        if len(quick) == 2:
            raise KeyboardInterrupt
        return chosen(task, device)

    monkeypatch.setattr(tune, "_measure", interrupted)
    assert run() == 130
    records = json.loads((user_directory / "interpreter.json").read_text())["records"]
    assert [record["columns"] for record in records] == [48, 24]
    assert look(Task("column_absmax", 24, 24, 16, "float32")).config == {"n": 2}
    shown = capsys.readouterr()
    assert "column_absmax" in shown.out and "interrupted" in shown.err


@needs_interpreter
@pytest.mark.parametrize("finished", [0, 3])
def test_time_that_is_over_keeps_what_is_finished(
    quick, monkeypatch, user_directory, capsys, finished
):
    clock = SimpleNamespace(monotonic=lambda: 1e12 if len(quick) >= finished else 0.0)
    monkeypatch.setattr(tune, "time", clock)
    assert run("--minutes", "5") == (0 if finished else 2)
    shown = capsys.readouterr().err
    assert f"time was over after {finished} of 8 measurements" in shown
    if finished:
        records = json.loads((user_directory / "interpreter.json").read_text())["records"]
        assert len(records) == finished
    else:
        assert "nothing was written" in shown and not user_directory.exists()


@needs_interpreter
def test_what_could_not_be_chosen_is_shown(quick, monkeypatch, capsys, user_directory):
    refused = [(tune.Candidate("rows", (("BLOCK_T", 4),)), "spills registers (9 words a thread)")]
    monkeypatch.setattr(
        tune, "_measure", lambda task, device: tune.Result(task, [], refused, "every one refused")
    )
    assert run("--shape", "8x8", "--tokens", "16") == 2
    shown = capsys.readouterr()
    assert "none: every one refused" in shown.err and "spills registers" in shown.out
    assert "nothing was written" in shown.err and not user_directory.exists()


# --- errors ---


@needs_interpreter
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "conv"], "unknown operation 'conv': expected one of column_absmax"),
        (["--shape", "4096"], "--shape must be ROWSxCOLUMNS such as 4096x14336, got '4096'"),
        (["--shape", "0x16"], "at least 1, got 0"),
        (["--shape", "-4x16"], "got '-4x16'"),
        (["--dtype", "int8"], "unknown dtype 'int8': expected one of bfloat16"),
        (["--tokens", "16,many"], "--tokens must be numbers such as 16,512, got 'many'"),
        (["--tokens", "0"], "at least 1, got 0"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--device", "tpu"], "--device must be cuda, cuda:N or cpu, got 'tpu'"),
        (["--model", "nowhere"], "--model must be a folder with a config.json"),
        (["-o", "."], "cannot write .: expected a file"),
        (["-o", f"{__file__}/x.json"], "cannot write"),
        (["-o", __file__], "cannot read the tuning file"),
    ],
)
def test_errors_come_before_any_measurement(quick, capsys, arguments, says):
    assert run(*arguments) == 2
    assert says in error(capsys)
    assert not quick


@needs_interpreter
def test_a_model_that_transformers_cannot_read(quick, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    assert run("--model", str(tmp_path)) == 2
    assert f"cannot read the model at {tmp_path}" in error(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_needed(monkeypatch, capsys):
    assert main(["tune"]) == 2
    assert "tuning cuda needs a GPU, PyTorch sees 0" in error(capsys)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert main(["tune", "--device", "cpu"]) == 2
    assert "set TRITON_INTERPRET=1" in error(capsys)


def test_the_interpreter_is_not_taken_for_the_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["tune"]) == 2
    assert "TRITON_INTERPRET is set" in error(capsys)
    assert main(["tune", "--device", "cuda:1"]) == 2
    assert "tuning cuda:1 needs a GPU, PyTorch sees 1" in error(capsys)


@needs_interpreter
def test_the_file_of_another_device_is_refused(quick, user_directory, capsys):
    files.merge(
        user_directory / "interpreter.json", "NVIDIA H100", [record()], measured=True,
        versions=VERSIONS,
    )  # fmt: skip
    before = (user_directory / "interpreter.json").read_text()
    assert run() == 2
    assert "is the tuning file of NVIDIA H100, expected one of interpreter" in error(capsys)
    assert (user_directory / "interpreter.json").read_text() == before and not quick


# --- the file ---


def record(n=0, **fields):
    shape = {"op": "linear_absmax", "dtypes": ["float32"], "rows": 8, "columns": 16, "tokens": 16}
    return {**shape, "variant": "pointers", "config": {"n": n}, **fields}


def merge(path, *records, device=DEVICE, measured=False):
    files.merge(path, device, records, measured=measured, versions=VERSIONS)


def numbers(path):
    return [each["config"]["n"] for each in tuning.read(path)["records"]]


def test_merging_replaces_one_key_and_keeps_the_others(tmp_path):
    path = tmp_path / "a" / "b.json"
    differing = [
        record(2, op="glu_absmax"), record(3, rows=9), record(4, columns=9), record(5, tokens=64),
        record(6, dtypes=["float16"]),
    ]  # fmt: skip
    merge(path, record(0), record(1, variant="two_pass"), *differing)
    merge(path, record(7, variant="descriptors"))
    assert numbers(path) == [2, 3, 4, 5, 6, 7]


def test_an_open_record_cannot_hide_a_measured_one(user_directory):
    path = user_directory / "mine.json"
    opened = [
        record(1, rows=None), record(2, columns=None), record(3, tokens=None),
        record(4, dtypes=None), record(5, dtypes=["float16", "float32"]),
    ]  # fmt: skip
    merge(path, *opened)
    merge(path, record(6))
    assert numbers(path) == [6, 1, 2, 3, 4, 5]
    assert look(Task("linear_absmax", 8, 16, 16, "float32")).config == {"n": 6}


def test_lookups_see_what_was_just_written(user_directory):
    task = Task("linear_absmax", 8, 16, 16, "float32")
    assert look(task).variant == "two_pass"
    for n in (1, 2):
        merge(user_directory / "mine.json", record(n))
        assert look(task).config == {"n": n}


def test_what_else_stands_in_the_file_stays(tmp_path):
    path = tmp_path / "a.json"
    merge(path, record(1))
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "by hand", "time": "old"}))
    merge(path, record(2))
    content = tuning.read(path)
    assert content["note"] == "by hand" and content["time"] != "old"


@pytest.mark.parametrize(
    ("device", "measured", "says"),
    [
        ("NVIDIA H100", False, "tuning file of interpreter, expected one of NVIDIA H100"),
        (DEVICE, True, '"measured": false, expected true'),
    ],
)
def test_merging_refuses_a_file_of_another_kind(tmp_path, device, measured, says):
    path = tmp_path / "a.json"
    merge(path, record(1))
    with pytest.raises(InvalidInput, match=says):
        merge(path, record(2), device=device, measured=measured)
    assert numbers(path) == [1]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    merge(path, record(1))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InvalidInput, match="cannot write .*No space left on device"):
        merge(path, record(2))
    assert numbers(path) == [1] and os.listdir(tmp_path) == ["a.json"]


def test_where_the_file_is_by_default(monkeypatch, tmp_path):
    slug = "nvidia-h100-80gb-hbm3.json"
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path))
    assert files.default_path("NVIDIA H100 80GB HBM3") == tmp_path / slug
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path / "new.json"))
    assert files.default_path("NVIDIA H100 80GB HBM3") == tmp_path / "new.json"
    (tmp_path / "old").write_text("")
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path / "old"))
    assert files.default_path("NVIDIA H100 80GB HBM3") == tmp_path / "old"
    monkeypatch.delenv("SWKERNELS_TUNING")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".config" / "swkernels" / "tuning" / slug
    assert files.default_path("NVIDIA H100 80GB HBM3") == expected


# --- doctor ---


def test_doctor_shows_which_files_serve(user_directory, monkeypatch):
    merge(user_directory / "gone.json", record(), device="NVIDIA A100", measured=True)
    merge(user_directory / "here.json", record(), record(1, tokens=64), device="NVIDIA H100")
    (user_directory / "torn.json").write_text("{")
    module = sys.modules["swkernels.cli.doctor"]  # of that name the package has the function
    monkeypatch.setattr(module, "_device_names", lambda: ["cpu"])
    monkeypatch.setattr(module, "_devices", lambda: [("cpu", "one")])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr("swkernels.cli.output._LOG_WIDTH", 400)  # temporary paths are long
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.exception
    shown = result.stdout.partition("Tuning files")[2].replace("\n", " ")
    assert "NVIDIA A100 (not here)" in shown and "1, measured" in shown
    assert "NVIDIA H100 (cuda:0)" in shown and "2, not measured" in shown
    assert "cannot read the tuning file" in shown
    assert "any device" in shown
    assert shown.index("gone.json") < shown.index("here.json") < shown.index("default.json")
