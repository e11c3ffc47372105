"""Coordinates: exactly which entries of which weights are trained, frozen or measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from swkernels.errors import InvalidInput

from . import files
from .published import find_entry, sites_of
from .selection import draw_random, largest_magnitudes, neighborhood, of_report
from .weights import Site, as_site, down_projection_shapes, find_weights, nearest

__all__ = ["Coordinates", "Site", "down_projection_shapes"]


@dataclass(frozen=True, eq=False, repr=False)
class Coordinates:
    """Entries of the weights of a model, at least one.

    The constructor checks and sorts; ``of``, ``from_report``, ``from_catalogue``,
    ``from_magnitude``, ``random`` and ``load`` are more convenient.

    Attributes:
        weights: by site, int32 [k, 2] on the CPU: row (output channel) and column (input channel)
            of each coordinate, sorted by row, then column, all different, k >= 1. A site is the
            path of the module that owns the weight, and an expert of it where experts are fused.
        shapes: by site, (D, H) of the weight, whichever way it is stored.
    """

    weights: Mapping[Site, torch.Tensor]
    shapes: Mapping[Site, tuple[int, int]]

    def __post_init__(self):
        shapes = {as_site(key): _shape(key, shape) for key, shape in _items(self.shapes)}
        weights: dict[Site, torch.Tensor] = {}
        for key, listed in _items(self.weights):
            site = as_site(key)
            if site in weights:
                raise InvalidInput(f"{site} is listed twice: put its coordinates together")
            if site not in shapes:
                near = nearest(site.name, [known.name for known in shapes])
                raise InvalidInput(f"there is no shape for {site}{near}")
            weights[site] = _checked(site, listed, shapes[site])
        if not weights:
            raise InvalidInput("there is no coordinate: expected one at least")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "shapes", {site: shapes[site] for site in weights})

    @classmethod
    def of(
        cls,
        weights: Mapping[str | tuple[str, int | None], object],
        where: nn.Module | Mapping[Site, tuple[int, int]],
    ) -> Coordinates:
        """List coordinates by hand.

        Args:
            weights: by name or (name, expert), the coordinates [k, 2] of each weight: lists,
                an array or a tensor of integers, in any order.
            where: the model, or (D, H) of each weight.

        Raises:
            InvalidInput: a weight that is not there, no coordinate, one outside its weight or
                listed twice, or indices that are no integers.
        """
        if isinstance(where, nn.Module):
            where = {weight.site: weight.shape for weight in find_weights(where, weights)}
            for site in map(as_site, weights):
                if site not in where:  # all its experts are there in its place
                    raise InvalidInput(
                        f"{site} holds several experts: name one of them, as (name, expert)"
                    )
        return cls(weights, where)

    @classmethod
    def from_report(
        cls, report: object, verdicts: Iterable[str] = ("super weight", "part of a critical set")
    ) -> Coordinates:
        """Take what a scan found: by default super weights and the members of critical sets.

        Args:
            report: a ``ScanReport``, its document, or the path of its JSON (docs/report.md).
            verdicts: which candidates to take.

        Raises:
            InvalidInput: no report, an unknown verdict, or no candidate with such a verdict.
        """
        return cls(*of_report(report, verdicts))

    @classmethod
    def from_catalogue(cls, model_id: str, model: nn.Module | None = None) -> Coordinates:
        """Take the published super weights of a model; see ``swkernels.train.catalogue``.

        Args:
            model_id: on the Hugging Face hub, or its last part; case does not matter.
            model: checked to have these weights, and asked for their names. Without it they are
                those that transformers gives them.

        Raises:
            InvalidInput: not in the catalogue (the message names the nearest), or another model.
        """
        return cls(*sites_of(find_entry(model_id), model))

    @classmethod
    def from_magnitude(
        cls, model: nn.Module, k: int, modules: Iterable[str | tuple] | None = None
    ) -> Coordinates:
        """Take the k entries that are largest in magnitude over several weights together.

        Of equal magnitudes the first is taken: by weight, then row, then column.

        Args:
            model: its weights must be in memory, neither packed nor sharded.
            k: how many, 1 to all entries.
            modules: names of linear layers, or (name, expert); None is every down projection.

        Raises:
            InvalidInput: k, a module that is not there, or a weight that holds NaN.
        """
        return cls(*largest_magnitudes(model, k, modules))

    @classmethod
    def random(
        cls,
        where: nn.Module | Mapping[Site, tuple[int, int]],
        k: int,
        exclude: Coordinates | None = None,
        seed: int = 0,
    ) -> Coordinates:
        """Draw k different coordinates, every entry of all the weights being equally likely.

        Args:
            where: a model, for all its down projections, or (D, H) of each weight.
            k: how many, 1 to all that are not excluded.
            exclude: coordinates that are never drawn; weights of it that are not in ``where``
                do not count, but one must be.
            seed: the same seed draws the same from the same weights.

        Raises:
            InvalidInput: k, or what is excluded belongs to other weights.
        """
        if isinstance(where, nn.Module):
            where = down_projection_shapes(where)
        shapes = {as_site(key): _shape(key, shape) for key, shape in _items(where)}
        if exclude is not None:
            _check_shapes(shapes, exclude.shapes)
        return cls(draw_random(shapes, k, exclude and exclude.weights, seed), shapes)

    @classmethod
    def load(cls, path: str | Path) -> Coordinates:
        """Read a file that ``save`` wrote.

        Raises:
            InvalidInput: unreadable, of another format, or its coordinates are wrong.
        """
        weights, shapes = files.read(path)
        try:
            return cls(weights, shapes)
        except InvalidInput as error:
            raise InvalidInput(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a .json or .safetensors file, by the suffix; aside, and then renamed.

        Raises:
            InvalidInput: another suffix, or a folder that cannot be written.
        """
        files.write(path, self.weights, self.shapes)

    def neighborhood(self, radius: int) -> Coordinates:
        """Return every coordinate within ``radius`` rows and columns, these included.

        Squares of (2 radius + 1) x (2 radius + 1) are clipped at the border of the weight; where
        they overlap a coordinate counts once.

        Raises:
            InvalidInput: ``radius`` is no integer from 0.
        """
        return Coordinates(neighborhood(self.weights, self.shapes, radius), self.shapes)

    def __len__(self) -> int:
        return sum(len(listed) for listed in self.weights.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Coordinates):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(listed, other.weights[site]) for site, listed in self.weights.items()
        )

    __hash__ = None

    def __or__(self, other: Coordinates) -> Coordinates:
        """Coordinates of either; raises InvalidInput where a weight has two shapes."""
        if not isinstance(other, Coordinates):
            return NotImplemented
        _check_same_shapes(self.shapes, other.shapes)
        united = dict(self.weights)
        for site, listed in other.weights.items():
            both = torch.cat([united[site], listed]) if site in united else listed
            united[site] = both.unique(dim=0)
        return Coordinates(united, {**self.shapes, **other.shapes})

    def __sub__(self, other: Coordinates) -> Coordinates:
        """Coordinates that are not in ``other``; raises InvalidInput if none are left."""
        if not isinstance(other, Coordinates):
            return NotImplemented
        _check_same_shapes(self.shapes, other.shapes)
        left = {}
        for site, listed in self.weights.items():
            if site in other.weights:
                H = self.shapes[site][1]
                taken = torch.isin(_flat(listed, H), _flat(other.weights[site], H))
                listed = listed[~taken]
            if len(listed):
                left[site] = listed
        if not left:
            raise InvalidInput("no coordinate is left: all of them were taken away")
        return Coordinates(left, self.shapes)

    def __repr__(self) -> str:
        weights = len(self.weights)
        return f"Coordinates({len(self)} in {weights} weight{'s' if weights > 1 else ''})"


