"""The weights that coordinates are listed for: their names, shapes and values in a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models import DownProjection, ProjectionNotFound, find_down_projections
from swkernels.models.kinds import block_of as block_of
from swkernels.models.structure import base_of, features
from swkernels.nn.packed import PackedModule
from swkernels.nn.quant_experts import QuantExperts


class Site(NamedTuple):
    """Which weight: the path of the module that owns it, and the expert of fused experts.

    An expert that is a module of its own has its number in the path, and ``expert`` is None.
    """

    name: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name} expert {self.expert}"


@dataclass(frozen=True)
class Weight:
    """One weight of a model, as a matrix [D, H] whatever its layout is.

    Attributes:
        site: its name (and expert).
        shape: (D, H), output and input features.
        module: the module whose forward uses it; adapters of others may be wrapped around it.
        projection: what ``find_down_projections`` says of it; None for another linear layer.
    """

    site: Site
    shape: tuple[int, int]
    module: nn.Module
    projection: DownProjection | None

    @property
    def fused(self) -> bool:
        """Whether one parameter holds this and the other experts."""
        return self.projection is not None and self.projection.experts is not None

    @property
    def transposed(self) -> bool:
        """Whether its layer keeps it as [H, D]."""
        return type(base_of(self.module)[0]).__name__ == "Conv1D"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        projection = self.projection
        return base_of(self.module)[0].weight if projection is None else projection.weight

    @property
    def packed_layer(self) -> PackedModule | None:
        """The module that holds it as a packed matrix [D, H], where ``quantize`` has packed it."""
        if self.fused:
            stack = self.projection.weight
            packed = isinstance(stack, QuantExperts)
            return stack.expert(self.site.expert) if packed else None
        base = base_of(self.module)[0]
        return base if isinstance(base, PackedModule) else None

    def read(self) -> torch.Tensor:
        """Return the values [D, H]: ``matrix()``, or float32 ones of a packed weight.

        Raises:
            InvalidInput: it is packed by another library, sharded or on the meta device.
        """
        layer = self.packed_layer
        return self.matrix() if layer is None else layer.dequantize(torch.float32)

    def matrix(self) -> torch.Tensor:
        """Return the live weight as a view [D, H] that can be read and written.

        Raises:
            InvalidInput: it is packed, sharded or on the meta device.
        """
        if self.packed_layer is not None:
            raise InvalidInput(
                f"{self.site} is packed ({self.packed_layer.packed.plan.code.name}): expected a "
                "plain floating-point weight; load the model unquantized"
            )
        if self.projection is not None:
            return self.projection.matrix(self.site.expert).detach()
        weight = self.parameter
        plain = isinstance(weight, torch.Tensor) and not hasattr(weight, "__tensor_flatten__")
        plain = plain and not weight.is_meta
        D, H = self.shape
        if not plain or not readable(weight.dtype) or weight.numel() != D * H:
            raise InvalidInput(
                f"{self.site} is packed, sharded or on the meta device ({type(weight).__name__} "
                f"{weight.dtype} {list(weight.shape)}): expected a plain floating-point weight"
            )
        return self.as_matrix(weight).detach()

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape, such as its gradient, as a view [D, H]."""
        if self.projection is not None:
            return self.projection.view(tensor, self.site.expert)
        return tensor.T if self.transposed else tensor


def as_site(key: object) -> Site:
    """Return the site that "name", ("name", expert) or a Site means.

    Raises:
        InvalidInput: it is none of these.
    """
    name, expert = (key, None) if isinstance(key, str) else (key if _is_pair(key) else (None, None))
    is_index = isinstance(expert, int) and not isinstance(expert, bool) and expert >= 0
    if not isinstance(name, str) or not (expert is None or is_index):
        raise InvalidInput(
            f"expected the name of a module or (name, expert from 0), got {key!r:.200}"
        )
    return Site(name, expert)


def readable(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype holds its values, not the codes of a quantizer."""
    return dtype.is_floating_point and dtype.itemsize > 1


def down_projection_weights(model: nn.Module) -> list[Weight]:
    """Return every down projection of ``model``, and every expert of fused ones.

    Raises:
        ProjectionNotFound: there is none.
    """
    return [weight for p in find_down_projections(model) for weight in _weights_of(p)]


def down_projection_shapes(model: nn.Module) -> dict[Site, tuple[int, int]]:
    """Return (D, H) of every down projection, and of every expert of fused ones, in forward order.

    Args:
        model: any module; nothing is run, and weights may be on the meta device.

    Raises:
        ProjectionNotFound: there is none.
    """
    return {weight.site: weight.shape for weight in down_projection_weights(model)}


def find_weights(model: nn.Module, keys: Iterable[object]) -> list[Weight]:
    """Return the weights that ``keys`` name: down projections and any other linear layers.

    Args:
        model: any module.
        keys: names, or (name, expert). The name of fused experts alone means all of them.

    Raises:
        InvalidInput: a module that is not there or is no linear layer, or an expert that its
            module does not hold.
    """
    root = base_of(model)[0]
    try:
        projections = {p.name: p for p in find_down_projections(model, towers="all")}
    except ProjectionNotFound:
        projections = {}
    modules = dict(root.named_modules())
    found: dict[Site, Weight] = {}
    for key in keys:
        for weight in _find(as_site(key), modules, projections):
            found.setdefault(weight.site, weight)
    return list(found.values())


def nearest(name: str, known: Iterable[str]) -> str:
    """Word the names that come nearest, for the end of an error message; "" where none does."""
    near = difflib.get_close_matches(name, list(known), 3, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""


def _is_pair(key: object) -> bool:
    return isinstance(key, Sequence) and len(key) == 2


def _find(site: Site, modules: dict, projections: dict[str, DownProjection]) -> list[Weight]:
    projection = projections.get(site.name)
    if projection is not None and projection.experts is not None:
        if site.expert is not None and site.expert >= projection.experts:
            raise InvalidInput(
                f"{site.name} holds experts 0 to {projection.experts - 1}, got {site.expert}"
            )
        of_all = _weights_of(projection)
        return of_all if site.expert is None else [of_all[site.expert]]
    module = modules.get(site.name)
    shape = features(module) if module is not None else None
    if projection is None and shape is None:
        linear = [name for name, m in modules.items() if features(m) is not None]
        near = nearest(site.name, dict.fromkeys([*projections, *linear]))
        if module is None:
            raise InvalidInput(f"the model has no module {site.name!r}{near}")
        raise InvalidInput(
            f"{site.name} is a {type(module).__name__}: expected a linear layer (nn.Linear, Conv1D "
            f"or a quantized one){near}"
        )
    if site.expert is not None:
        raise InvalidInput(f"{site.name} is no fused experts module: leave out the expert")
    if projection is not None:
        return _weights_of(projection)
    return [Weight(site, shape, module, None)]


def _weights_of(projection: DownProjection) -> list[Weight]:
    shape = projection.rows, projection.columns
    experts = [None] if projection.experts is None else range(projection.experts)
    sites = [Site(projection.name, expert) for expert in experts]
    return [Weight(site, shape, projection.module, projection) for site in sites]
