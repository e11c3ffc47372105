"""Recognise the weights of fused experts: one parameter that holds a matrix per expert."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from .structure import matrices_of

_DOWN = re.compile(r"(^|_)(down|w2|fc2|wo|output|out|contract)(_|$)")


@dataclass(frozen=True)
class FusedWeight:
    """Where the down weights of fused experts are: see ``DownProjection`` for the fields."""

    parameter: str
    layout: str
    experts: int
    columns: int


def fused_weight(parent: nn.Module, name: str, module: nn.Module, width: int) -> FusedWeight | None:
    """Return the down weight of ``module`` if it is a fused experts module, else None.

    Args:
        parent, name: the module that holds ``module``, and under which name.
        width: the width of the residual stream.
    """
    stacks = _stacks(module)
    if list(stacks) == ["weight"]:
        siblings = {key: _stacks(child) for key, child in parent.named_children()}
        weights = {k: own["weight"] for k, own in siblings.items() if list(own) == ["weight"]}
        found = _reading(module, weights, width)
        return replace(found, parameter="weight") if found and found.parameter == name else None
    return _reading(module, stacks, width) or _of_rows(module, width)


def _stacks(module: nn.Module) -> dict[str, nn.Parameter | nn.Module]:
    return {name: weight for name, weight in matrices_of(module).items() if weight.dim() == 3}


def _reading(module: nn.Module, weights: dict, width: int) -> FusedWeight | None:
    """Weights [E, ., .] side by side, in one module or one in each (JetMoE): the down weight.

    Where shapes allow two readings (an up projection is a transposed down projection) the name
    decides, then the class (``is_transposed``, which transformers' fused experts declare), then
    the convention of nn.Linear.
    """
    expected = "eio" if getattr(module, "is_transposed", False) else "eoi"
    readings = []
    for name, weight in weights.items():
        experts, *shape = weight.shape
        for layout, (rows, columns) in (("eoi", shape), ("eio", shape[::-1])):
            if rows == width and any(
                _expands(other, layout, columns, width)
                for sibling, other in weights.items()
                if sibling != name and other.shape[0] >= experts
            ):
                found = FusedWeight(name, layout, experts, columns)
                readings.append((bool(_DOWN.search(name)), layout == expected, found))
    return max(readings, key=lambda reading: reading[:2])[2] if readings else None


def _expands(weight, layout: str, columns: int, width: int) -> bool:
    """Whether a weight [E, ., .] of this layout maps ``width`` to ``columns``, or twice as many."""
    out, into = weight.shape[1:] if layout == "eoi" else weight.shape[:0:-1]
    return into == width and out in (columns, 2 * columns)


def _of_rows(module: nn.Module, width: int) -> FusedWeight | None:
    """Weights [E * columns, rows] of one shape, experts stacked along the rows (DBRX)."""
    experts = getattr(module, "moe_num_experts", None) or getattr(module, "num_experts", None)
    flat = {name: weight for name, weight in matrices_of(module).items() if weight.dim() == 2}
    down = [name for name in flat if _DOWN.search(name)]
    if not isinstance(experts, int) or len(flat) < 2 or len(down) != 1:
        return None
    rows, columns = flat[down[0]].shape
    if columns != width or rows % experts or {p.shape for p in flat.values()} != {(rows, columns)}:
        return None
    return FusedWeight(down[0], "ei_o", experts, rows // experts)
