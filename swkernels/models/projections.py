"""Find every down projection of a model by what its modules are.

A down projection is the weight of a block that maps an intermediate width back to the residual
width and has a sibling that maps the residual width to the intermediate one (once or twice, for a
fused gate and up). Attention and state-space mixers have the same shape and are told by their
class and by their siblings. Names decide only where shapes cannot. docs/models.md has the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from swkernels.errors import InvalidInput, SwkernelsError

_MIXER = re.compile(
    r"attention|attn|mamba|recurrent|rglru|deltanet|shortconv|router|gating|rotary", re.I
)
_MIXER_CHILDREN = {
    "q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv_proj", "query_key_value",
    "c_attn", "Wqkv", "qkv", "q", "k", "v", "wq", "wk", "wv", "to_q", "to_k", "to_v",
    "q_a_proj", "kv_a_proj_with_mqa",
}  # fmt: skip
_OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|speech)[^.]*", re.I)
_DOWN_NAMES = re.compile(
    r"^(down_proj|down|fc2|fc_out|c_proj|dense_4h_to_h|wo|w2|output_linear|contract|lin2)$"
)


class ProjectionNotFound(SwkernelsError, ValueError):
    """The model has no down projection; the message says what was looked for and what is there."""


@dataclass(frozen=True, eq=False)
class DownProjection:
    """One down projection: a weight [rows, columns], or a stack of experts of them.

    Attributes:
        name: path of the module that owns the weight ("model.layers.3.mlp.down_proj").
        layer: index of its block, from 0.
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
        """The weight as it is stored."""
        weight: object = self.module
        for part in self.parameter.split("."):
            weight = getattr(weight, part)
        return weight

    def matrix(self, expert: int | None = None) -> torch.Tensor:
        """Return the live weight as a view [rows, columns]; writing to it changes the model.

        Args:
            expert: which expert of a fused weight; not used otherwise.

        Raises:
            InvalidInput: the weight is on the meta device or packed, so it has no such view.
        """
        weight = self.weight
        if weight.is_meta:
            raise InvalidInput(f"{self.name} is on the meta device: load its weight first")
        if not weight.is_floating_point() or weight.numel() != self._elements:
            raise InvalidInput(
                f"{self.name} is packed ({weight.dtype} {list(weight.shape)}): expected a "
                f"floating-point weight of {self._elements} elements; load the model unquantized"
            )
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


def find_down_projections(model: nn.Module) -> list[DownProjection]:
    """Return every down projection of ``model``'s text blocks, in the order of their layers.

    Raises:
        ProjectionNotFound: there is none.
    """
    root = getattr(model, "_orig_mod", model)
    found = []
    for stack_name, stack in _stacks(root):
        width = _residual_width(root, stack)
        for layer, block in enumerate(stack):
            block_name = f"{stack_name}.{layer}"
            for projection in _in_block(block, block_name, layer, width):
                found.append(projection)
    if not found:
        raise ProjectionNotFound(_explain(root))
    return found


