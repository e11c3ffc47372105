"""What the configuration of a quantized model says of it, so that its files can be loaded."""

from __future__ import annotations

import copy
from types import MethodType

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of, features
from swkernels.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from swkernels.nn.packed import PackedModule, empty_packed
from swkernels.nn.quant_experts import QuantExperts, replace_parameter
from swkernels.train.coordinates import Coordinates

from .config import QuantConfig
from .selection import places_of

METHOD = "swkernels"  # the ``quant_method`` in config.json
VERSION = 1  # of the document below
_FORM = ("code", "symmetric", "block_size", "scale_dtype", "dtype")


def document(
    model: nn.Module, config: QuantConfig, super_weights: Coordinates | None
) -> dict[str, object]:
    """The ``quantization_config`` of a quantized model: how, what was kept, where it is packed."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        **config.to_dict(),
        "super_weights": None if super_weights is None else listed(super_weights),
        "packed": packed_groups(model),
    }


def listed(coordinates: Coordinates) -> dict[str, object]:
    """Coordinates as JSON knows them: {name: [[row, column], ...]}, or by expert below the name."""
    found: dict[str, object] = {}
    for site, pairs in coordinates.weights.items():
        if site.expert is None:
            found[site.name] = pairs.tolist()
        else:
            found.setdefault(site.name, {})[str(site.expert)] = pairs.tolist()
    return found


def stamp(model: nn.Module, config: QuantConfig, super_weights: Coordinates | None) -> None:
    """Let the configuration of a transformers model say that it is quantized, and how.

    ``save_pretrained`` then writes files that can be loaded. A model without a configuration is
    left alone.
    """
    root = base_of(model)[0]
    if not hasattr(getattr(root, "config", None), "to_dict"):
        return
    _own_config(root)
    untie(root)
    root.config.quantization_config = document(root, config, super_weights)
    keep_names(root)
    root.save_pretrained = MethodType(save_pretrained, root)


def save_pretrained(self, save_directory, *args, state_dict=None, **options) -> None:
    """``save_pretrained`` of a model that was quantized in memory: with a tripwire."""
    state_dict = self.state_dict() if state_dict is None else state_dict
    with_tripwire = {**state_dict, **tripwire(packed_groups(self))}
    type(self).save_pretrained(self, save_directory, *args, state_dict=with_tripwire, **options)


def tripwire(groups: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    """A tensor by its name in the files, which stops who takes them for another model's.

    Where the method is not known, transformers ignores all that is packed and draws random
    weights. One of them is here, without an element, so that their shapes differ: an error.
    """
    for group in groups:
        for kind, suffix in (("linear", ".weight"), ("embedding", ".weight"), ("experts", "")):
            for name in group.get(kind, ()):
                return {name + suffix: torch.empty(0)}
    return {}


def keep_names(root: nn.Module) -> None:
    """Let transformers save the names as they are; it knows no others for packed experts."""
    root._weight_conversions = []


def untie(root: nn.Module) -> None:
    """Take packed weights out of what transformers ties: a packed head knows its embedding."""
    keys = getattr(root, "all_tied_weights_keys", None) or {}
    for target, source in list(keys.items()):
        owners = [root.get_submodule(name.rpartition(".")[0]) for name in (target, source)]
        if any(isinstance(owner, (PackedModule, TiedQuantLinear)) for owner in owners):
            forget_tie(root, target)


def forget_tie(root: nn.Module, target: str) -> None:
    """Take one weight out of what transformers ties."""
    del root.all_tied_weights_keys[target]
    root.config.tie_word_embeddings = False
    root.config.get_text_config().tie_word_embeddings = False


def _own_config(root: nn.Module) -> None:
    """Give the model a configuration of its own: others may have been made of the same one."""
    copies: dict[int, object] = {}
    copy.deepcopy(root.config, copies)
    for module in root.modules():
        own = copies.get(id(module.__dict__.get("config")))
        if own is not None:
            module.config = own


def packed_groups(model: nn.Module) -> list[dict[str, object]]:
    """Where a model is packed, by form: a list of {form, names of linear layers, ...}."""
    groups: dict[tuple, dict[str, object]] = {}
    names = {module: name for name, module in model.named_modules()}
    inside: set[nn.Module] = set()  # the experts of a stack
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, QuantExperts):
            inside.update(module)
            _group(groups, module.expert(0)).setdefault("experts", {})[name] = {
                "layout": module.layout, "count": len(module)
            }  # fmt: skip
        elif isinstance(module, QuantEmbedding):
            _group(groups, module).setdefault("embedding", []).append(name)
        elif isinstance(module, TiedQuantLinear):
            embedding = module.embedding
            _group(groups, embedding).setdefault("tied", {})[name] = names[embedding]
        elif isinstance(module, QuantLinear):
            _group(groups, module).setdefault("linear", []).append(name)
    return list(groups.values())


def _group(groups: dict, module: PackedModule) -> dict[str, object]:
    q = module.packed
    r, c = q.plan.block
    form = (
        q.plan.code.name, q.plan.code.symmetric, c if r == 0 else (r, c), q.plan.scale_dtype,
        str(q.dtype).removeprefix("torch."),
    )  # fmt: skip
    return groups.setdefault(form, dict(zip(_FORM, form)))


def rebuild(root: nn.Module, groups: object) -> None:
    """Put empty packed modules, on the meta device, in the places of a model's own.

    Args:
        root: a model whose weights are about to be loaded.
        groups: of ``packed_groups``; names may lack the prefix of a base model, or have it.

    Raises:
        InvalidInput: ``groups`` is not of that form, or names nothing in the model.
    """
    places = places_of(root, root.modules())
    found = 0
    try:
        for group in groups:
            form = {key: group[key] for key in _FORM} | {"outliers": 0}
            form["dtype"] = getattr(torch, form["dtype"])
            if isinstance(form["block_size"], list):
                form["block_size"] = tuple(form["block_size"])
            for kind in ("linear", "embedding", "experts", "tied"):
                for name in group.get(kind, ()):
                    path = _path(root, name)
                    if path is not None:
                        _rebuild(root, path, kind, group[kind], name, form, places)
                        found += 1
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"quantization_config is damaged ({type(error).__name__} {error}): get the file anew"
        ) from error
    if not found:
        raise InvalidInput(
            f"quantization_config names no layer of {type(root).__name__}: it belongs to another "
            "model"
        )


def _rebuild(root, path, kind, entries, name, form, places) -> None:
    if kind == "experts":
        owner, _, parameter = path.rpartition(".")
        module, entry = root.get_submodule(owner), entries[name]
        shape = _expert_shape(getattr(module, parameter).shape, **entry)
        experts = [empty_packed(shape, **form) for _ in range(entry["count"])]
        stack = QuantExperts.from_packed(experts, entry["layout"])
        return replace_parameter(module, parameter, stack)
    module = root.get_submodule(path)
    if kind == "tied":
        new = TiedQuantLinear(root.get_submodule(_path(root, entries[name])), module.bias)
    elif kind == "embedding":
        shape = module.num_embeddings, module.embedding_dim
        new = QuantEmbedding(empty_packed(shape, **form), module.padding_idx)
        new.to(module.weight.dtype)
    else:
        new = QuantLinear(empty_packed(features(module), **form), module.bias)
    for parent, child in places[module]:
        parent._modules[child] = new
    return None


def _expert_shape(shape: torch.Size, layout: str, count: int) -> tuple[int, int]:
    """(D, H) of an expert of a parameter."""
    if len(shape) == 2:
        shape = (count, shape[0] // count, shape[1])
    _, rows, columns = shape
    return (columns, rows) if layout in ("eio", "ei_o") else (rows, columns)


def _path(root: nn.Module, name: str) -> str | None:
    """The path of a module or parameter, also where a model is a part of the one that was saved."""
    prefix = f"{getattr(root, 'base_model_prefix', '') or ''}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        owner, _, last = path.rpartition(".")
        try:
            if hasattr(root.get_submodule(owner), last):
                return path
        except AttributeError:
            continue
    return None
