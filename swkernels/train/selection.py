"""Rules that choose coordinates: a scan's verdicts, magnitude, chance."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from swkernels import ops
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput

from .weights import Site, Weight, down_projection_weights, find_weights

_REPORT = "swkernels.scan/1"  # docs/report.md
_VERDICTS = (
    "super weight", "part of a critical set", "critical set", "mild", "inert", "candidate"
)  # fmt: skip

Listed = dict[Site, torch.Tensor]
Shapes = dict[Site, tuple[int, int]]


def of_report(report: object, verdicts: Iterable[str]) -> tuple[dict, Shapes]:
    """Return the candidates of a scan that have such a verdict; see ``Coordinates.from_report``.

    "critical set" means the members of such sets.
    """
    data = getattr(report, "data", report)
    if not isinstance(data, Mapping):
        data = ScanReport.load(data).data
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != _REPORT:
        raise InvalidInput(f"expected a report of schema {_REPORT}, got {schema!r:.200}")
    wanted = {verdicts} if isinstance(verdicts, str) else set(verdicts)
    unknown = sorted(wanted - set(_VERDICTS))
    if unknown or not wanted:
        raise InvalidInput(
            f"expected verdicts of {', '.join(_VERDICTS)}; got {', '.join(unknown) or 'none'}"
        )
    try:
        return _of_document(data, wanted)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"the report is damaged ({type(error).__name__} {error}): scan the model again"
        ) from error


def _of_document(data: Mapping, wanted: set[str]) -> tuple[dict, Shapes]:
    members = {
        member
        for found in data["sets"]
        if found["verdict"] == "critical set" and "critical set" in wanted
        for member in found["members"]
    }
    sizes = {entry["module"]: (entry["rows"], entry["columns"]) for entry in data["layers"]}
    weights: dict[Site, list[tuple[int, int]]] = {}
    shapes: Shapes = {}
    for c in data["candidates"]:
        if c["verdict"] in wanted or c["id"] in members:
            site = Site(c["module"], c["expert"] if _is_fused(c, data["layers"]) else None)
            weights.setdefault(site, []).append((c["row"], c["column"]))
            shapes[site] = sizes[c["module"]]
    if not weights:
        counts = Counter(c["verdict"] for c in data["candidates"])
        there = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        raise InvalidInput(
            f"the scan found no candidate that is {' or '.join(sorted(wanted))}; it has "
            f"{there or 'no candidate at all'}: name other verdicts, or another source"
        )
    return weights, shapes


def _is_fused(candidate: Mapping, layers: list) -> bool:
    """Whether the candidate's module holds several experts, or is the expert itself.

    A report does not say; but only a fused module has entries for several experts, and the path of
    an expert that is a module has its number, behind that of the layer.
    """
    module, expert = candidate["module"], candidate["expert"]
    if expert is None:
        return False
    if len({entry["expert"] for entry in layers if entry["module"] == module}) > 1:
        return True
    parts, layer = module.split("."), str(candidate["layer"])
    below = parts[parts.index(layer) + 1 :] if layer in parts else parts
    numbers = [re.search(r"\d+$", part) for part in below]
    return not any(found and int(found[0]) == expert for found in numbers)


def largest_magnitudes(
    model: nn.Module, k: int, modules: Iterable[str | tuple] | None
) -> tuple[Listed, Shapes]:
    """Return the k largest |W|; see ``Coordinates.from_magnitude``."""
    if modules is None:
        weights = down_projection_weights(model)
    else:
        weights = find_weights(model, [modules] if isinstance(modules, str) else modules)
    _check_count(k, sum(D * H for D, H in (weight.shape for weight in weights)), "entries")
    best = torch.zeros(0, dtype=torch.float64)  # [<= k], descending
    places = torch.zeros(0, 3, dtype=torch.int64)  # [<= k, 3]: weight, row, column
    for number, weight in enumerate(weights):
        found = _largest(weight, k)
        own = torch.stack([torch.full_like(found.row, number), found.row, found.column], 1)
        best = torch.cat([best, found.values.abs().to("cpu", torch.float64)])
        kept = best.sort(descending=True, stable=True).indices[:k]
        best, places = best[kept], torch.cat([places, own.cpu()])[kept]
    listed, shapes = {}, {}
    for number in places[:, 0].unique().tolist():
        site = weights[number].site
        listed[site], shapes[site] = places[places[:, 0] == number, 1:], weights[number].shape
    return listed, shapes


def _largest(weight: Weight, k: int) -> ops.TopK:
    matrix = weight.read()
    try:
        return ops.topk_abs(matrix, k)
    except InvalidInput as error:
        raise InvalidInput(
            f"{weight.site} holds NaN: its entries cannot be ranked; repair the checkpoint"
        ) from error


def neighborhood(weights: Mapping, shapes: Shapes, radius: int) -> Listed:
    """Return what is near the coordinates; see ``Coordinates.neighborhood``."""
    if not isinstance(radius, int) or isinstance(radius, bool) or radius < 0:
        raise InvalidInput(f"expected a radius of 0, 1, 2, ..., got {radius!r}")
    grown = {}
    for site, listed in weights.items():
        D, H = shapes[site]
        rows, cols = listed.long().unbind(1)
        rows, cols = _around(rows, radius, D)[:, :, None], _around(cols, radius, H)[:, None, :]
        inside = (rows >= 0) & (cols >= 0)  # [k, rows nearby, columns nearby]
        flat = (rows * H + cols)[inside].unique()
        grown[site] = torch.stack([flat // H, flat % H], 1)
    return grown


def _around(index: torch.Tensor, radius: int, size: int) -> torch.Tensor:
    """The indices within ``radius`` of each; -1 for those below 0 or from ``size`` on."""
    reach = min(radius, size - 1)
    near = index[:, None] + torch.arange(-reach, reach + 1)
    return near.masked_fill(near >= size, -1).clamp(min=-1)


def draw_random(shapes: Shapes, k: int, exclude: Mapping | None, seed: int) -> Listed:
    """Draw k coordinates; see ``Coordinates.random``.

    All entries of all weights are numbered, those that are excluded left out, and different
    numbers are drawn: no list of all entries is made unless more than half of them are wanted.
    """
    sizes = torch.tensor([D * H for D, H in shapes.values()], dtype=torch.int64)
    ends = sizes.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    taken = torch.zeros(0, dtype=torch.int64)
    if exclude is not None:
        parts = [
            start + exclude[site][:, 0].long() * H + exclude[site][:, 1]
            for (site, (_, H)), start in zip(shapes.items(), (ends - sizes).tolist())
            if site in exclude
        ]
        taken = torch.cat(parts)  # ascending
    _check_count(k, total - len(taken), "entries that are not excluded")
    numbers = _draw(total - len(taken), k, torch.Generator().manual_seed(seed))
    # The i-th excluded entry has taken[i] - i entries before it that are not excluded.
    before = taken - torch.arange(len(taken))
    flat = numbers + torch.searchsorted(before, numbers, right=True)
    owner = torch.searchsorted(ends, flat, right=True)
    listed = {}
    for number, (site, (D, H)) in enumerate(shapes.items()):
        own = flat[owner == number] - (ends[number] - D * H)
        if len(own):
            listed[site] = torch.stack([own // H, own % H], 1)
    return listed


def _draw(count: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """k different numbers below ``count``, ascending, every set of k equally likely."""
    if 2 * k > count:
        left = torch.ones(count, dtype=torch.bool)
        if k < count:
            left[_draw(count, count - k, generator)] = False
        return left.nonzero().flatten()
    drawn = torch.zeros(0, dtype=torch.int64)
    while True:
        fresh = torch.randint(count, (k + 16,), generator=generator)
        drawn = torch.cat([drawn, fresh])
        ascending, order = drawn.sort(stable=True)
        first = torch.ones(len(drawn), dtype=torch.bool)
        first[1:] = ascending[1:] != ascending[:-1]
        # Each number where it was drawn first: the earliest k of them are a fair draw.
        drawn = drawn[order[first].sort().values]
        if len(drawn) >= k:
            return drawn[:k].sort().values


def _check_count(k: int, most: int, what: str) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
        raise InvalidInput(f"expected k from 1 to {most}, the number of {what}; got {k!r}")
