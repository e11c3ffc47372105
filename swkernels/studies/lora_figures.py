"""What a trained LoRA did: how far weights moved, where most, and how large its factors are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from swkernels.train import Coordinates, delta_top, weight_change
from swkernels.train.lora_masks import LayerCoordinates
from swkernels.train.weights import find_weights

from .lab import Lab

GROUPS = 10  # of the weights by magnitude


@dataclass(frozen=True)
class Update:
    """The LoRA of one module, masks included.

    Attributes:
        name: of the module.
        weight: W [D, H], float32.
        B, A: the factors [D, r] and [r, H] whose product, times ``scaling``, is dW.
        delta: dW [D, H].
        scaling: alpha / r.
    """

    name: str
    weight: torch.Tensor
    B: torch.Tensor
    A: torch.Tensor
    delta: torch.Tensor
    scaling: float


def describe(lab: Lab, model: nn.Module, report: dict) -> dict:
    """Figures of a LoRA that is trained.

    Args:
        lab: its model is the one without LoRA.
        model: with it.
        report: what is asked for: ``change_at`` (how far weights moved, at the k largest super
            weights for each k; it reads all weights often) and ``delta_top`` (how many of the
            largest |dW| are listed).

    Returns:
        With ``change_at``, ``change``: summaries of ``weight_change`` over the adapted weights, by
        k and at the "super weights"; a LoRA of other modules of the layer is measured at the same
        (row, column) in those, and None means that none lies inside. ``super_weights``: the summary
        of the super weights themselves. ``update``: see ``sizes``. With ``delta_top``,
        ``delta_top``: {module: [[row, column], ...]}.
    """
    found = {}
    if "change_at" in report:
        found |= _changes(lab, model, report["change_at"])
    if "delta_top" in report:
        listed = delta_top(model, report["delta_top"]).coordinates.weights
        found["delta_top"] = {site.name: pairs.tolist() for site, pairs in listed.items()}
    return found


def _changes(lab: Lab, model: nn.Module, counts: list[int]) -> dict:
    updates = list(updates_of(lab.model, model))
    after = {f"{update.name}.weight": update.weight + update.delta for update in updates}
    shapes = {update.name: tuple(update.weight.shape) for update in updates}
    looked_at = {str(k): lab.top(k) for k in counts} | {"super weights": lab.super_weights}
    places = {name: matched(coordinates, shapes) for name, coordinates in looked_at.items()}
    return {
        "change": {
            name: place and weight_change(lab.model, after, place).summary
            for name, place in places.items()
        },
        "super_weights": _of_super_weights(lab, after),
        "update": sizes(updates),
    }


def updates_of(base: nn.Module, model: nn.Module) -> Iterator[Update]:
    """The LoRA of each module of ``model``; ``base`` is the model without."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    for weight in find_weights(base, layers):
        layer = layers[weight.site.name]
        (adapter,) = layer.lora_A
        state = layer.state_dict()  # its factors with the mask that the layer may have
        B, A = (state[f"lora_{part}.{adapter}.weight"].float() for part in "BA")
        scaling = layer.scaling[adapter]
        yield Update(weight.site.name, weight.read().float(), B, A, (B @ A) * scaling, scaling)


def matched(coordinates: Coordinates, shapes: dict[str, tuple[int, int]]) -> Coordinates | None:
    """Coordinates in the weights ``shapes``: their own, or those of the same layer and indices."""
    layers = LayerCoordinates(coordinates)
    places = {name: layers.place(name, shape, shapes).inside for name, shape in shapes.items()}
    places = {name: inside for name, inside in places.items() if len(inside)}
    return Coordinates(places, {name: shapes[name] for name in places}) if places else None


def _of_super_weights(lab: Lab, after: dict[str, torch.Tensor]) -> dict:
    """The change of the super weights, which stay as they are where their module has no LoRA."""
    adapted = all(f"{site.name}.weight" in after for site in lab.super_weights.weights)
    return weight_change(lab.model, after if adapted else lab.model, lab.super_weights).summary


def sizes(updates: list[Update]) -> dict:
    """How large the factors and their products are.

    Returns:
        ``modules``, and of each, in their order: ``std_B`` and ``std_A`` (of all entries),
        ``mean`` and ``std`` (of |dW| and of dW), ``bound`` (the largest
        |dW_ij| / (alpha / r |B_i| |A_j|), at most 1 but for rounding) and ``tightness`` (its
        mean, over entries whose bound is not 0). ``groups``: the entries of each module in ten
        groups of equal size by |W|, the smallest first, all modules together: the mean ``weight``
        |W| and ``delta`` |dW|, and the median ``relative`` |dW| / |W| (the mean over modules).
    """
    per_module = [_of_module(update) for update in updates]
    columns = {name: [found[name] for found in per_module] for name in per_module[0]}
    groups = columns.pop("groups")
    entries = [update.delta.numel() for update in updates]
    return {
        "modules": [update.name for update in updates],
        "entries": entries,
        **columns,
        "groups": [
            {
                name: sum(n * of[group][name] for n, of in zip(entries, groups)) / sum(entries)
                for name in ("weight", "delta", "relative")
            }
            for group in range(GROUPS)
        ],
    }


def _of_module(update: Update) -> dict:
    size = update.delta.abs()
    bound = update.scaling * update.B.norm(dim=1)[:, None] * update.A.norm(dim=0)  # [D, H]
    ratio = (size / bound)[bound > 0]
    order = update.weight.abs().flatten().argsort(stable=True)
    weights, deltas = (part.flatten()[order].chunk(GROUPS) for part in (update.weight.abs(), size))
    return {
        "std_B": float(update.B.std()),
        "std_A": float(update.A.std()),
        "mean": float(size.double().mean()),
        "std": float(update.delta.double().std()),
        "bound": float(ratio.max()) if len(ratio) else 0.0,
        "tightness": float(ratio.double().mean()) if len(ratio) else 0.0,
        "groups": [
            {
                "weight": float(w.double().mean()),
                "delta": float(d.double().mean()),
                "relative": float((d / w).where(d != 0, 0).median()),
            }
            for w, d in zip(weights, deltas)
        ],
    }
