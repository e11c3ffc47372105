"""Where the weights are that coordinates name, and how a layer of deltas is put beside each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models import DownProjection, ProjectionNotFound, find_down_projections
from swkernels.models.structure import base_of
from swkernels.nn import SparseDelta

from .coordinates import Coordinates, Site
from .experts import CHILD, adapt_experts, release_experts

# Layers whose forward makes a new tensor that nobody else reads and no backward needs: the
# contribution may be added to it in place.
_FRESH_OUTPUT = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class Target:
    """One weight [D, H] that is trained at some coordinates.

    Attributes:
        site: its name (and expert).
        module: the module whose forward uses it.
        shape: (D, H).
        projection: what ``find_down_projections`` says of it; None for another linear layer.
    """

    site: Site
    module: nn.Module
    shape: tuple[int, int]
    projection: DownProjection | None

    @property
    def child(self) -> str:
        """The name of the layer of deltas, below the module."""
        return CHILD if not self._fused else f"{CHILD}_{self.site.expert}"

    @property
    def delta(self) -> SparseDelta | None:
        """The layer of deltas that lies below the module, if any."""
        found = getattr(self.module, self.child, None)
        return found if isinstance(found, SparseDelta) else None

    def adapt(self) -> SparseDelta:
        """Put a layer of deltas below the module and let its output pass through it."""
        delta = self.delta
        if delta is None:
            delta = SparseDelta(self.shape, self.device)
            self.module.add_module(self.child, delta)
            if self._fused:
                adapt_experts(self.projection)
            else:
                fresh = type(base_of(self.module)[0]).__name__ in _FRESH_OUTPUT
                hook = _Contribution(self.child, fresh)
                delta.hook = self.module.register_forward_hook(hook, with_kwargs=True)
        return delta

    def release(self, adapter: str) -> None:
        """Take one adapter away, and the layer of deltas with the last one."""
        delta = self.delta
        delta.remove_adapter(adapter)
        if delta.values:
            return
        delattr(self.module, self.child)
        if self._fused:
            release_experts(self.projection)
        else:
            delta.hook.remove()

    @property
    def _fused(self) -> bool:
        return self.projection is not None and self.projection.experts is not None

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return next(iter(self.module.parameters())).device

    def matrix(self) -> torch.Tensor:
        """The weight as a view [D, H] that can be written.

        Raises:
            InvalidInput: it is packed, sharded or on the meta device.
        """
        if self.projection is not None:
            return self.projection.matrix(self.site.expert if self._fused else None)
        base = base_of(self.module)[0]
        weight = base.weight
        plain = not hasattr(weight, "__tensor_flatten__") and not weight.is_meta
        D, H = self.shape
        if not plain or not weight.is_floating_point() or weight.numel() != D * H:
            raise InvalidInput(
                f"{self.site.name} is packed, sharded or on the meta device "
                f"({type(weight).__name__} {weight.dtype} {list(weight.shape)}): expected a plain "
                "weight to write to"
            )
        return self.as_matrix(weight)

    def check_for_lora(self) -> None:
        """Raise InvalidInput where a LoRA file has no form for this weight."""
        transposed = _is_conv1d(base_of(self.module)[0])
        if self._fused or transposed:
            kind = "transposed (Conv1D)" if transposed else "fused with other experts"
            raise InvalidInput(f"{self.site} is {kind}: export a checkpoint instead of a LoRA")

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape, such as its gradient, as a view [D, H]."""
        if self.projection is not None:
            return self.projection.view(tensor, self.site.expert if self._fused else None)
        return tensor.T if _is_conv1d(base_of(self.module)[0]) else tensor

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return (
            base_of(self.module)[0].weight if self.projection is None else self.projection.weight
        )


class _Contribution:
    """A forward hook that adds the deltas' contribution; it holds no module, so that a deep copy
    of the model gets hooks of its own."""

    def __init__(self, child: str, fresh: bool):
        self._child = child
        self._fresh = fresh

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor):
        x = args[0] if args else next(iter(kwargs.values()))
        inplace = self._fresh and len(module._forward_hooks) == 1
        return getattr(module, self._child).add(x, output, inplace=inplace)


def find_targets(model: nn.Module, coordinates: Coordinates) -> dict[Site, Target]:
    """Find the weight of every site.

    Raises:
        InvalidInput: a module or expert that is not there, or a weight of another shape.
    """
    modules = dict(model.named_modules())
    try:
        projections = {p.name: p for p in find_down_projections(model, towers="all")}
    except ProjectionNotFound:
        projections = {}
    targets = {}
    for site in coordinates.weights:
        target = _target(site, modules, projections)
        expected = tuple(coordinates.shapes[site])
        if target.shape != expected:
            raise InvalidInput(
                f"{site.name} is {list(target.shape)} in this model, the coordinates are for "
                f"{list(expected)}: take those of this model"
            )
        targets[site] = target
    return targets


def _target(site: Site, modules: dict, projections: dict[str, DownProjection]) -> Target:
    projection = projections.get(site.name)
    if projection is not None and projection.experts is not None:
        if site.expert is None or not 0 <= site.expert < projection.experts:
            raise InvalidInput(
                f"{site.name} holds experts 0 to {projection.experts - 1}: name one of them, got "
                f"{site.expert}"
            )
        shape = projection.rows, projection.columns
        return Target(site, projection.module, shape, projection)
    module = modules.get(site.name)
    if module is None:
        near = difflib.get_close_matches(site.name, modules, 3)
        raise InvalidInput(
            f"the model has no module {site.name!r}"
            + (f"; the nearest are {', '.join(near)}" if near else "")
        )
    if projection is not None:
        return Target(site, module, (projection.rows, projection.columns), projection)
    base = base_of(module)[0]
    shape = _linear_shape(base)
    if shape is None:
        raise InvalidInput(
            f"{site.name} is a {type(base).__name__}: expected a linear layer (nn.Linear, Conv1D "
            "or a quantized one)"
        )
    return Target(site, module, shape, None)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    if _is_conv1d(module):
        columns, rows = module.weight.shape
        return rows, columns
    return None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
