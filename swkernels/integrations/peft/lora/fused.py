"""A LoRA layer's forward through ``ops.lora_linear``; q, k and v read their input once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from swkernels.models.structure import base_of
from swkernels.ops.lora_linear import as_seed, check_lora, lora_expand, lora_project
from swkernels.train.sites import _FRESH_OUTPUT

# Modules below one parent that are called with one input.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def factors(layer: LoraLayer, adapter: str, device: torch.device):
    """Return (A [r, H], B [D, r], mask) of one adapter as the product is computed with them."""
    effective = getattr(layer, "effective_factors", None)
    if effective is not None:
        return effective(adapter, device)
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, None


def dropout_of(layer: LoraLayer, adapter: str) -> float:
    """The dropout that acts on the input of an adapter now."""
    dropout = layer.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def add_adapters(layer: LoraLayer, x: torch.Tensor, base_out: torch.Tensor) -> torch.Tensor:
    """Return the base layer's output plus what the active adapters contribute for x [..., H]."""
    inplace = _is_fresh(layer.base_layer)
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        A, B, mask = factors(layer, adapter, x.device)
        check_lora(x, base_out, A, B, mask)
        S, columns = _project(layer, adapter, x)
        scaling = layer.scaling[adapter]
        base_out = lora_expand(base_out, S, columns, A, B, scaling, mask, inplace=inplace)
        inplace = True
    return base_out


def _project(layer: LoraLayer, adapter: str, x: torch.Tensor):
    dropout = dropout_of(layer, adapter)
    shared = getattr(layer, "shared_input", None)
    alone = shared is None or len(layer.active_adapters) > 1
    if not (alone or dropout or torch.compiler.is_compiling()):
        return shared.project(layer, adapter, x)
    A, _, mask = factors(layer, adapter, x.device)
    [projected] = lora_project(x, [A], [mask], dropout, as_seed(None, dropout, x))
    return projected


class SharedInput:
    """Layers that are called with one input: the first of them projects it for all.

    Nothing is kept longer than until the last of them has been called, and nothing of another
    input is ever used: the tensor itself is compared, and whether it has been changed since.
    """

    def __init__(self, layers: list[LoraLayer]):
        self._layers = layers
        self._forget()

    def project(self, layer: LoraLayer, adapter: str, x: torch.Tensor):
        """What ``lora_project`` returns for one layer."""
        key = (adapter, x._version if not x.is_inference() else 0, torch.is_grad_enabled())
        source = self._source() if self._source is not None else None
        if source is not x or self._key != key or id(layer) not in self._ready:
            self._compute(layer, adapter, x)
            self._source, self._key = weakref.ref(x), key
        projected = self._ready.pop(id(layer))
        if not self._ready:
            self._forget()
        return projected

    def _compute(self, layer: LoraLayer, adapter: str, x: torch.Tensor) -> None:
        layers = [layer]  # a replica of a layer is none of these and goes alone
        if any(other is layer for other in self._layers):
            layers = [other for other in self._layers if _joins(other, adapter, x)]
        listed = [factors(other, adapter, x.device) for other in layers]
        As, masks = [A for A, _, _ in listed], [mask for _, _, mask in listed]
        projected = lora_project(x, As, masks, 0.0, None)
        self._ready = {id(other): part for other, part in zip(layers, projected)}

    def _forget(self) -> None:
        self._source, self._key, self._ready = None, None, {}

    def __getstate__(self) -> dict:
        return {"_layers": self._layers}

    def __setstate__(self, state: dict) -> None:
        self._layers = state["_layers"]
        self._forget()


def share_inputs(layers: Iterable[tuple[str, LoraLayer]]) -> None:
    """Let layers (by name) that are called with one input read it once."""
    by_name = dict(layers)
    for name in by_name:
        parent, _, last = name.rpartition(".")
        for siblings in _SIBLINGS:
            if last == siblings[0]:
                found = [by_name.get(f"{parent}.{sibling}") for sibling in siblings]
                group = [layer for layer in found if layer is not None]
                shared = SharedInput(group) if len(group) > 1 else None
                for layer in group:
                    layer.shared_input = shared


def _joins(layer: LoraLayer, adapter: str, x: torch.Tensor) -> bool:
    """Whether a layer will ask for this adapter's projection of x too."""
    return (
        adapter in layer.active_adapters
        and adapter in layer.lora_A
        and not layer.disable_adapters
        and not layer.merged
        and layer.in_features == x.shape[-1]
        and not dropout_of(layer, adapter)
        and layer.lora_A[adapter].weight.device == x.device
    )


def _is_fresh(base_layer: nn.Module) -> bool:
    """Whether the layer's output belongs to nobody else, so that it may be changed in place."""
    hooked = base_layer._forward_hooks or base_layer._backward_hooks
    hooked = hooked or base_layer._backward_pre_hooks
    return type(base_of(base_layer)[0]).__name__ in _FRESH_OUTPUT and not hooked
