"""The steps of the GPU run with programs of the tests, and the kernel cases in the interpreter."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys

import pytest
import torch

from benchmarks import kernel_cases, records
from benchmarks.gpu import sanitize, steps
from benchmarks.gpu.context import ROOT, Context, Outcome
from benchmarks.gpu.jobs import Finished
from swkernels import backends


@pytest.fixture
def context(tmp_path):
    about = {"gpus": [{"name": "NVIDIA X1", "architecture": "sm_90"}], "commit": "c" * 40}
    about["versions"] = {"setuptools": "80.1"}
    return Context(tmp_path / "out", False, about)


def test_children_are_told_nothing_but_what_the_run_decides(context, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SWKERNELS_BACKEND", "reference")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    found = context.environment
    assert "TRITON_INTERPRET" not in found and "SWKERNELS_BACKEND" not in found
    assert found["SWKERNELS_TUNING"] == str(context.tuning.parent)
    assert "/opt/cuda/bin" in found["PATH"].split(os.pathsep)
    context.dry = True
    assert context.environment["TRITON_INTERPRET"] == "1"
    assert context.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_tests_run_a_process_for_each_file_of_a_gpu(context, tmp_path, monkeypatch):
    files = {
        "gpu/test_a.py": "def test_one(): pass\ndef test_two(): pass",
        "ops/test_broken.py": "def test_one(): pass\ndef test_two(): assert False",
        "ops/test_dead.py": "import os\ndef test_one(): pass\ndef test_two(): os._exit(7)",
        "ops/test_skipped.py": "import pytest\npytestmark = pytest.mark.skip\ndef test_one(): pass",
        "backends/test_triton_aot.py": "def test_one(): assert False",
        "backends/test_cpu.py": "def test_one(): assert False",
    }
    for name, text in files.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(steps, "_workers", lambda: 2)
    real = Context.job
    monkeypatch.setattr(
        Context, "job", lambda self, *args, **options: real(self, *args, folder=tmp_path, **options)
    )
    outcome = steps.tests(context, 60)
    assert outcome.status == "failed"
    assert outcome.parts == {
        "gpu/test_a.py": "2 passed",
        "ops/test_broken.py": "1 failed, 1 passed, exit status 1",
        "ops/test_dead.py": "1 passed, exit status 7",
        "ops/test_skipped.py": "1 skipped, exit status 0",
    }
    bad = ", ".join(f"ops/test_{name}.py" for name in ("broken", "dead", "skipped"))
    assert outcome.note == f"1 failed, 4 passed, 1 skipped; see {bad}"

    shutil.rmtree(tmp_path / "tests" / "ops")
    outcome = steps.tests(context, 60)
    assert outcome == Outcome("ok", "2 passed; files: 1", {"gpu/test_a.py": "2 passed"})
    late = "import time\ndef test_one(): pass\ndef test_two(): time.sleep(60)"
    (tmp_path / "tests" / "backends" / "test_late.py").write_text(late)
    outcome = steps.tests(context, 4)
    assert outcome.status == "timed out"
    assert outcome.note.endswith("not all of backends/test_late.py")
    assert outcome.parts["backends/test_late.py"].endswith(", then ended for time")


def test_tests_are_counted_in_a_log_that_was_cut_short():
    text = """tests/a.py::test_one[x PASSED] PASSED [ 33%]
tests/a.py::test_two SKIPPED (no GPU) [ 66%]
tests/a.py::test_three FAILED                                            [100%]
FAILED tests/a.py::test_three - assert PASSED
tests/a.py::test_four """
    assert steps._counts(text) == {"passed": 1, "skipped": 1, "failed": 1}


def recorded(monkeypatch, code=0, leave=None):
    """Let the steps' jobs end with ``code`` and leave a file; return the list of jobs."""
    seen = []

    def run_all(jobs, seconds, **options):
        seen.extend(jobs)
        if leave:
            leave[0].parent.mkdir(parents=True, exist_ok=True)
            leave[0].write_text(leave[1])
        return [Finished(job, code, 1.0) for job in jobs]

    monkeypatch.setattr(steps, "run_all", run_all)
    return seen


