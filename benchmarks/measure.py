"""Measure a case: first every provider's result against float64, then the speed of the right ones.

A provider that is wrong, or that fails, gets no speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import warnings
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import torch
import torch._dynamo

from benchmarks import records
from benchmarks.case import Case, Error, Provider, Tensors
from benchmarks.expected import Ceilings, floor
from swkernels.timing import Timing, interleaved

_COLD = 3  # the sets of inputs together are this many times the cache
_MOST_SETS = 64
# After 8 builds of a function torch.compile would run eager code under its own name; a run has more
# dtypes and layouts than that.
_BUILDS = 256
_MOST_SET_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=_BUILDS)
def measure(
    case: Case, device: torch.device, ceilings: Ceilings, cache: int, *, seconds: float
) -> list[dict]:
    """Return one result (see results/README.md, without its run) for each provider of the case.

    Args:
        ceilings: measured in this run.
        cache: bytes of the device's last cache; inputs rotate so that it is cold.
        seconds: of timing, over all providers.
    """
    inputs = case.make(hash_of(case.label))
    judge = case.judge(inputs)
    results, fit = [], {}
    for provider in case.providers():
        result, error = _judged(case, provider, inputs, judge, device)
        results.append(result)
        if error is not None:
            fit[provider.name] = provider, result
    if fit:
        del judge
        sets = cold_copies(inputs, cache, device, case.cold)
        calls = {name: _rotating(provider.call, sets) for name, (provider, _) in fit.items()}
        timings = interleaved(calls, device=device, seconds=seconds)
        for name, (_, result) in fit.items():
            _fill(result, timings[name], case, ceilings)
    return results


def skipped(case: Case, reason: str) -> dict:
    """The one result of a case that is not measured."""
    return _result(case, None, "skipped", reason)


def hash_of(label: str) -> int:
    """A seed that is the same in every process."""
    return sum(place * byte for place, byte in enumerate(label.encode(), 1))


def _judged(
    case: Case,
    provider: Provider,
    inputs: Tensors,
    judge: Callable[[Tensors], Error],
    device: torch.device,
) -> tuple[dict, Error | None]:
    """The result so far, and its error where the provider may be timed."""
    if provider.missing:
        return _result(case, provider, "unavailable", provider.missing), None
    try:
        # What torch.compile made would be compiled again without the poison.
        with contextlib.nullcontext() if provider.role == "compile" else poisoned():
            error = judge(provider.call(inputs))
        peak = peak_memory(lambda: provider.call(inputs), device)
        told = _told(provider)
    except Exception as failure:  # one failing kernel is reported and the rest still run
        text = str(failure).strip().splitlines() or [""]
        return _result(case, provider, "failed", f"{type(failure).__name__}: {text[0]}"[:300]), None
    value = error.value if math.isfinite(error.value) else None
    entry = {"value": value, "limit": error.limit, "measure": error.measure}
    if not error.passed:
        reason = f"error {error.value:.3g}, limit {error.limit:.3g} ({error.measure})"
        return _result(case, provider, "wrong", reason) | {"error": entry}, None
    result = _result(case, provider, "ok", provider.note) | told
    return result | {"error": entry, "peak_memory": peak}, error


def _told(provider: Provider) -> dict:
    """What a provider itself tells of a whole model."""
    asked = {name: getattr(provider, name) for name in records.OF_MODELS}
    return {name: ask() for name, ask in asked.items() if ask is not None}


def _result(case: Case, provider: Provider | None, status: str, reason: str | None) -> dict:
    return {
        "kind": "result",
        "op": case.op,
        "case": case.label,
        "models": list(case.models),
        "projection": case.projection,
        "shape": dict(case.shape),
        "dtype": case.dtype,
        "provider": provider and provider.name,
        "role": provider and provider.role,
        "status": status,
        "reason": reason,
        **dict(zip(records.SPEED, repeat(None))),
        "flop": sum(piece.flop for piece in case.work),
        "bytes": sum(piece.read + piece.write for piece in case.work),
        "peak_memory": None,
        "error": None,
    }


def _fill(result: dict, timing: Timing, case: Case, ceilings: Ceilings) -> None:
    least, binding = floor(case.work, ceilings, case.dtype)
    result |= {
        "median": timing.median,
        "p20": timing.p20,
        "p80": timing.p80,
        "runs": timing.runs,
        "graph": timing.graph,
        "share": least / timing.median,
        "ceiling": binding,
    }


def cold_copies(
    inputs: Tensors, cache: int, device: torch.device, read: tuple[str, ...] = ()
) -> list[Tensors]:
    """Enough sets of the same inputs that the cache has lost the first when its turn comes.

    ``read`` names the inputs that a provider reads at least, of all where it is empty.
    """
    size = sum(tensor.nbytes for tensor in inputs.values())
    least = sum(inputs[name].nbytes for name in read or inputs)
    wanted = min(_MOST_SETS, 1 + -(-_COLD * cache // max(1, least)))
    allowed = max(1, _MOST_SET_BYTES[device.type] // max(1, size))
    copies = range(min(wanted, allowed) - 1)
    return [inputs, *({name: t.clone() for name, t in inputs.items()} for _ in copies)]


def _rotating(call: Callable[[Tensors], object], sets: list[Tensors]) -> Callable[[int], object]:
    return lambda number: call(sets[number % len(sets)])


@contextlib.contextmanager
def poisoned():
    """Fill what is allocated with NaN or the largest integer: what is not written is then seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # operations that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call needs at once beyond what was there; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc would serve the call from what it kept
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := present
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc")
