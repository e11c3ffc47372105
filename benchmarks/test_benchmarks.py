"""The quick cases under pytest-benchmark, for those who prefer its tables and comparisons.

    pytest benchmarks/ [-k column_absmax] [--benchmark-json FILE]

The same inputs, providers and gate as ``python -m benchmarks.run``, which makes the records; here
every provider is timed by itself, not interleaved with the others.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import machine
from benchmarks.measure import cold_copies, hash_of, poisoned
from benchmarks.suites import cases

SUITE = "gpu" if torch.cuda.is_available() else "cpu"
DEVICE = machine.device(SUITE, dry=False)
LARGEST = 100e6 if SUITE == "cpu" else 4e9  # bytes that a case reads and writes
PAIRS = [
    pytest.param(case, provider.name, id=f"{case.op}: {case.label}: {provider.name}")
    for case in cases(SUITE, DEVICE, quick=True)
    if sum(piece.read + piece.write for piece in case.work) <= LARGEST
    for provider in case.providers()
]


@pytest.fixture(scope="module")
def prepared(request):
    """A case with its inputs, enough copies of them to keep the cache cold, judge, providers."""
    case = request.param
    with torch.no_grad():
        inputs = case.make(hash_of(case.label))
        cache = machine.describe(DEVICE)["cache_bytes"]
        sets = cold_copies(inputs, cache, DEVICE, case.cold)
        providers = {provider.name: provider for provider in case.providers()}
        return case, sets, case.judge(inputs), providers


@pytest.mark.parametrize(("prepared", "name"), PAIRS, indirect=["prepared"], scope="module")
def test_speed(benchmark, prepared, name):
    case, sets, judge, providers = prepared
    provider = providers[name]
    if provider.missing:
        pytest.skip(provider.missing)
    with torch.no_grad():
        with poisoned():
            error = judge(provider.call(sets[0]))
        assert error.passed, f"{error.value} is over {error.limit} ({error.measure})"
        turn = itertools.count()
        benchmark.group = f"{case.op}: {case.label}"

        def call():
            provider.call(sets[next(turn) % len(sets)])
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.pedantic(call, rounds=20, warmup_rounds=2)
