"""Records: what is written is read back, what breaks the schema is named and never written."""

from __future__ import annotations

import json

import pytest

from benchmarks import records
from swkernels.errors import InvalidInput

HEADER = {
    "kind": "run", "schema": records.SCHEMA, "run": "a1", "suite": "cpu", "quick": False,
    "dry": False, "time": "2026-11-23T12:00:00+00:00", "commit": "c" * 40, "modified": False,
    "command": "python -m benchmarks.run", "device": {"name": "some CPU, 2 cores"},
    "versions": {}, "ceilings": {},
}  # fmt: skip
RESULT = {
    "kind": "result", "run": "a1", "op": "column_absmax", "case": "tiny", "models": ["tiny"],
    "projection": "down_proj", "shape": {"tokens": 3, "columns": 4}, "dtype": "float32",
    "provider": "swkernels", "role": "ours", "status": "ok", "reason": None, "median": 1e-3,
    "p20": 9e-4, "p80": 2e-3, "runs": 5, "graph": False, "share": 0.5, "ceiling": "read",
    "flop": 0, "bytes": 48, "peak_memory": 32,
    "error": {"value": 0, "limit": 0, "measure": "channels"},
}  # fmt: skip
NO_SPEED = dict.fromkeys(records.SPEED)


def test_round_trip_of_several_runs(tmp_path):
    path = tmp_path / "deep" / "machine.jsonl"
    later = HEADER | {"run": "b2", "time": "2026-11-24T12:00:00+00:00"}
    records.write(path, later, [RESULT | {"run": "b2"}])
    records.write(path, HEADER, [RESULT])
    first, second = records.read(path.parent)
    assert first.header == HEADER and first.results == [RESULT]
    assert second.header["run"] == "b2"
    assert [entry.name for entry in path.parent.iterdir()] == ["machine.jsonl"]


def test_a_run_that_goes_on_replaces_itself(tmp_path):
    path = tmp_path / "machine.jsonl"
    records.write(path, HEADER, [RESULT])
    records.write(path, HEADER, [RESULT, RESULT | {"case": "other"}])
    (run,) = records.read(tmp_path)
    assert [result["case"] for result in run.results] == ["tiny", "other"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"median": None}, "needs median"),
        ({"median": float("inf")}, "needs median"),
        ({"median": 0.0}, "needs median"),
        ({"status": "wrong", "reason": "far"}, "must have no speed"),
        ({"status": "wrong", **NO_SPEED}, "needs a reason"),
        ({"status": "nice"}, "status is 'nice'"),
        ({"role": "friend"}, "role is 'friend'"),
        ({"role": None}, "role is None"),
        ({"error": {"value": 2, "limit": 1, "measure": "m"}}, "over its limit"),
        ({"extra": 1}, "unknown"),
        ({"run": "zz"}, "no header for run"),
    ],
)
def test_a_result_that_breaks_the_schema_is_refused_and_nothing_is_written(tmp_path, change, says):
    path = tmp_path / "machine.jsonl"
    records.write(path, HEADER, [RESULT])
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=says):
        records.write(path, HEADER, [RESULT | change])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["machine.jsonl"]


@pytest.mark.parametrize("field", ["weights", "step_memory"])
def test_a_model_may_say_the_bytes_of_its_weights_and_of_a_step(tmp_path, field):
    path = tmp_path / "machine.jsonl"
    records.write(path, HEADER, [RESULT | {field: 7}, RESULT | {"case": "no model"}])
    (run,) = records.read(tmp_path)
    assert [result.get(field) for result in run.results] == [7, None]


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "machine.jsonl"
    path.write_text(json.dumps(HEADER) + "\nnonsense\n")
    with pytest.raises(InvalidInput, match=r"machine\.jsonl, line 2"):
        records.read(tmp_path)
    path.write_text(json.dumps(HEADER | {"schema": "other/1"}) + "\n")
    with pytest.raises(InvalidInput, match="schema is 'other/1'"):
        records.read(tmp_path)
    missing = {key: value for key, value in HEADER.items() if key != "device"}
    path.write_text(json.dumps(missing) + "\n")
    with pytest.raises(InvalidInput, match=r"lacks \['device'\]"):
        records.read(tmp_path)


def test_the_file_of_a_machine_and_commit(tmp_path):
    name = "NVIDIA H100 80GB HBM3"
    path = records.default_path(name, "0123456789abcdef" * 2, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-0123456789ab.jsonl"
    assert records.default_path("x", None, tmp_path).name == "x-no-commit.jsonl"


def test_the_records_that_are_kept_are_whole():
    for run in records.read():
        assert not run.header["dry"]