def test_build_is_for_the_card_at_hand(context, monkeypatch):
    seen = recorded(monkeypatch)
    assert steps.build(context, 60) == Outcome("ok", "csrc for sm_90")
    (build,) = seen
    assert build.command[1:] == ["-u", "setup.py", "build_native", "--inplace"]
    assert build.folder == ROOT
    assert build.environment["SWKERNELS_CUDA_ARCHS"] == "sm_90"
    assert build.environment["SWKERNELS_BUILD_CUDA"] == "1"


def test_build_says_what_is_missing(context, monkeypatch):
    seen = recorded(monkeypatch)
    context.about["versions"] = {"setuptools": None}
    outcome = steps.build(context, 60)
    assert outcome.status == "failed" and "pip install 'setuptools>=77'" in outcome.note
    context.dry = True
    monkeypatch.setattr(Context, "tool", lambda self, name: None)
    assert steps.build(context, 60) == Outcome("skipped", "no nvcc is installed")
    context.about["hip"] = "6.4"
    assert steps.build(context, 60).status == "skipped"
    assert not seen


def test_tune_names_the_shapes_and_a_broken_file_does_not_stay(context, monkeypatch):
    seen = recorded(monkeypatch, leave=(context.tuning, '{"records": [1, 2]}'))
    assert steps.tune(context, 100) == Outcome("ok", "2 records")
    words = " ".join(seen[0].command)
    assert "-m swkernels.cli tune --device cuda --dtype bfloat16 --shape 4096x14336" in words
    assert "--tokens 4096,16384,16 --minutes 1.42" in words
    for text in ("{", '{"device": null}'):
        recorded(monkeypatch, leave=(context.tuning, text))
        assert steps.tune(context, 100).status == "failed"
        assert not context.tuning.exists()
    recorded(monkeypatch, code=None)
    assert steps.tune(context, 100).status == "timed out"


def test_bench_reports_what_of_ours_is_wrong(context, monkeypatch, small_record):
    seen = recorded(monkeypatch, leave=(context.record, small_record))
    assert steps.bench(context, 100).status == "ok"
    assert seen[0].environment["SWKERNELS_TUNING"] == str(context.out / "tuning")
    lines = [json.loads(line) for line in small_record.splitlines()]
    wrong = next(line for line in lines if line.get("provider") == "swkernels")
    wrong |= {name: None for name in records.SPEED}
    wrong |= {"status": "wrong", "reason": "error 1, limit 0 (channels)"}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    recorded(monkeypatch, code=1, leave=(context.record, text))
    outcome = steps.bench(context, 100)
    assert outcome.status == "failed" and "1 of ours wrong or failed" in outcome.note
    assert list(outcome.parts.values()) == ["error 1, limit 0 (channels)"]
    context.record.unlink()
    recorded(monkeypatch)
    assert steps.bench(context, 100) == Outcome("failed", "no record came out")


SANITIZER = """#!{python}
import sys
tool, kernel = sys.argv[2], sys.argv[-1]
assert sys.argv[sys.argv.index("--kernel-name") + 1].endswith("_kernel")
summary = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
if tool == "memcheck":
    summary = "ERROR SUMMARY: 0 errors"
said, code = "ok " + kernel, 0
if kernel == "planted-error" and not {blind}:
    summary, code = "ERROR SUMMARY: 3 errors", 99
if tool == "racecheck" and kernel == "triton-glu_absmax":
    summary, code = "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 99
if kernel == "triton-linear_absmax-pointers":
    said, code = "wrong " + kernel + ": 3 of 9 elements of y differ", 1
if kernel == "triton-linear_absmax-descriptors":
    summary = "Device not supported"
if kernel == "cuda-column_absmax":
    said, code = "skipped " + kernel + ": not built", 77
print("========= COMPUTE-SANITIZER", said, "========= " + summary, sep=chr(10))
sys.exit(code)
"""


