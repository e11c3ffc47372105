"""What training did to chosen weights: how far they moved, and whether they still stand out.

The statistics are those of the weight-change analysis in arXiv 2607.08733 (section 3.3, tables 9
and 10). It prints no formulas; these are ours:

    delta            dW = W' - W, W before and W' after
    absolute         |dW|
    relative         |dW| / |W|; 0 where neither is anything, infinite where only W is zero
    CV               standard deviation / mean over the coordinates (population, not sample)
    share above      share of the coordinates whose relative change is above the threshold
    percentile rank  of v among all n entries of its weight, in percent: 100 (number below v +
                     (number equal to v, itself counted, + 1) / 2) / n; a lone largest has 100
    local maximum    v is larger than each of its neighbours, the entries at most one row and one
                     column away: 8 inside, 5 at an edge, 3 in a corner
    neighbor ratio   v / mean of its neighbours; infinite where those are all zero, and NaN where v
                     is zero too or has no neighbours

The last three are of v = |W| ("before"), |W'| ("after") and |dW| ("delta").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from swkernels.errors import InvalidInput

from .coordinates import Coordinates
from .sources import open_weights

STATES = ("before", "after", "delta")  # what is ranked: |W|, |W'|, |dW|

_CHUNK = 1 << 22  # entries that are ranked together


@dataclass(frozen=True)
class WeightChange:
    """The result of ``weight_change``.

    Attributes:
        rows: one dictionary a coordinate, by weight, row and column: ``name``, ``expert``, ``row``,
            ``column``, ``before`` (W), ``after`` (W'), ``delta``, ``absolute``, ``relative``, and
            for each of before, after and delta ``percentile_...`` (0 to 100), ``local_maximum_...``
            (bool) and ``neighbor_ratio_...``.
        summary: ``coordinates`` and ``weights`` (how many), ``threshold``; ``absolute`` and
            ``relative``, each with ``mean``, ``median``, ``max``, ``cv``, the latter with
            ``share_above`` too; ``magnitude``, the mean of |W| ``before`` and ``after``, and its
            relative ``change``; ``percentile`` and ``neighbor_ratio`` (means) and
            ``local_maximum`` (shares, 0 to 1), each with ``before``, ``after`` and ``delta``.
    """

    rows: list[dict]
    summary: dict

    def table(self, limit: int = 20):
        """Return the summary, and the coordinates that changed most, to print with rich.

        Args:
            limit: coordinates that are listed.
        """
        from .weight_change_views import table

        return table(self, limit)

    def plot(self, path: str | Path) -> None:
        """Draw the changes to a file: .png, .svg or .pdf, by the suffix. Needs no display.

        Left the relative changes in descending order, with the threshold; right each against the
        magnitude before.

        Raises:
            InvalidInput: another suffix, or a folder that cannot be written.
        """
        from .weight_change_views import plot

        plot(self, path)


def weight_change(
    before: nn.Module | Mapping[str, torch.Tensor] | str | Path,
    after: nn.Module | Mapping[str, torch.Tensor] | str | Path,
    coordinates: Coordinates,
    *,
    threshold: float = 0.1,
) -> WeightChange:
    """Compare chosen entries of weights before and after training.

    Args:
        before, after: a model (sparse deltas that are active count, other adapters only when
            merged), a state dict, or the path of a safetensors checkpoint: a file, or a folder
            with or without an index. Of a checkpoint only the named tensors are read, one at a
            time. Any floating-point dtypes; differences are taken in float32, or in float64 where
            one of the two is.
        coordinates: which entries.
        threshold: of the relative change, 0.1 for 10 %.

    Returns:
        The figures of each coordinate and their summary; definitions in the module's docstring.

    Raises:
        InvalidInput: a weight that is not there, has another shape, is packed or sharded, or a
            threshold that is no number from 0; nothing has been computed.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise InvalidInput(f"expected a threshold from 0, 0.1 for 10 %; got {threshold!r}")
    if not isinstance(coordinates, Coordinates):
        raise InvalidInput(f"expected Coordinates, got {type(coordinates).__name__}")
    rows: list[dict] = []
    with ExitStack() as stack:
        readers = [open_weights(source, coordinates, stack) for source in (before, after)]
        for site, listed in coordinates.weights.items():
            figures = _compare(*(read(site) for read in readers), listed)
            columns = {"row": listed[:, 0].tolist(), "column": listed[:, 1].tolist(), **figures}
            owner = {"name": site.name, "expert": site.expert}
            rows += [owner | dict(zip(columns, values)) for values in zip(*columns.values())]
    return WeightChange(rows, _summarize(rows, len(coordinates.weights), float(threshold)))


def _compare(before: torch.Tensor, after: torch.Tensor, listed: torch.Tensor) -> dict[str, list]:
    """The figures of the coordinates ``listed`` [k, 2] of two matrices [D, H]."""
    after = after.to(before.device)
    dtype = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)

    def entries(state: str, index) -> torch.Tensor:
        if state == "before":
            return before[index].to(dtype)
        changed = after[index].to(dtype)
        return changed if state == "after" else changed - before[index].to(dtype)

    rows, cols = listed.to(before.device).long().unbind(1)
    figures = {state: entries(state, (rows, cols)) for state in STATES}
    absolute = figures["delta"].abs()
    relative = (absolute / figures["before"].abs()).where(absolute != 0, 0)
    near_rows, near_cols, inside = _neighbors(rows, cols, before.shape)
    more = {"absolute": absolute, "relative": relative}
    for state in STATES:
        values = figures[state].abs()
        around = entries(state, (near_rows, near_cols)).abs()  # [k, 8]
        chunks = (entries(state, part).abs().flatten() for part in _row_slices(before.shape))
        more[f"percentile_{state}"] = _percentile_ranks(values, chunks)
        more[f"local_maximum_{state}"] = ((values[:, None] > around) | ~inside).all(1)
        mean = around.double().where(inside, 0).sum(1) / inside.sum(1)
        more[f"neighbor_ratio_{state}"] = values / mean
    return {name: column.tolist() for name, column in (figures | more).items()}


