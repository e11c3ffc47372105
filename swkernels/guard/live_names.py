"""Which weights of a live model are which tensors of the checkpoint that it was loaded from.

transformers renames tensors on loading and joins experts that have tensors of their own, gate and
up projections into one. Where that is known to be all it does, the part of the model's weight that
is the checkpoint's tensor is found; any other tensor has no match, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.kinds import expert_named, projection_kind
from swkernels.models.stored import StoredProjection, stored_projections
from swkernels.models.structure import base_of

from .manifest import Tensor

_WRAPPERS = ("base_layer.", "_orig_mod.")


@dataclass(frozen=True)
class Match:
    """What a tensor of a manifest is in a model.

    Attributes:
        name: of the model's weight; None without one.
        value: it, or the part of it that is the tensor, in the tensor's shape; None without one.
        reason: why there is none.
    """

    name: str | None
    value: torch.Tensor | None
    reason: str = ""


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, as a checkpoint calls them; adapters are looked through."""
    root = base_of(model)[0]
    found = dict(root.named_parameters(remove_duplicate=False)) | dict(
        root.named_buffers(remove_duplicate=False)
    )
    plain = {}
    for name, tensor in found.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        plain[name] = tensor.detach()
    return plain


def match(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Match]:
    """Return what each tensor of a manifest is in ``model``.

    Args:
        tensors: of the manifest, by name.
    """
    live = live_tensors(model)
    rename = _renaming(base_of(model)[0], live)
    projections = _projections(live)
    return {name: _match(tensor, live, rename(name), projections, model)
            for name, tensor in tensors.items()}  # fmt: skip


def _match(tensor: Tensor, live: dict, renamed: tuple[str, bool], projections, model) -> Match:
    name, joined = renamed
    if name not in live:
        return Match(None, None, _why_missing(model, name))
    whole = live[name]
    if hasattr(whole, "__tensor_flatten__"):
        kind = type(whole).__name__
        return Match(name, None, f"{name} is a {kind}: load the model unquantized and unsharded")
    if not joined and tuple(whole.shape) == tensor.shape:
        return Match(name, whole)
    if joined:
        part = _part(tensor, whole, projections.get((name, expert_named(tensor.name))))
        if part is not None:
            return Match(name, part)
        return Match(name, None, f"the model has {name}, made of it and others")
    made = f"{list(whole.shape)} {whole.dtype}"
    return Match(name, None, f"the model's {name} is {made}: packed, sharded or of another model")


def _part(tensor: Tensor, whole: torch.Tensor, place: StoredProjection | None):
    """The part of a weight of fused experts that is the tensor; None where it cannot be told."""
    if place is None:
        return None
    matrix = place.view(whole)  # [D, H]
    kind = projection_kind(tensor.name)
    if place.kind == "gate_up" and kind in ("gate", "up"):
        half = len(matrix) // 2
        matrix = matrix[:half] if kind == "gate" else matrix[half:]
    elif place.kind != kind:
        return None
    return matrix if tuple(matrix.shape) == tensor.shape else None


def _projections(live: dict[str, torch.Tensor]) -> dict:
    """The fused projections of a model by (name, expert)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    try:
        found = stored_projections(shapes)
    except InvalidInput:  # how experts are stored cannot be told
        return {}
    return {(place.name, place.expert): place for place in found if place.fused}


def _renaming(root: nn.Module, live: dict) -> Callable[[str], tuple[str, bool]]:
    """A function from a name in the checkpoint to (name in the model, whether others join it)."""
    if not hasattr(root, "base_model_prefix"):
        return lambda name: (name, False)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(root, None, None) or []
    rules = (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )

    def rename(name: str) -> tuple[str, bool]:
        new, pattern = rename_source_key(name, *rules, root.base_model_prefix, live)
        return (new, pattern is not None) if new in live else (name, False)

    return rename


def _why_missing(model: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    try:
        module = base_of(base_of(model)[0].get_submodule(path))[0]
    except AttributeError:
        return "the model has no such tensor"
    return f"{path} is a {type(module).__name__} without it: packed, or of another model"
