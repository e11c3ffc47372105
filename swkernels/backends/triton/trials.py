"""What `swkernels tune` runs: each operation on inputs of its own, its check, the library's way."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F

from swkernels import tuning
from swkernels.backends.reference import column_absmax as reference

from . import column_absmax, glu_absmax, linear_absmax
from .candidates import Candidate
from .tasks import Task

_SEED = 0
_CHECKED_ROWS = 64  # of a result at least, held against float64
_CHECKED_EVERY = 64  # rows: one of each tile
_COLD = 3  # the sets of inputs together are this many times the cache
_MOST_SETS = 32  # as many as one sample of `swkernels.timing` passes over


class Trial(ABC):
    """Inputs of one task, and what can be done with them.

    Inputs are numbered sets of equal values, enough of them that the device's cache is cold.

    Args:
        sets: the number of sets; None goes by the cache.
    """

    kernel: object  # the Triton function that the candidates launch
    activations = 1  # how many of the inputs, from the first, have a row for each token

    def __init__(self, task: Task, device: torch.device, *, sets: int | None = None):
        self.task = task
        self._dtype = torch.float32 if task.dtype == "tfloat32" else getattr(torch, task.dtype)
        self._device = device
        self._generator = torch.Generator(device).manual_seed(_SEED)
        first = self._make()
        sets = _cold_sets(first, device) if sets is None else sets
        self._inputs = [first, *(tuple(t.clone() for t in first) for _ in range(sets - 1))]
        self._keys = self._no_keys()

    def run(self, candidate: Candidate, number: int):
        """Run `candidate` on input set `number` (modulo their number) and return its result."""
        with tuning.use(self.task.record(candidate.variant, candidate.config)):
            return self._run(candidate, self._inputs[number % len(self._inputs)], self._keys)

    def library(self, number: int):
        """The library's way to the same result, without what it does not do."""
        return self._library(*self._inputs[number % len(self._inputs)])

    def wrong(self, candidate: Candidate) -> str | None:
        """Return what is wrong with the result of `candidate`, or None. Poisons allocations."""
        keys = self._no_keys()
        with poisoned(), tuning.use(self.task.record(candidate.variant, candidate.config)):
            result = self._run(candidate, self._inputs[0], keys)
        return self._wrong(result, keys)

    @abstractmethod
    def _make(self) -> tuple[torch.Tensor, ...]: ...

    @abstractmethod
    def _run(self, candidate: Candidate, inputs: tuple, keys: tuple): ...

    @abstractmethod
    def _library(self, *inputs: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _wrong(self, result, keys: tuple) -> str | None: ...

    def _channels(self) -> tuple[int, ...]:
        return (self.task.columns,)

    def _no_keys(self) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.zeros(channels, dtype=torch.int64, device=self._device)
            for channels in self._channels()
        )

    def _normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, dtype=self._dtype, device=self._device, generator=self._generator)
        return made.mul_(scale)

    def _wrong_peaks(self, name: str, keys: torch.Tensor, expected: torch.Tensor) -> str | None:
        wrong = int((keys != expected).sum())
        return f"wrong: {wrong} of {len(keys)} peaks of {name}" if wrong else None

    def _wrong_values(self, name: str, result: torch.Tensor) -> str | None:
        """Hold rows of `result` against float64, by the library's own error."""
        exact, limit = self._exact
        error = (result[self._rows] - exact).abs().max().item()
        if error <= limit:  # false for NaN too
            return None
        return f"wrong: error of {name} is {error:.3g}, twice the library's is {limit:.3g}"

    @cached_property
    def _exact(self) -> tuple[torch.Tensor, float]:
        """The checked rows of the result in float64, and the largest error that is allowed."""
        inputs = list(self._inputs[0])
        inputs[: self.activations] = [t[self._rows] for t in inputs[: self.activations]]
        exact = self._library(*(tensor.double() for tensor in inputs))
        return exact, 2 * (self.library(0)[self._rows] - exact).abs().max().item()

    @cached_property
    def _input_peaks(self) -> torch.Tensor:
        return _peaks(self._inputs[0][0])

    @cached_property
    def _rows(self) -> torch.Tensor:
        """Rows to check, from the first to the last, no more than _CHECKED_EVERY apart."""
        tokens = self.task.tokens
        count = max(_CHECKED_ROWS, -(-tokens // _CHECKED_EVERY) + 1)
        spread = torch.linspace(0, tokens - 1, min(tokens, count), dtype=torch.float64)
        return spread.round().long().to(self._device)


class _ColumnAbsmax(Trial):
    kernel = column_absmax.column_absmax_kernel

    def _make(self):
        return (self._normal(self.task.tokens, self.task.columns),)

    def _run(self, candidate, inputs, keys):
        column_absmax.column_absmax(*inputs, *keys, None, 0)

    def _library(self, x):
        return x.abs().amax(0)

    def _wrong(self, result, keys):
        return self._wrong_peaks("x", *keys, self._input_peaks)


class _GluAbsmax(Trial):
    kernel = glu_absmax.glu_absmax_kernel
    activations = 2

    def _make(self):
        shape = self.task.tokens, self.task.columns
        return self._normal(*shape), self._normal(*shape)

    def _run(self, candidate, inputs, keys):
        return glu_absmax.glu_absmax(*inputs, "silu", *keys, None, 0)

    def _library(self, gate, up):
        return F.silu(gate) * up

    def _wrong(self, result, keys):
        return self._wrong_values("h", result) or self._wrong_peaks("h", *keys, _peaks(result))


class _LinearAbsmax(Trial):
    kernel = linear_absmax.linear_absmax_kernel

    def _make(self):
        task = self.task
        weight = self._normal(task.rows, task.columns, scale=task.columns**-0.5)
        return self._normal(task.tokens, task.columns), weight

    def _channels(self):
        return self.task.columns, self.task.rows

    def _run(self, candidate, inputs, keys):
        arguments = (*inputs, None, *keys, None, 0)
        if candidate.variant == "two_pass":
            return linear_absmax.two_pass(*arguments)
        descriptors = candidate.variant == "descriptors"
        return linear_absmax.fused_linear_absmax(*arguments, descriptors=descriptors)

    def _library(self, x, weight):
        return F.linear(x, weight)

    def _wrong(self, result, keys):
        wrong = self._wrong_values("y", result)
        wrong = wrong or self._wrong_peaks("x", keys[0], self._input_peaks)
        return wrong or self._wrong_peaks("y", keys[1], _peaks(result))


TRIALS: dict[str, type[Trial]] = {
    "column_absmax": _ColumnAbsmax,
    "glu_absmax": _GluAbsmax,
    "linear_absmax": _LinearAbsmax,
}


def _peaks(tensor: torch.Tensor) -> torch.Tensor:
    keys = torch.zeros(tensor.shape[1], dtype=torch.int64, device=tensor.device)
    reference.column_absmax(tensor, keys, None, 0)
    return keys


def _cold_sets(inputs: tuple[torch.Tensor, ...], device: torch.device) -> int:
    if device.type == "cpu":
        return 1  # Triton's interpreter: no cache matters
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MOST_SETS, -(-_COLD * cache // size)))


@contextmanager
def poisoned() -> Iterator[None]:
    """Let `torch.empty` give NaN: an element that a kernel leaves unwritten is then seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of operations that may not repeat
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let float32 be multiplied as `dtype` says: as TF32 for "tfloat32", exactly otherwise."""
    matmul = torch.backends.cuda.matmul
    wanted = dtype == "tfloat32"
    if getattr(matmul, "fp32_precision", None) is None:  # PyTorch < 2.9
        name, value = "allow_tf32", wanted
    else:
        name, value = "fp32_precision", "tf32" if wanted else "ieee"
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
