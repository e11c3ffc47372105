"""Which matrices of a model are quantized, which are not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models import DownProjection, ProjectionNotFound, find_down_projections
from swkernels.models.structure import base_of, features, stacks, text_stacks
from swkernels.nn.packed import PackedModule
from swkernels.nn.quant_experts import QuantExperts
from swkernels.train.weights import nearest

from .config import QuantConfig, matches

# A plain product with the transposed weight, plus a bias; FalconLinear writes it out.
_LINEAR = ("Linear", "FalconLinear")
_READ_BY_OTHERS = ("dt_proj",)  # Mamba's step sizes


@dataclass(frozen=True, eq=False)
class Layer:
    """A parameter that is to be packed: a matrix [D, H], or one for each of E experts.

    Attributes:
        name: path of the module that owns it; of stacked experts with the parameter's name.
        owner: path of that module.
        module: the module.
        parameter: the parameter's name in it.
        kind: "linear", "experts", "embedding", or "tied" (a head that shares an embedding).
        layout: as in ``DownProjection``, and "eo_i": experts stacked along the output.
        experts: how many, None where it is one matrix.
        is_end: whether it is an embedding or a head that ``config.embeddings`` is for.
    """

    name: str
    owner: str
    module: nn.Module
    parameter: str
    kind: str
    layout: str = "oi"
    experts: int | None = None
    is_end: bool = False

    @property
    def weight(self) -> torch.Tensor:
        return getattr(self.module, self.parameter)

    def matrices(self) -> Iterator[torch.Tensor]:
        """Each matrix as a view [D, H]."""
        weight = self.weight.detach()
        if self.experts is None:
            yield weight.T if self.layout == "io" else weight
            return
        if weight.dim() == 2:
            weight = weight.view(self.experts, -1, weight.shape[1])
        for matrix in weight:
            yield matrix.T if self.layout in ("eio", "ei_o") else matrix


def select(
    model: nn.Module, config: QuantConfig
) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Return the layers to quantize, in the model's order, and (name, reason) of the others.

    Nothing is read but names, classes and shapes: weights on the meta device are fine.

    Raises:
        InvalidInput: the model is quantized already or carries adapters, a pattern that matches
            nothing, or no layer at all.
    """
    root = base_of(model)[0]
    _check_untouched(root)
    try:
        projections = find_down_projections(root, towers="all")
    except ProjectionNotFound:
        projections = []
    routers = _routers(projections)
    candidates, left_out = _candidates(root, projections, routers)
    _check_patterns(config, [layer.name for layer in candidates])
    blocks = [name for stack in text_stacks(stacks(root)) for _, name, _ in stack.blocks]
    chosen: list[Layer] = []
    for layer in candidates:
        reason = _reason(layer, config, blocks, routers)
        if reason is None:
            chosen.append(layer)
        else:
            left_out.append((layer.name, reason))
    if config.embeddings is not None:
        ends, skipped = _ends(root, config, {layer.name for layer in chosen})
        chosen += ends
        named = {layer.name for layer in ends} | {name for name, _ in skipped}
        left_out = [entry for entry in left_out if entry[0] not in named] + skipped
    if not chosen:
        raise InvalidInput(
            f"no layer of {type(root).__name__} is to be quantized: "
            f"{left_out[0][0] + ': ' + left_out[0][1] if left_out else 'it has no linear layer'}"
        )
    return chosen, left_out


def places_of(
    root: nn.Module, modules: Iterable[nn.Module]
) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The parents of each module, and its names there: a module may have several."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {module: [] for module in modules}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child in places:
                places[child].append((parent, name))
    return places


def _check_untouched(root: nn.Module) -> None:
    """Raise InvalidInput for a model that is quantized already or carries adapters."""
    for name, module in root.named_modules():
        if isinstance(module, (PackedModule, QuantExperts)):
            raise InvalidInput(
                f"{name} is quantized already: quantize the model as it was loaded, once (a run "
                "that was interrupted leaves a model that must be loaded again)"
            )
        if "base_layer" in module._modules or getattr(module, "trains_beside_parent", False):
            raise InvalidInput(f"{name} is an adapter: quantize first, then add adapters")
        weight = module._parameters.get("weight")
        packed = weight is not None and (not weight.is_floating_point() or weight.itemsize == 1)
        if packed or _is_quantizers(module):
            raise InvalidInput(
                f"{name} is quantized already ({type(module).__name__}): load the model in full "
                "precision, without a quantization_config"
            )
    config = getattr(root, "config", None)
    method = getattr(config, "quantization_config", None)
    if method or getattr(root, "is_quantized", False):
        named = method.get if isinstance(method, dict) else partial(getattr, method)
        kind = named("quant_method", None) or type(root).__name__
        raise InvalidInput(
            f"the model is quantized already ({getattr(kind, 'value', kind)}): load it in full "
            "precision, without a quantization_config"
        )


def _is_quantizers(module: nn.Module) -> bool:
    """Whether a linear layer is another library's: it has features, but no weight of theirs."""
    if type(module).__module__.startswith("bitsandbytes"):
        return True  # also before its first move, which packs it
    shape = features(module)
    if shape is None or not isinstance(getattr(module, "in_features", None), int):
        return False
    weight = module._parameters.get("weight")
    return weight is None or weight.numel() != shape[0] * shape[1]


