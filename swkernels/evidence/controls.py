"""Random weights to compare with: as many of the same matrices, or as large ones from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates
from swkernels.train.weights import Site, Weight, down_projection_weights

from .edits import Entry

NEAREST = 100  # weights nearest in magnitude, of which one is drawn
_ROUNDS = 32  # of blind draws from a matrix, before its usable entries are listed
_BLOCK = 1 << 22  # elements looked at together

Place = tuple[Site, int, int]


def of_equal_size(
    entries: Sequence[Entry], draws: int, seed: int, exclude: Sequence[Entry] = ()
) -> list[Coordinates]:
    """Draw as many random entries of each matrix as ``entries`` has there.

    Args:
        entries: never drawn themselves.
        draws: how many sets, each independent of the others.
        seed: the same seed draws the same from the same weights.
        exclude: also never drawn. Zeros and NaN are not, either.

    Raises:
        InvalidInput: a matrix has too few other entries.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = {(e.site, e.row, e.column) for e in (*entries, *exclude)}
    wanted: dict[Site, list[Entry]] = {}
    for entry in entries:
        wanted.setdefault(entry.site, []).append(entry)
    found = []
    for _ in range(draws):
        places = []
        for inside in wanted.values():
            places += _draw(inside[0].weight, len(inside), taken, generator)
        found.append(_coordinates(places, [e.weight for e in entries]))
    return found


def _draw(weight: Weight, count: int, taken: set[Place], generator) -> list[Place]:
    """Draw different entries of one matrix, all being equally likely, none zero, NaN or taken."""
    matrix, H = weight.matrix(), weight.shape[1]
    found: dict[Place, None] = {}
    for _ in range(_ROUNDS):
        flat = torch.randint(matrix.numel(), (2 * count + 8,), generator=generator)
        rows, columns = (flat // H).to(matrix.device), (flat % H).to(matrix.device)
        values = matrix[rows, columns].tolist()
        for place, value in zip(flat.tolist(), values):
            place = (weight.site, *divmod(place, H))
            if value != 0 and value == value and place not in taken:
                found.setdefault(place)
        if len(found) >= count:
            return list(found)[:count]
    usable = ((matrix != 0) & ~matrix.isnan()).nonzero().tolist()
    left = [(weight.site, *place) for place in usable]
    left = [place for place in left if place not in taken]
    if len(left) < count:
        raise InvalidInput(
            f"{weight.site} has {len(left)} nonzero entries beside the set: no random {count} can "
            "be drawn; leave out the random controls"
        )
    order = torch.randperm(len(left), generator=generator)[:count]
    return [left[i] for i in order.tolist()]


def of_equal_magnitude(
    model: nn.Module,
    entries: Sequence[Entry],
    draws: int,
    seed: int,
    exclude: Sequence[Entry] = (),
) -> list[tuple[Coordinates, float]]:
    """Draw for each entry one of the weights that are nearest to it in magnitude.

    The 100 nearest (more, if there are many entries) among all down projections of the model that
    are in memory are found in one pass over each for each entry; ties go to the first.

    Args:
        model, entries, draws, seed, exclude: as in ``of_equal_size``.

    Returns:
        Of each draw its coordinates, and how well they match: the median over entries of the
        smaller of the two magnitudes over the larger. A super weight is often the largest weight
        of its model; then all others are smaller, and this says by how much.

    Raises:
        InvalidInput: the down projections have too few other entries.
        ProjectionNotFound: the model has no down projection.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = {(e.site, e.row, e.column) for e in (*entries, *exclude)}
    weights = _in_memory(model)
    pools = _nearest(weights, entries, taken, NEAREST + len(entries))
    found = []
    for _ in range(draws):
        chosen: dict[Place, float] = {}
        for entry, pool in zip(entries, pools):
            free = [(place, size) for place, size in pool if place not in chosen]
            if not free:
                raise InvalidInput(
                    f"the down projections have too few nonzero entries beside the set to match "
                    f"{entry.label}; leave out the controls of equal magnitude"
                )
            free = free[:NEAREST]
            place, size = free[int(torch.randint(len(free), (1,), generator=generator))]
            ours = abs(entry.value)
            chosen[place] = min(ours, size) / max(ours, size)
        found.append((_coordinates(list(chosen), weights), median(chosen.values())))
    return found


def _in_memory(model: nn.Module) -> list[Weight]:
    """The down projections that can be read as they are; packed ones cannot be zeroed."""
    found = []
    for weight in down_projection_weights(model):
        try:
            weight.matrix()
        except InvalidInput:
            continue
        found.append(weight)
    return found


def _nearest(
    weights: Sequence[Weight], entries: Sequence[Entry], taken: set[Place], count: int
) -> list[list[tuple[Place, float]]]:
    """Of each entry the ``count`` places nearest in magnitude, nearest first, with magnitudes."""
    pools: list[list[tuple[float, Place, float]]] = [[] for _ in entries]  # (distance, ...)
    for weight in weights:
        D, H = weight.shape
        rows = max(1, _BLOCK // H)
        skip = [(row, column) for site, row, column in taken if site == weight.site]
        for first, block in zip(range(0, D, rows), weight.matrix().split(rows)):
            size = block.abs().float()  # [rows, H]
            for row, column in skip:
                if first <= row < first + len(block):
                    size[row - first, column] = 0
            for pool, entry in zip(pools, entries):
                within = pool[-1][0] if len(pool) == count else math.inf
                pool += [
                    (distance, (weight.site, first + row, column), value)
                    for distance, row, column, value in _near(size, entry, within, count)
                ]
                pool.sort(key=lambda found: found[0])  # stable: the first of equals stays first
                del pool[count:]
    return [[(place, size) for _, place, size in pool] for pool in pools]


def _near(size: torch.Tensor, entry: Entry, within: float, count: int) -> list[tuple]:
    """(distance, row, column, magnitude) of those nearer than ``within``, nearest first.

    Args:
        size: magnitudes float32 [rows, H]; zero and NaN do not take part.
        count: at most so many.
    """
    target = min(abs(entry.value), torch.finfo(torch.float32).max)
    distance = (size - target).abs_()
    near = (distance < within) & (size > 0)
    inside = distance[near]
    if len(inside) > count:
        near &= distance <= inside.kthvalue(count).values
    places = near.nonzero()  # [n, 2], by position
    order = distance[near].argsort(stable=True)[:count]
    listed = distance[near][order].tolist(), places[order].tolist(), size[near][order].tolist()
    return [(apart, *place, value) for apart, place, value in zip(*listed)]


def _coordinates(places: Sequence[Place], weights: Sequence[Weight]) -> Coordinates:
    by_site: dict[Site, list[tuple[int, int]]] = {}
    for site, row, column in places:
        by_site.setdefault(site, []).append((row, column))
    return Coordinates(by_site, {weight.site: weight.shape for weight in weights})


__all__ = ["NEAREST", "of_equal_magnitude", "of_equal_size"]
