"""Measure launch choices of the Triton kernels: what `swkernels tune` does. See docs/tuning.md.

This module imports Triton. `triton/tasks.py` says what is measured, `triton/candidates.py` what is
tried, `triton/trials.py` how one candidate is run and checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TimeIsOut
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from swkernels import tuning
from swkernels.errors import BackendUnavailable, InvalidInput, SwkernelsError
from swkernels.timing import Timing, interleaved

from .triton import interpreted, launch
from .triton.candidates import Candidate, candidates
from .triton.tasks import Task
from .triton.trials import TRIALS, Trial, precision

_FINALISTS = 3
_FIRST_SECONDS = 0.01  # of timing for each candidate, in the round of all
_FIRST_MOST = 15
_LAST_SECONDS = 0.25  # of timing for the finalists together
_COMPILE_TOKENS = 16  # the binary is the same for any number
_LONGEST_REASON = 160  # characters
_LIBRARY = "library"  # among the names of candidates, which are longer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What came out of one task.

    Attributes:
        records: tuning records, the choice first, then the best of each other variant; empty if
            nothing could be chosen.
        refused: candidates that may not be chosen, and why.
        skipped: why there are no records, or None.
    """

    task: Task
    records: list[dict]
    refused: list[tuple[Candidate, str]]
    skipped: str | None = None


@torch.no_grad()
def compile_ahead(
    tasks: Sequence[Task],
    device: torch.device,
    *,
    deadline: float | None = None,
    progress: Progress | None = None,
) -> None:
    """Compile the candidates of all tasks, several at a time; errors show when they are tried.

    Args:
        tasks: of one run; tasks that differ in tokens or shape alone mostly share binaries.
        device: where they will run; nothing is compiled for the interpreter.
        deadline: of `time.monotonic`, at which to stop; None takes the time that it takes.
        progress: is called with (done, total).
    """
    if interpreted():
        return
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.op, task.dtype), []).append(task)
    binaries = {key: _binaries(group, device) for key, group in groups.items()}
    done, total = 0, sum(map(len, binaries.values()))
    for (op, dtype), group in groups.items():
        trial = TRIALS[op](replace(group[0], tokens=_COMPILE_TOKENS), device, sets=1)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        pool = ThreadPoolExecutor(os.cpu_count())
        with precision(dtype), _watched(start=False):
            try:
                futures = [pool.submit(trial.run, each, 0) for each in binaries[op, dtype]]
                for _ in as_completed(futures, timeout=left):
                    done += 1
                    if progress is not None:
                        progress(done, total)
            except TimeIsOut:
                return
            finally:
                pool.shutdown(cancel_futures=True)


def measure(
    tasks: Sequence[Task], device: torch.device, *, deadline: float | None = None
) -> Iterator[Result]:
    """Measure task after task; stop before the first that would begin after `deadline`.

    All candidates are checked against the reference, timed shortly against each other, and the
    fastest of them once more together with the library's way.

    Raises:
        BackendUnavailable: a candidate left the GPU in a state in which nothing runs any more.
        InvalidInput: a tuning file that lookups read is broken.
    """
    columns: list[dict] = []
    for task in tasks:
        if deadline is not None and time.monotonic() >= deadline:
            return
        with torch.no_grad(), precision(task.dtype), tuning.use(*_beside(task, columns)):
            result = _measure(task, device)
        if task.op == "column_absmax":
            columns += result.records
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of graphs, which keep their memory to themselves
        yield result


def _beside(task: Task, columns: list[dict]) -> list[dict]:
    """The choices of this run for the passes over x and y of `task`."""
    return [
        record
        for record in columns
        if record["tokens"] == task.bucket and record["columns"] in (task.rows, task.columns)
    ]


def _measure(task: Task, device: torch.device) -> Result:
    refused: list[tuple[Candidate, str]] = []
    tried = _tried(task, device)
    try:
        trial = TRIALS[task.op](task, device)
        fit = []
        for candidate in tried:
            reason = _refusal(trial, candidate, device)
            if reason is None:
                fit.append(candidate)
            else:
                refused.append((candidate, reason))
        if not fit:
            return Result(task, [], refused, "every candidate was refused")
        return Result(task, _records(trial, fit, device), refused)
    except torch.OutOfMemoryError:
        return Result(task, [], refused, "the device has too little memory")