def _candidates(
    root: nn.Module, projections: list[DownProjection], routers: set[nn.Module]
) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Every matrix that can be packed, and (name, reason) of those that cannot."""
    found: list[Layer] = []
    left_out: list[tuple[str, str]] = []
    fused = _fused(root, projections)
    for name, module in root.named_modules():
        if module is root:
            continue  # which cannot be replaced in place
        if module in fused:
            found += [
                Layer(f"{name}.{parameter}", name, module, parameter, "experts", layout, experts)
                for parameter, (layout, experts) in fused[module].items()
            ]
        elif isinstance(module, nn.Embedding):
            left_out.append((name, "an embedding"))
        elif features(module) is not None:
            layout, kind = _layout(module), type(module).__name__
            if name.rpartition(".")[2] in _READ_BY_OTHERS:
                left_out.append((name, "the module around it reads its weight"))
            elif layout is None:
                reason = "a router" if module in routers else f"{kind} has a forward of its own"
                left_out.append((name, reason))
            else:
                found.append(Layer(name, name, module, "weight", "linear", layout))
        else:
            left_out += [
                (f"{name}.{parameter}", "matrices of no known experts")
                for parameter, weight in module._parameters.items()
                if weight is not None and weight.dim() == 3 and "Conv" not in type(module).__name__
            ]
    return found, left_out


def _layout(module: nn.Module) -> str | None:
    """How a linear layer keeps its weight; None where it is none that can be replaced."""
    kind = type(module).__name__
    if kind == "Conv1D":
        return "io"
    return "oi" if isinstance(module, nn.Linear) and kind in _LINEAR else None


def _fused(root: nn.Module, projections: list[DownProjection]) -> dict:
    """The parameters that hold all experts: by module, {parameter: (layout, experts)}."""
    found: dict[nn.Module, dict[str, tuple[str, int]]] = {}
    for p in projections:
        if p.experts is None:
            continue
        found.setdefault(p.module, {}).update(_beside(p.module, p))
        if p.parameter == "weight":  # its siblings are modules of one stack each (JetMoE)
            parent = root.get_submodule(p.name.rpartition(".")[0])
            for sibling in parent.children():
                if list(sibling._parameters) == ["weight"] and sibling.weight.dim() == 3:
                    found.setdefault(sibling, {}).update(_beside(sibling, p))
    return found


def _beside(module: nn.Module, p: DownProjection) -> dict[str, tuple[str, int]]:
    """The stacks of a module, whose layout is that of the down projection beside them."""
    own = {n: w for n, w in module._parameters.items() if w is not None}
    if p.layout == "ei_o":
        shape = own[p.parameter].shape
        return {
            n: ("ei_o" if n == p.parameter else "eo_i", p.experts)
            for n, w in own.items()
            if w.shape == shape
        }
    return {
        n: (p.layout, p.experts)
        for n, w in own.items()
        if w.dim() == 3 and w.shape[0] == p.experts
    }


def _routers(projections: list[DownProjection]) -> set[nn.Module]:
    """Linear layers that choose among experts, or weigh them: small, and all depends on them."""
    experts: dict[nn.Module, int] = {}
    for p in projections:
        if p.scope is not None:
            count = p.experts or p.expert + 1
            experts[p.scope] = max(count, experts.get(p.scope, 0))
    return {
        module
        for scope, count in experts.items()
        for module in scope.modules()
        if (shape := features(module)) is not None
        and shape[0] in (1, count)
    }


def _reason(layer: Layer, config: QuantConfig, blocks: list[str], routers: set) -> str | None:
    """Why a layer is left out; None if it is not."""
    if matches(layer.name, config.exclude):
        return "excluded"
    if config.include is not None:
        return None if matches(layer.name, config.include) else "not included"
    if layer.module in routers or "router" in layer.name.lower():
        return "a router"
    if not any(layer.name.startswith(f"{block}.") for block in blocks):
        return "outside the text blocks"
    return None


def _check_patterns(config: QuantConfig, names: list[str]) -> None:
    for field, patterns in (("include", config.include or ()), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(matches(name, (pattern,)) for name in names):
                raise InvalidInput(
                    f"{field} pattern {pattern!r} matches no layer{nearest(pattern, names)}"
                )


def _ends(
    root: nn.Module, config: QuantConfig, chosen: set[str]
) -> tuple[list[Layer], list[tuple[str, str]]]:
    """The input embeddings, the head, and whatever shares their weight."""
    get = getattr(root, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    if embedding is None:
        raise InvalidInput(
            f"{type(root).__name__} does not say which its input embeddings are "
            "(get_input_embeddings): leave embeddings=None"
        )
    head = getattr(root, "get_output_embeddings", lambda: None)()
    shared = embedding.weight
    found: list[Layer] = []
    left_out: list[tuple[str, str]] = []
    for name, module in root.named_modules():
        weight = module._parameters.get("weight")
        if name in chosen or (module is not head and weight is not shared):
            continue
        if matches(name, config.exclude):
            left_out.append((name, "excluded"))
        elif type(module) is nn.Embedding and module.max_norm is None:
            found.append(Layer(name, name, module, "weight", "embedding", is_end=True))
        elif _layout(module) == "oi":
            kind = "tied" if weight is shared else "linear"
            found.append(Layer(name, name, module, "weight", kind, is_end=True))
        else:
            left_out.append((name, f"{type(module).__name__} has a forward of its own"))
    if any(layer.kind == "embedding" for layer in found):
        found.sort(key=lambda layer: layer.kind != "embedding")  # a tied head needs it
        return found, left_out
    # Without its embedding a tied head has no packed matrix to share.
    tied = [(layer.name, "tied to embeddings that stay") for layer in found if layer.kind == "tied"]
    return [layer for layer in found if layer.kind == "linear"], left_out + tied
