"""The steps of a GPU run. Each takes the run and its seconds, and returns how it ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.context import ROOT, Context, Outcome, outcome_of
from benchmarks.gpu.jobs import run_all
from benchmarks.shapes import MODELS

_OLDEST_SETUPTOOLS = 77  # as pyproject.toml asks
_DRY_ARCHITECTURE = "sm_90"
_BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "swkernels")

# Files of tests/backends that need no GPU and take long.
_OF_THE_CPU = re.compile(r"aot|test_cpu|resources")
_DRY_TESTS = "twice"  # of tests/gpu

_TUNED = ("Llama-3-8B", "Llama-3-70B", "SmolLM2-135M")
_TOKENS = "4096,16384,16"
_PART = 0.85  # of a step's time that its command is told to use: the rest is start and end


def environment(context: Context, seconds: float) -> Outcome:
    """Find out what the machine is; the other steps go by it."""
    described = context.logs / "environment.json"
    job = context.job("environment", ["-m", "benchmarks.gpu.environment", str(described)])
    outcome = outcome_of(run_all([job], seconds)[0])
    if outcome.status != "ok":
        return outcome
    context.about.update(json.loads(described.read_text(encoding="utf-8")))
    versions = context.about["versions"]
    name = context.gpu.get("name") or "no GPU"
    return Outcome("ok", f"{name}, PyTorch {versions['torch']}, Triton {versions['triton']}")


def build(context: Context, seconds: float) -> Outcome:
    """Build the native libraries for the card; in a dry run in a copy, and without the CPU's."""
    if context.about.get("hip"):
        return Outcome("skipped", "csrc/cuda is for NVIDIA GPUs")
    if context.dry and context.tool("nvcc") is None:
        return Outcome("skipped", "no nvcc is installed")
    setuptools = context.about.get("versions", {}).get("setuptools") or "0"
    if int(setuptools.split(".")[0]) < _OLDEST_SETUPTOOLS:
        return Outcome(
            "failed",
            f"setuptools {setuptools} is too old or missing: "
            f"pip install 'setuptools>={_OLDEST_SETUPTOOLS}'",
        )
    architecture = context.gpu.get("architecture") or (_DRY_ARCHITECTURE if context.dry else None)
    variables = {"SWKERNELS_BUILD_CUDA": "1"}
    if architecture:
        variables["SWKERNELS_CUDA_ARCHS"] = architecture
    command = ["setup.py", "build_native", "--inplace"]
    if not context.dry:
        job = context.job("build", ["-u", *command], environment=variables)
        return outcome_of(run_all([job], seconds)[0], f"csrc for {architecture or 'all'}")
    with tempfile.TemporaryDirectory() as folder:
        _copy_source(Path(folder))
        variables["SWKERNELS_BUILD_CPU"] = "0"
        job = context.job("build", ["-u", *command], environment=variables, folder=Path(folder))
        return outcome_of(run_all([job], seconds)[0], f"csrc/cuda for {architecture}, in a copy")


def _copy_source(folder: Path) -> None:
    for name in _BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("_native", "__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def tests(context: Context, seconds: float) -> Outcome:
    """Run the tests, a process for each file: a kernel that breaks the GPU's context ends one."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    selection = ["-k", _DRY_TESTS]
    if not context.dry:
        for folder in ("backends", "ops"):
            files += sorted((ROOT / "tests" / folder).glob("test_*.py"))
        files = [path for path in files if not _OF_THE_CPU.search(path.name)]
        selection = []
    options = ["-v", "--tb=short", "--durations=5", "-p", "no:cacheprovider", "-o", "addopts=-ra"]
    jobs = [
        context.job(
            f"tests-{path.parent.name}-{path.stem}",
            ["-m", "pytest", *options, *selection, str(path.relative_to(ROOT))],
        )
        for path in files
    ]
    parts, bad, late, total = {}, [], [], Counter()
    for path, finished in zip(files, run_all(jobs, seconds, workers=_workers())):
        name = f"{path.parent.name}/{path.name}"
        counts = _counts(finished.text)
        total += counts
        parts[name] = _said(counts) or finished.last_line
        if finished.code is None:
            late.append(name)
            parts[name] += ", then ended for time"
        elif finished.code or not counts["passed"]:
            bad.append(name)
            parts[name] += f", exit status {finished.code}"
    if bad:
        return Outcome("failed", f"{_said(total)}; see {', '.join(bad)}", parts)
    if late:
        return Outcome("timed out", f"{_said(total)}; not all of {', '.join(late)}", parts)
    return Outcome("ok", f"{_said(total)}; files: {len(parts)}", parts)


def _said(counts: Counter) -> str:
    return ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))


def _counts(text: str) -> Counter:
    """Tests by outcome, from the lines of ``pytest -v``, so that one cut short counts too."""
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]", text)
    return Counter(word.lower() for word in words)


def tune(context: Context, seconds: float) -> Outcome:
    """Measure the launch choices for the shapes of the benchmarks."""
    if context.dry:
        shapes, tokens, dtype = ["24x48"], "5,33", "float32"
    else:
        sizes = {model.name: (model.hidden, model.intermediate) for model in MODELS}
        shapes = ["{}x{}".format(*sizes[name]) for name in _TUNED]
        tokens, dtype = _TOKENS, "bfloat16"
    command = ["-m", "swkernels.cli", "tune", "--device", context.device, "--dtype", dtype]
    command += [word for shape in shapes for word in ("--shape", shape)]
    command += ["--tokens", tokens, "--minutes", f"{_PART * seconds / 60:.2f}"]
    context.tuning.parent.mkdir(parents=True, exist_ok=True)
    job = context.job("tune", [*command, "-o", str(context.tuning)])
    outcome = outcome_of(run_all([job], seconds)[0])
    try:
        found = json.loads(context.tuning.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError) as error:
        # Every lookup of the next step would fail on a broken file.
        context.tuning.unlink(missing_ok=True)
        problem = f"no tuning file came out ({type(error).__name__})"
        return Outcome("failed", problem) if outcome.status == "ok" else outcome
    if outcome.status == "ok":
        return Outcome("ok", f"{len(found)} records")
    return outcome


def bench(context: Context, seconds: float) -> Outcome:
    """Run the quick suite with the new tuning file."""
    command = ["-m", "benchmarks.run", "--suite", "gpu", "--quick", "-o", str(context.record)]
    command += ["--minutes", f"{_PART * seconds / 60:.2f}", *(["--dry"] if context.dry else [])]
    outcome = outcome_of(run_all([context.job("bench", command)], seconds)[0])
    runs = records.read(context.record.parent) if context.record.exists() else []
    if not runs:
        return Outcome("failed", "no record came out") if outcome.status == "ok" else outcome
    results = runs[-1].results
    measured = {(r["op"], r["case"]) for r in results if r["status"] == "ok"}
    late = sum(r["status"] == "skipped" for r in results)
    bad = [r for r in results if r["role"] == "ours" and r["status"] in ("wrong", "failed")]
    parts = {f"{r['op']}, {r['case']}, {r['provider']}": r["reason"] for r in bad}
    note = f"{len(measured)} cases measured, {late} left out, {len(bad)} of ours wrong or failed"
    if bad or outcome.status == "ok":
        return Outcome("failed" if bad else "ok", note, parts)
    return Outcome(outcome.status, f"{outcome.note}; {note}", parts)


def _workers() -> int:
    """Processes at a time: enough to use the cores, few enough for the GPU's memory."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))