def _tried(task: Task, device: torch.device) -> list[Candidate]:
    """The candidates, after what would serve the task now: tuning makes nothing slower."""
    name, architecture = launch.names(device)
    shape = (task.rows, task.columns, task.tokens)
    look = partial(tuning.lookup, task.op, name, *shape, task.dtype, architecture=architecture)
    serving = [look()]
    for variant in ("descriptors", "pointers") if task.op == "linear_absmax" else ():
        with suppress(InvalidInput):  # not on every device
            serving.append(look(variant=variant))
    return list(
        dict.fromkeys(
            [
                *(Candidate.of(choice.variant, choice.config) for choice in serving),
                *candidates(task.op, architecture, task.dtype, task.bucket, _shared_memory(device)),
            ]
        )
    )


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; a large number where the device does not say."""
    if device.type == "cpu":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return max(getattr(properties, name, 0) for name in names) or 1 << 30


def _binaries(tasks: Sequence[Task], device: torch.device) -> list[Candidate]:
    """One candidate for each binary that the tasks need."""
    found = {}
    for task in tasks:
        for candidate in _tried(task, device):
            if candidate.variant != "two_pass":
                config = {name: n for name, n in candidate.settings if name != "waves"}
                found.setdefault(Candidate.of(candidate.variant, config), candidate)
    return list(found.values())


def _refusal(trial: Trial, candidate: Candidate, device: torch.device) -> str | None:
    """Return why `candidate` may not be chosen, or None."""
    try:
        with _watched() as compiled:
            wrong = trial.wrong(candidate)
        spills = max((getattr(kernel, "n_spills", 0) or 0 for kernel in compiled), default=0)
        return f"spills registers ({spills} words a thread)" if spills else wrong
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, LLVM, ptxas or the driver raise
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as dead:
            raise BackendUnavailable(
                f"the GPU does not answer after {trial.task.op} with {candidate} ({error}): what "
                "was finished before is kept; run the command again without this shape"
            ) from dead
        kind = "" if isinstance(error, SwkernelsError) else f"{type(error).__name__}: "
        return f"{kind}{' '.join(str(error).split())}"[:_LONGEST_REASON]


@contextmanager
def _watched(*, start: bool = True) -> Iterator[list]:
    """Collect what the kernels' launches compile; compile without launching if not `start`."""
    compiled: list = []

    def run(original, *args, warmup: bool, **options):
        compiled.append(original(*args, warmup=warmup or not start, **options))
        return compiled[-1]

    # On the instances, where `kernel[grid]` finds it: an eager launch pays nothing for this.
    kernels = [trial.kernel for trial in TRIALS.values()]
    before = [vars(kernel).get("run") for kernel in kernels]
    for kernel in kernels:
        kernel.run = partial(run, kernel.run)
    try:
        yield compiled
    finally:
        for kernel, own in zip(kernels, before):
            del kernel.run
            if own is not None:
                kernel.run = own


def _records(trial: Trial, fit: Sequence[Candidate], device: torch.device) -> list[dict]:
    """Time the candidates; return the record of the fastest, then of the best of each variant."""
    named = {str(candidate): candidate for candidate in fit}
    calls = {name: partial(trial.run, candidate) for name, candidate in named.items()}
    seconds = _FIRST_SECONDS * len(calls)
    order = _fastest(interleaved(calls, device=device, seconds=seconds, most=_FIRST_MOST))
    finalists = dict.fromkeys([*order[:_FINALISTS], *_best_of_variants(order, named)])
    timings = interleaved(
        {_LIBRARY: trial.library, **{name: calls[name] for name in finalists}},
        device=device,
        seconds=_LAST_SECONDS,
    )
    library = timings.pop(_LIBRARY)
    return [
        {
            **trial.task.record(named[name].variant, named[name].config),
            "seconds": _rounded(timings[name].median),
            "library_seconds": _rounded(library.median),
        }
        for name in _best_of_variants(_fastest(timings), named)
    ]


def _fastest(timings: Mapping[str, Timing]) -> list[str]:
    return sorted(timings, key=lambda name: timings[name].median)


def _best_of_variants(order: Sequence[str], named: Mapping[str, Candidate]) -> list[str]:
    """The first name of each variant."""
    best: dict[str, str] = {}
    for name in order:
        best.setdefault(named[name].variant, name)
    return list(best.values())


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
