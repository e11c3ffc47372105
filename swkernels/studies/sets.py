"""Sets of weights by name, for the studies that measure a model without them."""

from __future__ import annotations

from pathlib import PurePath

from swkernels.errors import InvalidInput
from swkernels.evidence.controls import of_equal_size
from swkernels.evidence.edits import Edits
from swkernels.train import Coordinates

from .lab import Lab

SUPER_WEIGHTS = "super weights"  # that were given or detected
CATALOGUE = "catalogue"  # that were published of this model
MAGNITUDE = "magnitude"  # the largest of all down projections
OTHERS = "magnitude, others"  # the largest that are no super weights
RANDOM = "random"  # of the same matrices as the super weights


def weights_named(lab: Lab, name: str, seed: int | None = None) -> Coordinates | None:
    """The weights of a set, as many as there are super weights in all but the catalogue's.

    Args:
        name: one of the constants above.
        seed: of ``RANDOM``.

    Returns:
        None of the catalogue, where it has nothing that fits this model.
    """
    return _SETS[name](lab, seed)


def _catalogue(lab: Lab, seed: None) -> Coordinates | None:
    """By the last part of the model's name, whose matrices must have the published shapes."""
    try:
        return Coordinates.from_catalogue(PurePath(lab.name).name, lab.model)
    except InvalidInput:
        return None


def _magnitude(lab: Lab, seed: None) -> Coordinates:
    return Coordinates.from_magnitude(lab.model, len(lab.super_weights))


def _others(lab: Lab, seed: None) -> Coordinates:
    chosen = lab.super_weights
    return lab.top(2 * len(chosen)) - chosen


def _random(lab: Lab, seed: int) -> Coordinates:
    (drawn,) = of_equal_size(Edits(lab.model, lab.super_weights).entries, 1, seed)
    return drawn


_SETS = {
    SUPER_WEIGHTS: lambda lab, seed: lab.super_weights,
    CATALOGUE: _catalogue,
    MAGNITUDE: _magnitude,
    OTHERS: _others,
    RANDOM: _random,
}
