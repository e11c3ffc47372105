"""What a training run trains: chosen weights, or a LoRA, from its configuration.

``adapter`` of a run's configuration is one of

    {"kind": "sparse", "at": "super weights", "k": k, "radius": 0}
    {"kind": "sparse", "at": "random", "k": k, "avoid": how many of the largest}
    {"kind": "lora", "targets": "attention" | "down_proj", ...}: see ``adapters_lora``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from swkernels.errors import InvalidInput
from swkernels.train import Coordinates, sparse, weight_change
from swkernels.train.loop import Trainable

from .lab import Lab


@dataclass(frozen=True)
class Adapted:
    """An adapter that can be trained.

    Attributes:
        trainable: for ``swkernels.train.loop.fit``.
        parameters: how many values are trained.
        describe: called once it is trained; more figures for the record.
    """

    trainable: Trainable
    parameters: int
    describe: Callable[[], dict]


def adapt(lab: Lab, model: nn.Module, adapter: dict, seed: int) -> Adapted:
    """Put an adapter on ``model``, a copy that is the caller's."""
    return _KINDS[adapter["kind"]](lab, model, adapter, seed)


def _sparse(lab: Lab, model: nn.Module, adapter: dict, seed: int) -> Adapted:
    coordinates = positions(lab, adapter, seed)
    handle = sparse(model, coordinates)
    change = lambda: {"change": weight_change(lab.model, model, coordinates).summary}  # noqa: E731
    return Adapted(handle, len(coordinates), change)


def positions(lab: Lab, adapter: dict, seed: int) -> Coordinates:
    """The weights that a sparse adapter trains."""
    k = adapter["k"]
    if adapter["at"] == "random":
        return Coordinates.random(lab.model, k, exclude=lab.top(adapter["avoid"]), seed=seed)
    chosen = lab.top(k)
    return chosen.neighborhood(adapter["radius"]) if adapter["radius"] else chosen


def _lora(lab: Lab, model: nn.Module, adapter: dict, seed: int) -> Adapted:
    from .adapters_lora import lora  # needs PEFT

    return lora(lab, model, adapter, seed)


def check_attention(model: nn.Module) -> None:
    """Say before anything is trained what LoRA cannot be studied without.

    Raises:
        InvalidInput: PEFT is not installed, or the model has no attention projections.
    """
    try:
        from swkernels.integrations import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidInput(
            "studies of LoRA need PEFT: pip install 'swkernels[peft]', or leave them out"
        ) from error
    from .adapters_lora import targets

    targets(model, "attention")


_KINDS = {"sparse": _sparse, "lora": _lora}