@pytest.mark.parametrize("blind", [False, True])
def test_each_kernel_is_judged_under_each_tool(context, tmp_path, monkeypatch, blind):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(python=sys.executable, blind=blind))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    outcome = sanitize.sanitize(context, 60)
    clean = {"memcheck": "0 errors", "racecheck": "0 hazards displayed (0 errors, 0 warnings)"}
    expected = {
        "memcheck planted-error": "ok: the planted error was seen",
        **{
            f"{name} triton-{op}": f"ok: {said}"
            for name, said in clean.items()
            for op in (
                *("column_absmax", "sampled_grad", "sparse_linear", "masked_grad"),
                *("lora_linear-project", "lora_linear-expand", "lora_linear-reduce"),
                *("block_quantize-fused", "block_quantize-ranges", "block_quantize-sums"),
                *("block_quantize-encode", "block_dequantize", "topk_low_rank"),
                *("quant_linear-vector", "quant_linear-dot"),
            )
        },
        **{
            f"{name} cuda-topk_abs-{kernel}": f"ok: {said}"
            for name, said in clean.items()
            for kernel in ("count", "gather")
        },
        "memcheck triton-glu_absmax": "ok: 0 errors",
        "racecheck triton-glu_absmax": "failed: 1 hazard displayed (1 error, 0 warnings)",
        **{
            f"{name} {kernel}": said
            for name in clean
            for kernel, said in {
                "triton-linear_absmax-pointers": "failed: wrong: 3 of 9 elements of y differ",
                "triton-linear_absmax-descriptors": "failed: the tool wrote no summary",
                "cuda-column_absmax": "skipped: not built",
            }.items()
        },
    }
    if blind:
        reason = "failed: the planted error was not seen (========= ERROR SUMMARY: 0 errors)"
        expected["memcheck planted-error"] = reason
    assert outcome.status == "failed" and outcome.parts == expected


def test_without_compute_sanitizer_the_step_is_skipped(context, monkeypatch):
    monkeypatch.setattr(Context, "tool", lambda self, name: None)
    outcome = sanitize.sanitize(context, 60)
    assert outcome.status == "skipped" and "comes with CUDA" in outcome.note


def test_the_sanitizer_names_every_kernel_case():
    assert sanitize.KERNELS == tuple(kernel_cases.KERNELS)
    assert sanitize.PLANTED == kernel_cases.PLANTED
    assert {name.split("-")[1] for name in sanitize.KERNELS} == set(backends.OPERATIONS)


def test_what_is_watched_is_what_the_kernels_are_called():
    """A name that no kernel has would watch nothing, and find nothing."""
    for name in (*sanitize.KERNELS, sanitize.PLANTED):
        backend, op = name.split("-")[:2]
        function = sanitize.watched(name)
        if backend == "cuda":
            source = (ROOT / "csrc" / "cuda" / f"{op}.cu").read_text()
            assert re.search(rf"\b{function}\(.*Problem problem\)", source)
        else:
            place = "benchmarks.gpu.planted"
            place = place if backend == "planted" else f"swkernels.backends.triton.{op}"
            assert getattr(importlib.import_module(place), function).__name__ == function


# --- the cases ---


def test_a_wrong_kernel_a_failing_and_a_missing_one_are_named_and_the_rest_run(monkeypatch, capsys):
    from swkernels.backends.triton import column_absmax, glu_absmax

    right = column_absmax.column_absmax
    monkeypatch.setattr(
        column_absmax,
        "column_absmax",
        lambda x, keys, index, offset: right(x[:-1], keys, None, offset),
    )
    monkeypatch.setattr(glu_absmax, "glu_absmax_kernel", None)
    assert kernel_cases.main([]) == 1
    lines = dict(
        (line.split()[1].strip(":"), line) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["triton-column_absmax"].startswith("wrong triton-column_absmax: 1 of 1 elements")
    assert lines["triton-glu_absmax"].startswith("failed triton-glu_absmax: TypeError")
    assert lines["triton-linear_absmax-pointers"] == "ok triton-linear_absmax-pointers"
    assert set(lines) == set(kernel_cases.KERNELS)


def test_a_kernel_that_cannot_run_here_is_skipped_with_its_own_status(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_cases.main(["--kernel", sanitize.PLANTED]) == kernel_cases.SKIPPED
    assert capsys.readouterr().out.startswith("skipped planted-error: ")


def test_the_planted_error_is_one():
    """It writes one element more than it is told: here into room that was left for it."""
    from benchmarks.gpu.planted import error_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    y = torch.zeros(1026, device=device)
    error_kernel[(1,)](y, 1024, BLOCK=2048)
    assert y[:1025].all() and not y[1025]
