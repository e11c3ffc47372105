"""Everything that only a GPU can show, in one command and about ten minutes.

    python -m benchmarks.gpu [-o OUT] [--dry] [--minutes 10] [--only STEP ...]

It says what the machine is, builds csrc for the card, runs the tests on it, watches each kernel
with compute-sanitizer, tunes the launch choices and runs the quick benchmarks. A step that fails or
takes too long is reported, and the rest still run. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import records
from benchmarks.gpu import steps as work
from benchmarks.gpu import summary
from benchmarks.gpu.context import ROOT, Context, Outcome
from benchmarks.gpu.sanitize import sanitize

_MINUTES = 10.0
_CLOSING = 10.0  # seconds for the summary and the archive
TUNING = ROOT / "swkernels" / "tuning"


@dataclass(frozen=True)
class Step:
    """A step and its time, in seconds of a run of ten minutes.

    Attributes:
        most: it is ended after that; None: it has all that is left.
        least: the steps before must leave so much.
    """

    name: str
    run: Callable[[Context, float], Outcome]
    most: float | None
    least: float = 0.0


STEPS = (
    Step("environment", work.environment, 30),
    Step("build", work.build, 60),
    Step("tests", work.tests, 180),
    Step("sanitize", sanitize, 90),
    Step("tune", work.tune, 150, 60),
    Step("bench", work.bench, None, 150),
)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Run from the command line; return 0, 1 where a step failed, 2 for a wrong request, 130 after
    Ctrl-C."""
    options = _parse(arguments, steps)
    out = options.output or ROOT / "build" / "gpu" / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    if out.exists() and any(out.iterdir()):
        return _refuse(f"{out} is not empty: name another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    context = Context(out.resolve(), options.dry)
    # A run that is asked to end must end its children too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(context, steps, options.only, options.minutes)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(context: Context, steps: Sequence[Step], only: Sequence[str], minutes: float) -> int:
    started = time.monotonic()
    chosen = [s for s in steps if not only or s.name in only or s.name == "environment"]
    scale = minutes / _MINUTES
    done: list[dict] = []

    def content() -> dict:
        return {
            "dry": context.dry,
            "seconds": round(time.monotonic() - started, 1),
            "environment": context.about,
            "steps": done,
            "results": _compared(context),
        }

    for place, step in enumerate(chosen):
        left = 60 * minutes - (time.monotonic() - started)
        left -= scale * (_CLOSING + sum(later.least for later in chosen[place + 1 :]))
        seconds = left if step.most is None else min(left, scale * step.most)
        done.append(_step(step, context, seconds))
        summary.write(context.out, content())  # after each step: what ends us may be rude
        if done[-1]["status"] == "interrupted":
            break
        if step.name == "environment" and not context.dry and _without_gpu(context):
            return _refuse("PyTorch sees no GPU: take --dry, or a machine that has one")
    interrupted = done[-1]["status"] == "interrupted"
    closing = Step("report", lambda context, _: report(context, done), None)
    done.append(_step(closing, context, scale * _CLOSING))
    text = summary.write(context.out, content())
    summary.pack(context.out)
    print(f"\n{text}\neverything: {context.out}")
    if interrupted:
        return 130
    return 1 if any(each["status"] in ("failed", "timed out") for each in done) else 0


def _step(step: Step, context: Context, seconds: float) -> dict:
    print(f"{step.name} ... ", end="", flush=True)
    begun = time.monotonic()
    try:
        if seconds <= 0:
            outcome = Outcome("timed out", "no time was left for it")
        else:
            outcome = step.run(context, seconds)
    except KeyboardInterrupt:
        outcome = Outcome("interrupted")
    except Exception as error:  # the rest still run
        outcome = Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    spent = time.monotonic() - begun
    print(f"{outcome.status} ({spent:.0f} s) {outcome.note}", flush=True)
    return {"name": step.name, "seconds": round(spent, 1), **asdict(outcome)}


def _without_gpu(context: Context) -> bool:
    return bool(context.about) and not context.about["gpus"]


def _compared(context: Context) -> list[dict]:
    try:
        return summary.compared(context.record.parent)
    except (OSError, ValueError):  # the step says so
        return []


def report(context: Context, done: Sequence[dict]) -> Outcome:
    """Copy the tuning file and the record to where they belong in the source tree.

    Only now: a tree that differs from its commit would be noted in the record.
    """
    if context.dry:
        return Outcome("ok", "a dry run leaves the source tree alone")
    kept = []
    if any(each["name"] == "tune" and each["status"] == "ok" for each in done):
        kept.append(TUNING / context.tuning.name)
        shutil.copy2(context.tuning, kept[-1])
    if context.record.exists():
        kept.append(records.RESULTS / context.record.name)
        for run in records.read(context.record.parent):
            records.write(kept[-1], run.header, run.results)
    return Outcome("ok", f"to be committed: {', '.join(map(str, kept)) or 'nothing'}")


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _parse(arguments: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-o", "--output", type=Path, help="an empty folder (default: build/gpu/)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="for all steps (10)")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[step.name for step in steps], metavar="STEP",
        help=f"of {', '.join(step.name for step in steps)}; environment always runs",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes}")
    return options
