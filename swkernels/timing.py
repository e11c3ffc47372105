"""Time variants against each other in one process: interleaved, cold cache, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_WARM_UP_SECONDS = 0.02
_SAMPLE_SECONDS = 300e-6  # shorter work is repeated inside one sample
_FEWEST = 3


@dataclass(frozen=True)
class Timing:
    """What one variant took.

    Attributes:
        median, p20, p80: seconds of one call.
        runs: samples taken.
        graph: whether a CUDA graph was replayed, so that no launch from Python is counted.
    """

    median: float
    p20: float
    p80: float
    runs: int
    graph: bool


def interleaved(
    variants: dict[str, Callable[[int], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    most: int = 200,
) -> dict[str, Timing]:
    """Time every variant once a round, in an order that turns by one each round.

    A variant is called with a running number, by which it picks one of several sets of inputs:
    enough sets that the cache has forgotten the first when it comes again. On a GPU the calls of
    a sample are captured in a CUDA graph where the variant allows it.

    Args:
        variants: name -> function of the running number.
        device: where the variants work.
        seconds: for all rounds together; at least three rounds run, however long they take.
        most: rounds at most.

    Returns:
        A ``Timing`` for each variant.
    """
    device = torch.device(device)
    make = _OnGpu if device.type == "cuda" else _OnHost
    samplers = {name: make(call, device) for name, call in variants.items()}
    one_round = sum(sampler.seconds for sampler in samplers.values())
    rounds = max(_FEWEST, min(most, int(seconds / max(one_round, 1e-9))))
    names = list(samplers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(samplers[name].sample())
    return {name: _timing(times[name], samplers[name].graph) for name in names}


def _timing(samples: list[float], graph: bool) -> Timing:
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), p20, p80, len(samples), graph)


class _OnHost:
    """Wall-clock time of calls. Attribute ``seconds``: what one sample takes, roughly."""

    graph = False

    def __init__(self, call: Callable[[int], object], device: torch.device):
        self._call = call
        spent, self._number = _warm_up(call, lambda: None)
        self._calls = _calls_a_sample(spent)
        self.seconds = spent * self._calls

    def sample(self) -> float:
        first = self._number
        self._number += self._calls
        start = time.perf_counter()
        for number in range(first, self._number):
            self._call(number)
        return (time.perf_counter() - start) / self._calls


class _OnGpu:
    """Device time of calls between two events, from a CUDA graph where one can be captured."""

    _GRAPH_CALLS = 32  # inputs that a graph passes over: more than one turn of the input sets

    def __init__(self, call: Callable[[int], object], device: torch.device):
        self._call = call
        self._device = device
        spent, self._number = _warm_up(call, lambda: torch.cuda.synchronize(device))
        self._calls = min(self._GRAPH_CALLS, max(_calls_a_sample(spent), 8))
        if spent > 0.01:
            self._calls = 1
        self._graph = self._capture()
        self.graph = self._graph is not None
        self.seconds = spent * self._calls
        self.sample()
        self.seconds = self.sample() * self._calls

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The calls of one sample as a graph; None where one of them does not allow it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                self._calls_once()
        except RuntimeError:  # a synchronisation or an allocation that capture forbids
            torch.cuda.synchronize(self._device)
            return None
        return graph

    def _calls_once(self) -> None:
        for number in range(self._number, self._number + self._calls):
            self._call(number)

    def sample(self) -> float:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._calls_once()
                self._number += self._calls
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._calls


def _warm_up(call: Callable[[int], object], wait: Callable[[], None]) -> tuple[float, int]:
    """Call until compilation and caches have settled; return the seconds of a late call, and how
    many there were."""
    call(0)
    wait()
    number = 1
    begun = now = time.perf_counter()
    while now - begun <= _WARM_UP_SECONDS:
        start = now
        call(number)
        wait()
        number, now = number + 1, time.perf_counter()
    return now - start, number


def _calls_a_sample(seconds: float) -> int:
    return max(1, min(64, int(_SAMPLE_SECONDS / max(seconds, 1e-9))))
