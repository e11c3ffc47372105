"""Where the projections of every block are in the named tensors of a model, as matrices [D, H].

Only names and shapes are looked at, so a checkpoint's headers will do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from swkernels.errors import InvalidInput

from .checkpoint import natural, stores_transposed
from .kinds import block_of, expert_named, module_of, projection_kind

_STACKED = re.compile(r"\.experts\.mlp\.\w+$")  # DBRX: 2-D, the experts one below the other
_ROUTER = re.compile(r"router(\.|$)")
_EMBEDDING = re.compile(r"emb|(^|\.)(wte|shared)$")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredProjection:
    """One matrix [D, H], D output and H input channels.

    Attributes:
        name: of the tensor that holds it.
        kind: one of ``KINDS``.
        expert: which expert it is, whether that has a tensor of its own or is fused with others.
        layout: "oi" [D, H]; "io" its transpose; "eoi" and "eio" the same for each expert;
            "eo_i" [E * D, H] and "ei_o" [E * H, D], experts one below the other.
        shape: (D, H).
    """

    name: str
    kind: str
    expert: int | None
    layout: str
    shape: tuple[int, int]

    @property
    def fused(self) -> bool:
        """Whether one tensor holds this and the other experts."""
        return self.layout.startswith("e")

    @property
    def block(self) -> str:
        """The path of the block that it lies in: "model.layers.11"."""
        return block_of(self.name)

    @property
    def layer(self) -> int:
        """The number of its block."""
        return int(self.block.rpartition(".")[2])

    @property
    def module(self) -> str:
        """The path of the module that owns the tensor, as it is called where the tensor is."""
        path = module_of(self.name)
        return path.rpartition(".")[0] if self.fused and path == self.name else path

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return it as a view [D, H] of the tensor ``name``."""
        D, H = self.shape
        if self.layout == "eo_i":
            return tensor[self.expert * D : (self.expert + 1) * D]
        if self.layout == "ei_o":
            return tensor[self.expert * H : (self.expert + 1) * H].T
        matrix = tensor[self.expert] if self.fused else tensor
        return matrix.T if self.layout.endswith("io") else matrix


def stored_projections(
    shapes: Shapes, transposed: Mapping[str, bool] | None = None
) -> list[StoredProjection]:
    """Return the projections of every block, in natural order of their names; see ``KINDS``.

    Args:
        shapes: of all tensors of a checkpoint or a model, by name.
        transposed: whether a tensor holds input channels before output channels, by its name;
            what is not listed is told by the shapes.

    Raises:
        InvalidInput: experts are stored in a way that shapes cannot tell.
    """
    transposed = dict(transposed or {})
    conv1d = stores_transposed(shapes)
    found: list[StoredProjection] = []
    for name in sorted(shapes, key=natural):
        kind, shape = projection_kind(name), shapes[name]
        if kind is None or not 2 <= len(shape) <= 3:
            continue
        if len(shape) == 3:
            if name not in transposed:
                transposed[name] = _experts_transposed(name, shapes)
            layout, (experts, D, H) = "eoi", shape
        elif _STACKED.search(name):
            experts = _experts_beside(name, shapes)
            layout = "ei_o" if kind == "down" else "eo_i"
            D, H = shape[0] // experts, shape[1]
            transposed[name] = kind == "down"
        else:
            layout, experts, (D, H) = "oi", None, shape
            transposed.setdefault(name, conv1d)
        if transposed[name]:
            D, H = H, D
            layout = {"oi": "io", "eoi": "eio"}.get(layout, layout)
        for expert in [expert_named(name)] if experts is None else range(experts):
            found.append(StoredProjection(name, kind, expert, layout, (D, H)))
    return found


def _experts_transposed(name: str, shapes: Shapes) -> bool:
    """Whether a tensor [E, ., .] holds [E, H, D], by the width of the residual stream.

    A square one does not tell: what stands beside it does.
    """
    parent = module_of(name).rpartition(".")[0]
    width = next((shape[-1] for key, shape in shapes.items()
                  if len(shape) == 2 and _EMBEDDING.search(module_of(key))), None)  # fmt: skip
    for key in [name, *(key for key in shapes if key.startswith(f"{parent}."))]:
        kind, shape = projection_kind(key), shapes[key]
        if kind is None or len(shape) != 3 or shape[1] == shape[2] or width not in shape[1:]:
            continue
        of_width = shape[1] == width  # its first channels are those of the residual stream
        return not of_width if kind in ("down", "o") else of_width
    raise InvalidInput(
        f"{name} is {list(shapes[name])}: whether its experts are transposed cannot be told from "
        "its shape; give the model instead"
    )


def _experts_beside(name: str, shapes: Shapes) -> int:
    """The number of experts that a tensor stacks: the outputs of the router of its block."""
    block = block_of(name)
    routers = [shape[0] for key, shape in shapes.items()
               if key.startswith(f"{block}.") and len(shape) == 2
               and _ROUTER.search(module_of(key))]  # fmt: skip
    if len(routers) != 1 or shapes[name][0] % routers[0]:
        raise InvalidInput(
            f"{name} is {list(shapes[name])}: how many experts it holds cannot be told; give the "
            "model instead"
        )
    return routers[0]
