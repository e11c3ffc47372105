"""The entries of largest magnitude in CUDA C++, see ``csrc/cuda/topk_abs.cu``.

A key is the 31 bits of |v| as float32; a place numbers all entries. A histogram of the keys' upper
11 bits over a sample guesses a bound a little below the k-th key, and one pass collects what lies
above it. Where that is too few or too many, histograms of all entries find an exact bound, 11 bits
at a time: of the keys, then, where more entries are equal than there is room for, of their places.
What was collected is sorted, so its order does not matter and the result is the same every time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import isqrt

import torch

from swkernels.backends.reference.topk_abs import nan_error

from . import check, library

# enum swk_dtype, and how many lower bits of a key are 0 whatever the value.
_TYPES = {
    torch.float32: (0, 0),
    torch.bfloat16: (1, 16),
    torch.float16: (2, 13),
    torch.float8_e4m3fn: (3, 20),
    torch.float8_e5m2: (4, 21),
}
_BINS = 2048  # 11 bits
_SHIFTS = (20, 9, 0)  # of the digits of a key
_END = 2**63 - 1  # beyond every place

_SAMPLED_FROM = 1 << 24  # entries; fewer are counted all
_STEP = 64  # the sample is one piece of 16 KiB in so many
_ROOM = 1 << 18  # entries collected beyond 8 k


def supports(*matrices: torch.Tensor) -> str | None:
    for x in matrices:
        if x.device.type != "cuda":
            return f"it takes CUDA tensors, got {x.device}"
        if x.dtype not in _TYPES:
            return (
                f"it takes float32, bfloat16, float16, float8_e4m3fn and float8_e5m2, got {x.dtype}"
            )
        if x.numel() and all(n > 1 and step != 1 for n, step in zip(x.shape, x.stride()[::-1])):
            return f"rows or columns must be adjacent elements, got strides {x.stride()}"
    return None


def topk_abs(
    matrices: Sequence[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (values float32 [k], place int64 [k], matrix int64 [k]); place is row * H + column.

    It waits for the device. k is from 1 to the number of entries.

    Raises:
        InvalidInput: see ``reference.topk_abs.nan_error``.
    """
    with torch.cuda.device(matrices[0].device):
        return search(matrices, k, torch.cuda.current_stream().cuda_stream)


def search(
    matrices: Sequence[torch.Tensor], k: int, stream: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``topk_abs`` on the current device and a stream of it."""
    passes = _Passes(matrices, stream)
    capacity = min(passes.total, 8 * k + _ROOM)
    found = -1
    if passes.total >= _SAMPLED_FROM:
        sample = passes.count(0, _SHIFTS[0], step=_STEP)
        values, places, found = passes.gather(_guess(sample, k), _END, capacity)
    if not k <= found <= capacity:
        values, places, found = passes.gather(*_bound(passes, k, capacity), capacity)
    values, places = values[:found], places[:found]
    order = places.argsort()
    keys = values[order].view(torch.int32) & 0x7FFFFFFF
    order = order[keys.argsort(descending=True, stable=True)][:k]
    values, places = values[order], places[order]
    starts = torch.tensor(passes.starts, device=places.device)
    which = torch.searchsorted(starts, places, right=True) - 1
    return values, places - starts[which], which


def _guess(sample: list[int], k: int) -> int:
    """A bound that k entries and some more should reach, by the counts of a sample."""
    share = k // _STEP
    reached = _reach(reversed(sample), share + 4 * isqrt(share) + 16)
    return 0 if reached is None else _BINS - 1 - reached[0] << _SHIFTS[0]


def _bound(passes: _Passes, k: int, capacity: int) -> tuple[int, int]:
    """A key and a place: from k to `capacity` entries lie above the key, or at it up to the place.

    Needs k <= capacity, and k entries.
    """
    low = above = 0
    for shift in _SHIFTS:
        counts = passes.count(low, shift)
        bin, before, through = _reach(reversed(counts), k - above)
        low += len(counts) - 1 - bin << shift
        if above + through <= capacity:
            return low, _END
        above += before
        if shift <= passes.zero_bits:
            break
    first, shift = 0, max(0, passes.total.bit_length() - 11)
    while True:
        bin, before, through = _reach(passes.count(low, shift, first=first, ties=True), k - above)
        first += bin << shift
        if above + through <= capacity:
            return low, first + (1 << shift) - 1
        above += before
        shift = max(0, shift - 11)


def _reach(counts: Iterable[int], wanted: int) -> tuple[int, int, int] | None:
    """The first bin with which the sum is `wanted`, the sum before it and with it."""
    before = 0
    for bin, through in enumerate(accumulate(counts)):
        if through >= wanted:
            return bin, before, through
        before = through
    return None


class _Passes:
    """The passes over all matrices; see ``csrc/swkernels.h`` for what they do."""

    def __init__(self, matrices: Sequence[torch.Tensor], stream: int | None) -> None:
        self._matrices, self._stream = matrices, stream
        table = [[x.data_ptr(), _TYPES[x.dtype][0], *x.shape, *x.stride()] for x in matrices]
        self._table = torch.tensor(table)  # swk_matrix each
        *self.starts, self.total = accumulate((x.numel() for x in matrices), initial=0)
        self.zero_bits = min(_TYPES[x.dtype][1] for x in matrices)

    def count(
        self, low: int, shift: int, *, first: int = 0, ties: bool = False, step: int = 1
    ) -> list[int]:
        """The histogram of the keys from `low` on, or of the places where the key is `low`."""
        # The last digit of a key has 9 bits: what is above was counted with the digit before.
        bins = _BINS if ties or shift else 1 << _SHIFTS[-2]
        state = self._zeros(bins)
        self._call(
            "count", step, low, ties, first, shift, bins, state.data_ptr(), state[-1:].data_ptr()
        )
        *counts, nan = state.tolist()
        if step == 1:
            self._refuse(nan)
        return counts

    def gather(self, low: int, last: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(values, places, how many) above `low`, and at `low` up to the place `last`."""
        state = self._zeros(1)
        values = torch.empty(capacity, dtype=torch.float32, device=state.device)
        places = torch.empty(capacity, dtype=torch.int64, device=state.device)
        self._call(
            "gather", low, last, capacity, values.data_ptr(), places.data_ptr(),
            state.data_ptr(), state[-1:].data_ptr(),
        )  # fmt: skip
        found, nan = state.tolist()
        if found <= capacity:
            self._refuse(nan)
        return values, places, found

    def _zeros(self, count: int) -> torch.Tensor:
        """`count` zeros, and the place of a NaN, which is nowhere."""
        state = torch.zeros(count + 1, dtype=torch.int64, device=self._matrices[0].device)
        state[-1] = _END
        return state

    def _call(self, name: str, *arguments) -> None:
        function = getattr(library(), f"swk_cuda_topk_abs_{name}")
        status = function(self._table.data_ptr(), len(self._table), *arguments, self._stream)
        check(status, f"topk_abs of {len(self._table)} matrices, {self.total} entries")

    def _refuse(self, nan: int) -> None:
        if nan == _END:
            return
        which = bisect_right(self.starts, nan) - 1  # empty matrices start where the next does
        place = nan - self.starts[which]
        raise nan_error(which, *divmod(place, self._matrices[which].shape[1]))