def _stacks(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of blocks, vision and audio towers left out."""
    taken: list[str] = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in taken) or _OTHER_TOWERS.search(name):
            continue
        if all(any(_is_linear(m) for m in block.modules()) for block in module):
            if not any(_is_linear(block) for block in module):
                taken.append(name)
                yield name, module


def _residual_width(root: nn.Module, stack: nn.ModuleList) -> int:
    """The width of the residual stream: the configuration's, else the commonest linear width."""
    config = getattr(root, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    widths: Counter[int] = Counter()
    for module in stack[0].modules():
        if _is_linear(module):
            widths.update(_features(module))
    for name in ("hidden_size", "n_embd", "d_model"):
        if getattr(config, name, None) in widths:
            return getattr(config, name)
    return widths.most_common(1)[0][0] if widths else 0


def _in_block(block, block_name, layer, width) -> Iterator[DownProjection]:
    for name, module in block.named_modules():
        path = f"{block_name}.{name}" if name else block_name
        if _in_mixer(block, name) or _below_linear(block, name):
            continue
        child = _dense_child(module, width)
        if child is not None:
            yield _dense(block, block_name, layer, path, module, child)
        fused = _fused_weight(block, name, module, width)
        if fused is not None:
            parameter, layout, experts, columns = fused
            yield DownProjection(
                path, layer, module, parameter, layout, width, columns, None, experts,
                block, block_name, _scope(block, name),
            )  # fmt: skip


def _dense(block, block_name, layer, path, container, child) -> DownProjection:
    module = getattr(container, child)
    base, prefix = _base(module)
    rows, columns = _features(module)
    layout = "io" if type(base).__name__ == "Conv1D" else "oi"
    inside = path[len(block_name) + 1 :]
    expert = _expert_index(block, inside)
    return DownProjection(
        f"{path}.{child}", layer, module, f"{prefix}weight", layout, rows, columns, expert, None,
        block, block_name, None if expert is None else _scope(block, inside),
    )  # fmt: skip


def _expert_index(block: nn.Module, name: str) -> int | None:
    """The place of ``name`` in a list of modules of one class: experts, not stages of a block."""
    module, index = block, None
    for part in [p for p in name.split(".") if p]:
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            if len({type(sibling) for sibling in module}) == 1:
                index = int(part)
        module = module.get_submodule(part)
    return index


def _scope(block: nn.Module, name: str) -> nn.Module:
    """The child of the block around an expert: it is given the hidden states and routes them."""
    return block.get_submodule(name.split(".")[0])


def _base(module: nn.Module) -> tuple[nn.Module, str]:
    """Look through an adapter's wrapper (PEFT's ``base_layer``)."""
    prefix = ""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module, prefix = module.base_layer, f"{prefix}base_layer."
    return module, prefix


def _is_linear(module: nn.Module) -> bool:
    """A linear layer of any kind: nn.Linear and subclasses, Conv1D, quantized, wrapped."""
    base, _ = _base(module)
    return _features(base) is not None and (
        getattr(getattr(base, "weight", None), "dim", lambda: 0)() in (1, 2)
    )


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, or None."""
    base, _ = _base(module)
    if type(base).__name__ == "Conv1D" and hasattr(base, "nf"):
        return base.weight.shape[1], base.weight.shape[0]
    out, into = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if isinstance(out, int) and isinstance(into, int):
        return out, into
    return None


def _in_mixer(block: nn.Module, name: str) -> bool:
    """Whether the module at ``name`` is, or lies in, attention or another token mixer."""
    module = block
    for part in [p for p in name.split(".") if p]:
        module = module.get_submodule(part)
        if _MIXER.search(type(module).__name__):
            return True
        if _MIXER_CHILDREN & {child for child, _ in module.named_children()}:
            return True
    return False


def _below_linear(block: nn.Module, name: str) -> bool:
    """Whether the module is part of a linear layer's own wrapper (an adapter)."""
    module = block
    for part in [p for p in name.split(".") if p]:
        if _is_linear(module):
            return True
        module = module.get_submodule(part)
    return _is_linear(module)


def _dense_child(container: nn.Module, width: int) -> str | None:
    """The child of ``container`` that is its down projection, by shapes; names break ties."""
    linears = {n: _features(m) for n, m in container.named_children() if _is_linear(m)}
    fitting = []
    for name, (out, into) in linears.items():
        expanding = [
            other
            for other, shape in linears.items()
            if other != name and shape in ((into, width), (2 * into, width))
        ]
        if out == width and expanding:
            fitting.append(name)
    named = [name for name in fitting if _DOWN_NAMES.match(name)]
    if named or not fitting:
        return named[-1] if named else None
    return fitting[-1]


def _fused_weight(block, name: str, module: nn.Module, width: int):
    """(parameter, layout, experts, columns) of a fused experts module's down weight, or None."""
    stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    if len(stacks) == 1 and "weight" in stacks:
        return _parallel_experts(block, name, stacks["weight"], width)
    for parameter, weight in stacks.items():
        experts, a, b = weight.shape
        for other, expand in stacks.items():
            if other == parameter or expand.shape[0] != experts:
                continue
            if a == width and expand.shape[2] == width and expand.shape[1] in (b, 2 * b):
                layout, columns = "eoi", b
            elif b == width and expand.shape[1] == width and expand.shape[2] in (a, 2 * a):
                layout, columns = "eio", a
            else:
                continue
            if expand.shape[1:] != weight.shape[1:] or re.search("down|w2", parameter):
                return parameter, layout, experts, columns
    return _stacked_experts(module, width)


def _parallel_experts(block, name: str, weight, width: int):
    """A module per projection with one weight [E, out, in] (JetMoE): the sibling expands."""
    parent, _, own = name.rpartition(".")
    experts, rows, columns = weight.shape
    for sibling_name, sibling in block.get_submodule(parent).named_children():
        other = getattr(sibling, "weight", None)
        if sibling_name == own or not isinstance(other, torch.Tensor) or other.dim() != 3:
            continue
        expands = other.shape[2] == width and other.shape[1] in (columns, 2 * columns)
        if rows == width and expands and (other.shape != weight.shape or "out" in own):
            return "weight", "eoi", experts, columns
    return None


def _stacked_experts(module: nn.Module, width: int):
    """Three weights [E * columns, rows], experts stacked along the input (DBRX)."""
    experts = getattr(module, "moe_num_experts", None) or getattr(module, "num_experts", None)
    flat = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 2}
    down = [name for name in flat if re.search("w2|down", name)]
    if not isinstance(experts, int) or len(flat) < 2 or len(down) != 1:
        return None
    shape = flat[down[0]].shape
    same = all(p.shape == shape for p in flat.values())
    if not same or shape[1] != width or shape[0] % experts:
        return None
    return down[0], "ei_o", experts, shape[0] // experts


def _explain(root: nn.Module) -> str:
    seen = sorted({type(m).__name__ for m in root.modules() if _is_linear(m)})
    return (
        f"no down projection in {type(root).__name__}: looked in every list of blocks for a "
        "linear layer, Conv1D or expert weight that maps an intermediate width back to the "
        "residual width beside one that expands it; linear modules seen: "
        f"{', '.join(seen) or 'none'}"
    )