def _items(pairs) -> Iterable[tuple]:
    """Pairs of a mapping, or of a list of pairs (a file may name a site twice)."""
    return pairs.items() if isinstance(pairs, Mapping) else pairs


def _shape(key: object, shape: object) -> tuple[int, int]:
    sizes = tuple(shape) if isinstance(shape, Iterable) else ()
    whole = all(isinstance(size, int) and 0 < size < 2**31 for size in sizes)
    if len(sizes) != 2 or not whole:
        raise InvalidInput(f"expected the shape (D, H) of {key!r:.200}, got {shape!r:.200}")
    return sizes


def _checked(site: Site, listed: object, shape: tuple[int, int]) -> torch.Tensor:
    """Return the coordinates int32 [k, 2], sorted, or raise."""
    try:
        given = torch.as_tensor(listed).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(
            f"the coordinates of {site} must be integers [k, 2] (row, column): {error}"
        ) from error
    if given.numel() == 0:
        raise InvalidInput(f"there is no coordinate of {site}: list one, or leave the weight out")
    is_integer = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not is_integer or given.dim() != 2 or given.shape[1] != 2:
        raise InvalidInput(
            f"the coordinates of {site} must be integers [k, 2] (row, column), got {given.dtype} "
            f"{list(given.shape)}"
        )
    given = given.to("cpu", torch.int64)
    outside = (given < 0) | (given >= torch.tensor(shape))
    if outside.any():
        row, col = given[outside.any(1)][0].tolist()
        raise InvalidInput(f"coordinate [{row}, {col}] lies outside {site}, which is {list(shape)}")
    H = shape[1]
    flat = _flat(given, H).sort().values
    twice = flat[1:][flat[1:] == flat[:-1]]
    if len(twice):
        raise InvalidInput(
            f"coordinate [{int(twice[0]) // H}, {int(twice[0]) % H}] of {site} is listed more "
            "than once"
        )
    return torch.stack([flat // H, flat % H], 1).int()


def _flat(listed: torch.Tensor, H: int) -> torch.Tensor:
    return listed[:, 0].long() * H + listed[:, 1].long()


def _check_same_shapes(ours: Mapping, theirs: Mapping) -> None:
    for site in ours.keys() & theirs.keys():
        if ours[site] != theirs[site]:
            raise InvalidInput(
                f"{site} is {list(ours[site])} here and {list(theirs[site])} there: these are "
                "coordinates of different models"
            )


def _check_shapes(shapes: Mapping, excluded: Mapping) -> None:
    _check_same_shapes(shapes, excluded)
    if not shapes.keys() & excluded.keys():
        name = next(iter(excluded)).name
        raise InvalidInput(
            f"none of the weights to draw from is excluded from, but {name} is"
            f"{nearest(name, [site.name for site in shapes])}"
        )
