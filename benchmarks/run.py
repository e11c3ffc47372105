"""Measure the operations on this machine and keep a record.

    python -m benchmarks.run [--op NAME ...] [--suite cpu|gpu|models] [--quick] [--minutes M]

Every provider's result is first held against float64; one that is wrong gets no speed. The record
goes to benchmarks/results (or -o FILE), after every case, so that nothing measured is lost.
``python -m benchmarks.report`` makes the pages of it.
"""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import ceilings, machine, records
from benchmarks.case import Case
from benchmarks.expected import Ceilings, floor
from benchmarks.measure import measure, skipped
from benchmarks.suites import OPERATIONS, SUITES, cases
from swkernels.errors import SwkernelsError

_MINUTES = {"cpu": 12.0, "gpu": 60.0, "models": 60.0}
# What the suite cpu leaves out: it is to end in twenty minutes on two cores.
_LONGEST_ROUND = 1.0  # seconds of all providers once, estimated
_LARGEST = 400e6  # bytes that are read and written
_SECONDS = {True: 0.3, False: 1.0}  # share of a case's time for timing, by --quick
_DRY_SECONDS = 0.005

console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status: 0, or 1 where a provider of ours is
    wrong or failed."""
    options = _parse(arguments)
    try:
        return run(options)
    except SwkernelsError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for and write the record."""
    device = machine.device(options.suite, dry=options.dry)
    found = list(cases(options.suite, device, ops=tuple(options.op), quick=options.quick,
                       dry=options.dry))  # fmt: skip
    header = machine.header(options.suite, device, quick=options.quick, dry=options.dry)
    header |= {"run": uuid.uuid4().hex[:12], "command": _command(options)}
    measured = ceilings.measure(device, dry=options.dry)
    header["ceilings"] = {"read": measured.read, "copy": measured.copy, "gemm": measured.gemm}
    path = options.output or records.default_path(header["device"]["name"], header["commit"])
    minutes = _MINUTES[options.suite] if options.minutes is None else options.minutes
    end = time.monotonic() + 60 * minutes
    results: list[dict] = []
    try:
        for number, case in enumerate(found, 1):
            started = time.monotonic()
            if started >= end:
                new = [skipped(case, "the time of the run was over")]
            elif too_large := _too_large(case, measured, options.suite):
                new = [skipped(case, too_large)]
            else:
                seconds = _DRY_SECONDS if options.dry else case.seconds * _SECONDS[options.quick]
                new = measure(
                    case, device, measured, header["device"]["cache_bytes"], seconds=seconds
                )
            for result in new:
                result["run"] = header["run"]
            results += new
            _tell(f"{number}/{len(found)} {case.op}: {case.label}", new, time.monotonic() - started)
            records.write(path, header, results)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept", style="yellow")
    console.print(f"record: {path}", markup=False)
    bad = [r for r in results if r["role"] == "ours" and r["status"] in ("wrong", "failed")]
    return 1 if bad else 0


def _too_large(case: Case, measured: Ceilings, suite: str) -> str | None:
    """Why a case is left out of this suite, or None."""
    if suite != "cpu":
        return None
    size = sum(piece.read + piece.write for piece in case.work)
    if size > _LARGEST:
        return f"{size / 1e6:.0f} MB; the suite cpu takes up to {_LARGEST / 1e6:.0f} MB"
    estimate = case.slowest * floor(case.work, measured, case.dtype)[0]
    if estimate > _LONGEST_ROUND:
        return f"about {estimate:.1f} s a round; the suite cpu takes up to {_LONGEST_ROUND:.0f} s"
    return None


def _tell(title: str, results: list[dict], seconds: float) -> None:
    console.print(f"{title}  ({seconds:.1f} s)", style="bold", markup=False, highlight=False)
    for result in results:
        if result["status"] == "ok":
            text = (
                f"{result['median'] * 1e3:10.3f} ms   {result['share']:5.2f} of {result['ceiling']}"
            )
        else:
            text = f"{result['status']}: {result['reason']}"
        console.print(f"    {result['provider'] or '-':34} {text}", markup=False, highlight=False)


def _command(options: argparse.Namespace) -> str:
    words = ["python -m benchmarks.run", f"--suite {options.suite}"]
    words += [f"--op {name}" for name in options.op]
    words += ["--quick"] if options.quick else []
    words += ["--dry"] if options.dry else []
    return " ".join(words)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", action="append", default=[], choices=OPERATIONS)
    parser.add_argument("--suite", choices=SUITES, default=None, help="gpu where one is there")
    parser.add_argument("--quick", action="store_true", help="a few models and token counts")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to exercise the code")
    parser.add_argument("--minutes", type=float, help="then the remaining cases are skipped")
    parser.add_argument("-o", "--output", type=Path, help="the record (default: by machine)")
    options = parser.parse_args(arguments)
    if options.suite is None:
        options.suite = "gpu" if torch.cuda.is_available() else "cpu"
    if options.dry and options.output is None:
        parser.error("--dry needs -o FILE: a dry record does not belong to the results")
    return options


if __name__ == "__main__":
    sys.exit(main())
