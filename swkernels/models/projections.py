"""Find every down projection of a model by what its modules are.

A down projection is the weight of a block that maps an intermediate width back to the residual
width and has a sibling that maps the residual width to the intermediate one (once, twice, or in
one weight for a fused gate and up). Attention and state-space mixers have the same shape and are
told by their class, their children and their attributes. Names decide only where shapes cannot.
docs/models.md has the rules and the table of architectures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from swkernels.errors import InvalidInput, SwkernelsError

from .fused import fused_weight
from .offloaded import held_weight, holding
from .rows import is_packed, packed_rows
from .structure import (
    Stack,
    base_of,
    expert_of,
    features,
    feed_forward_modules,
    has_expert_stack,
    linear_children,
    routed_scope,
    stacks,
    text_stacks,
    weight_name,
)

_DOWN_NAMES = re.compile(
    r"^(down_proj|proj_down|down|fc2|fc_out|c_proj|dense_4h_to_h|wo|w2|output_linear|contract"
    r"|lin2|linear2|linear_2|layer_2|output)$",
    re.I,
)


class ProjectionNotFound(SwkernelsError, ValueError):
    """The model has no down projection; the message says what was looked for and what is there."""


@dataclass(frozen=True, eq=False)
class DownProjection:
    """One down projection: a weight [rows, columns], or a stack of experts of them.

    Attributes:
        name: path of the module that owns the weight ("model.layers.3.mlp.down_proj").
        layer: index of its block in the list of blocks, from 0.
        module: the module whose forward computes it.
        parameter: path of the weight below ``module``.
        layout: "oi" [rows, columns]; "io" its transpose (Conv1D); "eoi" and "eio" the same per
            expert; "ei_o" experts stacked along the input [E * columns, rows].
        rows, columns: output and input features (of one expert).
        expert: the index of an expert that is a module of its own.
        experts: the number of experts of a fused weight.
        block, block_name: the block it lives in; its output is the residual stream.
        scope: the mixture-of-experts module around an expert; it routes the tokens.
    """

    name: str
    layer: int
    module: nn.Module
    parameter: str
    layout: str
    rows: int
    columns: int
    expert: int | None
    experts: int | None
    block: nn.Module
    block_name: str
    scope: nn.Module | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The weight as it is stored.

        Where a quantizer has packed it: its largest tensor, or the module of packed experts.
        """
        weight: object = self.module
        for part in self.parameter.split("."):
            weight = getattr(weight, part)
        return weight

    def matrix(self, expert: int | None = None) -> torch.Tensor:
        """Return the live weight as a view [rows, columns]; writing to it changes the model.

        Args:
            expert: which expert of a fused weight; not used otherwise.

        Raises:
            InvalidInput: the weight is on the meta device, packed or sharded, so it has no such
                view; or the expert is none of its experts.
        """
        weight = self.weight
        if getattr(weight, "is_meta", False):
            held = held_weight(self.module, self.parameter)
            weight = weight if held is None else held
        if getattr(weight, "is_expert_stack", False):
            raise InvalidInput(
                f"{self.name} is packed ({weight.extra_repr()}): expected a floating-point weight; "
                "load the model unquantized"
            )
        if weight.is_meta:
            raise InvalidInput(
                f"{self.name} is on the meta device: expected a weight in memory; load or "
                "materialize it first (a model offloaded to disk has none)"
            )
        stored = f"{type(weight).__name__} {weight.dtype} {list(weight.shape)}"
        if hasattr(weight, "__tensor_flatten__"):
            raise InvalidInput(
                f"{self.name} is a wrapped tensor ({stored}): expected a plain weight; load the "
                "model unquantized and unsharded"
            )
        if (
            not weight.is_floating_point()
            or weight.itemsize == 1
            or weight.numel() != self._elements
        ):
            raise InvalidInput(
                f"{self.name} is packed ({stored}): expected a floating-point weight of "
                f"{self._elements} elements; load the model unquantized"
            )
        return self.view(weight, expert)

    def row(self, row: int, expert: int | None = None) -> torch.Tensor:
        """Return a copy of one row of the matrix: float32 [columns] on the CPU.

        Raises:
            InvalidInput: as ``matrix`` does.
        """
        if self.is_packed:
            return self.packed_rows(row, row + 1, expert)[0].cpu()
        return self.values(expert)[row].detach().float().cpu()

    @property
    def is_packed(self) -> bool:
        """Whether the weight is packed in a known way; nothing is dequantized to tell."""
        if self.experts is not None and not getattr(self.weight, "is_expert_stack", False):
            return False
        return is_packed(self.module, self.weight)

    def packed_rows(self, start: int, stop: int, expert: int | None = None) -> torch.Tensor:
        """Return a dequantized copy of rows of a packed weight: float32 [stop - start, columns]."""
        return packed_rows(self.module, self.weight, expert, start, stop)

    def packed(self, expert: int | None = None) -> torch.Tensor | None:
        """Return a dequantized copy of the matrix in float32; None where it is not packed.

        It is made anew each time; writing to it changes nothing. See ``packed_rows``.
        """
        return self.packed_rows(0, self.rows, expert) if self.is_packed else None

    def values(self, expert: int | None = None) -> torch.Tensor:
        """Return the matrix to read from: the live view, or a copy where it is packed.

        Raises:
            InvalidInput: as ``matrix`` does, but for packed weights of a known kind.
        """
        packed = self.packed(expert)
        if packed is not None:
            return packed
        with self.held():
            return self.matrix(expert).detach()

    def held(self) -> AbstractContextManager[None]:
        """A context in which ``matrix`` works for a weight that accelerate has offloaded, too."""
        return holding(self.module, self.parameter)

    def view(self, weight: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """Return a tensor of the weight's shape, such as its gradient, as a view [rows, columns].

        Raises:
            InvalidInput: the expert is none of its experts.
        """
        if self.experts is None:
            return weight.T if self.layout == "io" else weight
        if expert is None or not 0 <= expert < self.experts:
            raise InvalidInput(f"{self.name} has experts 0 to {self.experts - 1}, got {expert}")
        if self.layout == "ei_o":
            weight = weight.view(self.experts, self.columns, self.rows)
        return weight[expert] if self.layout == "eoi" else weight[expert].T

    @property
    def _elements(self) -> int:
        return self.rows * self.columns * (self.experts or 1)


def find_down_projections(model: nn.Module, towers: str = "text") -> list[DownProjection]:
    """Return every down projection of ``model``'s blocks, in forward order.

    A weight that several blocks share is returned once, at the first of them.

    Args:
        model: any module; adapters (PEFT), ``torch.compile`` and wrappers are looked through.
        towers: "text" leaves out the blocks of vision, audio and connector towers, unless the
            model has no others; "all" takes every list of blocks.

    Raises:
        ProjectionNotFound: there is none.
        InvalidInput: ``towers`` is neither.
    """
    if towers not in ("text", "all"):
        raise InvalidInput(f'expected towers "text" or "all", got {towers!r}')
    root = base_of(model)[0]
    found: list[DownProjection] = []
    seen: set[tuple[nn.Module, str]] = set()
    every = stacks(root)
    for stack in every if towers == "all" else text_stacks(every):
        for layer, block_name, block in stack.blocks:
            for projection in _in_block(block, block_name, layer, stack.width):
                owner = (projection.module, projection.parameter)
                if owner not in seen:
                    seen.add(owner)
                    found.append(projection)
    if not found:
        raise ProjectionNotFound(_explain(root, every))
    return found


def skipped_towers(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, reason) of each list of blocks that ``towers="text"`` leaves out."""
    every = stacks(base_of(model)[0])
    kept = text_stacks(every)
    return [(stack.name, stack.tower) for stack in every if stack not in kept]


def _in_block(block, block_name: str, layer: int, width: int) -> list[DownProjection]:
    modules = list(feed_forward_modules(block))
    found: list[DownProjection] = []
    bottlenecks: list[DownProjection] = []
    has_stacks = False
    for name, module in modules:
        for child, gated in _down_children(linear_children(module), width):
            path = f"{name}.{child}" if name else child
            projection = _dense(block, block_name, layer, path)
            narrow = projection.columns < projection.rows
            is_bottleneck = narrow and not gated and projection.expert is None
            (bottlenecks if is_bottleneck else found).append(projection)
        has_stacks |= has_expert_stack(module)
        parent_name, _, own_name = name.rpartition(".")
        fused = fused_weight(block.get_submodule(parent_name), own_name, module, width)
        if fused is not None:
            path = f"{block_name}.{name}" if name else block_name
            # A module that holds nothing but one stack of weights does not route the tokens.
            scope = routed_scope(block, parent_name if fused.parameter == "weight" else name)
            found.append(
                DownProjection(
                    path, layer, module, fused.parameter, fused.layout, width, fused.columns,
                    None, fused.experts, block, block_name, scope,
                )
            )  # fmt: skip
    # A narrow pair without a gate beside a wider MLP is an adapter or a projection of its own
    # (Gemma's per-layer inputs); alone in its block it is the block's MLP.
    if found or has_stacks:
        return found
    return bottlenecks or list(_scattered(block, block_name, layer, width, modules))


def _scattered(block, block_name: str, layer: int, width: int, modules) -> Iterator[DownProjection]:
    """The two halves of an MLP lie in modules of their own (BERT): look at the whole block."""
    linears = {
        f"{name}.{child}" if name else child: shape
        for name, module in modules
        for child, shape in linear_children(module).items()
    }
    for path, _ in _down_children(linears, width):
        yield _dense(block, block_name, layer, path)


def _down_children(linears: dict[str, tuple[int, int]], width: int) -> list[tuple[str, bool]]:
    """(name, gated) of the linear layers that map back to ``width`` what another one expanded.

    Args:
        linears: (out, in) of linear layers that belong together, by name.
        width: the width of the residual stream.
    """
    fitting: list[tuple[str, bool]] = []
    for name, (out, into) in linears.items():
        others = [shape for other, shape in linears.items() if other != name]
        single, double = others.count((into, width)), others.count((2 * into, width))
        if out == width and (single or double):
            fitting.append((name, double > 0 or single > 1))
    if all(linears[name][1] != width for name, _ in fitting):
        return fitting
    # Square layers: each looks like the expansion of the others. The name tells, else the last.
    named = [entry for entry in fitting if _DOWN_NAMES.match(entry[0].rpartition(".")[2])]
    return (named or fitting)[-1:]


def _dense(block, block_name: str, layer: int, path: str) -> DownProjection:
    module = block.get_submodule(path)
    rows, columns = features(module)
    layout = "io" if type(base_of(module)[0]).__name__ == "Conv1D" else "oi"
    expert, scope = expert_of(block, path) or (None, None)
    return DownProjection(
        f"{block_name}.{path}", layer, module, weight_name(module), layout, rows, columns,
        expert, None, block, block_name, scope,
    )  # fmt: skip


def _explain(root: nn.Module, every: list[Stack]) -> str:
    seen: Counter[str] = Counter()
    for module in root.modules():
        shape = features(module)
        if shape is not None:
            seen[f"{type(module).__name__} {shape[1]}->{shape[0]}"] += 1
    kinds = ", ".join(f"{count} x {kind}" for kind, count in seen.most_common(8)) or "none"
    lists = ", ".join(f"{s.name or 'the model'} (width {s.width})" for s in every) or "none"
    return (
        f"no down projection in {type(root).__name__}: looked in every list of blocks (ModuleList "
        "or Sequential) for a linear layer, Conv1D or expert weight that maps an intermediate "
        "width back to the residual width beside one that expands it, outside attention and other "
        f"mixers; lists of blocks seen: {lists}; linear layers seen: {kinds}"
    )