def _neighbors(rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int]):
    """Rows and columns [k, 8] around each entry, and which of them are inside the matrix."""
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    down, right = torch.tensor(steps, device=rows.device).unbind(1)
    near_rows, near_cols = rows[:, None] + down, cols[:, None] + right
    D, H = shape
    inside = (near_rows >= 0) & (near_rows < D) & (near_cols >= 0) & (near_cols < H)
    return near_rows.clamp(0, D - 1), near_cols.clamp(0, H - 1), inside


def _row_slices(shape: tuple[int, int]) -> Iterator[slice]:
    D, H = shape
    rows = max(1, _CHUNK // H)
    return (slice(row, row + rows) for row in range(0, D, rows))


def _percentile_ranks(values: torch.Tensor, chunks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The percentile rank of each of ``values`` [k] among all entries; NaN ranks above all."""
    marks, place = values.nan_to_num(nan=math.inf).unique(return_inverse=True)  # ascending
    below = torch.zeros(len(marks) + 1, dtype=torch.int64, device=values.device)
    up_to = below.clone()
    for chunk in chunks:
        chunk = chunk.nan_to_num_(nan=math.inf)
        below += torch.searchsorted(marks, chunk, right=True).bincount(minlength=len(below))
        up_to += torch.searchsorted(marks, chunk).bincount(minlength=len(below))
    total = below.sum()
    below, up_to = below.cumsum(0)[place].double(), up_to.cumsum(0)[place].double()
    ranks = 100 * (below + (up_to - below + 1) / 2) / total
    return ranks.masked_fill(values.isnan(), math.nan)


def _summarize(rows: list[dict], weights: int, threshold: float) -> dict:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=np.float64)

    def means(name: str) -> dict[str, float]:
        return {state: float(column(f"{name}_{state}").mean()) for state in STATES}

    with np.errstate(invalid="ignore", divide="ignore"):
        relative = column("relative")
        before, after = (np.abs(column(state)).mean() for state in ("before", "after"))
        return {
            "coordinates": len(rows),
            "weights": weights,
            "threshold": threshold,
            "absolute": _spread(column("absolute")),
            "relative": _spread(relative) | {"share_above": float((relative > threshold).mean())},
            "magnitude": {
                "before": float(before),
                "after": float(after),
                "change": float((after - before) / before),
            },
            "percentile": means("percentile"),
            "local_maximum": means("local_maximum"),
            "neighbor_ratio": means("neighbor_ratio"),
        }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "max": float(values.max()),
        "cv": float(values.std() / values.mean()),
    }
