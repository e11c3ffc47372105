"""PEFT's own LoRA layers through the fused operation, one instance at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from swkernels.errors import InvalidInput

from .fused import add_adapters, share_inputs
from .layer import MaskedLora


@dataclass
class AcceleratedLora:
    """What ``accelerate_lora`` has done.

    Attributes:
        taken: names of the layers that run through the fused operation.
        left: name of each other LoRA layer: why PEFT's own forward runs it.
    """

    taken: list[str]
    left: dict[str, str]
    _layers: list[LoraLayer] = field(repr=False, default_factory=list)

    def remove(self) -> None:
        """Give the layers PEFT's own forward back."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
            layer.__dict__.pop("shared_input", None)
        self._layers = []

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines = [f"{len(self.taken)} LoRA layers accelerated, {len(self.left)} left to PEFT"]
        lines += [f"{len(n)} left: {reason} ({n[0]})" for reason, n in reasons.items()]
        return "\n".join(lines)


def accelerate_lora(model: nn.Module, *, strict: bool = False) -> AcceleratedLora:
    """Run the LoRA layers of a model that PEFT made through ``ops.lora_linear``.

    Per instance, and only where the case is covered: a linear base layer (plain, Conv1D,
    bitsandbytes), vanilla LoRA without a bias. What changes later (merged, disabled, several
    active adapters, a batch of mixed adapters) falls to PEFT's own forward in that call. Weights,
    names and files stay as they are.

    Args:
        model: of ``get_peft_model`` or ``PeftModel.from_pretrained``.
        strict: raise where a LoRA layer is not covered.

    Returns:
        Which layers were taken, which were left, and why; ``remove()`` undoes it.

    Raises:
        InvalidInput: there is no LoRA layer, none is covered, or ``strict``; nothing is changed.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise InvalidInput(
            "the model has no LoRA layer: make one with peft.get_peft_model and a LoraConfig"
        )
    left = {name: why for name, layer in layers.items() if (why := _not_covered(layer))}
    taken = {name: layer for name, layer in layers.items() if name not in left}
    report = AcceleratedLora(list(taken), left, list(taken.values()))
    if not taken or (strict and left):
        raise InvalidInput(
            f"not every LoRA layer is covered by the fused operation: {report}".replace("\n", "; ")
        )
    for layer in taken.values():
        layer.forward = MethodType(_forward, layer)
    share_inputs(taken.items())
    return report


def _not_covered(layer: LoraLayer) -> str | None:
    """Why a layer's forward cannot be replaced, or None."""
    if isinstance(layer, MaskedLora):
        return "it is a masked layer, which runs through the fused operation already"
    if "forward" in layer.__dict__:
        return "its forward has been replaced already"
    if not isinstance(layer, Linear) and type(layer).__name__ not in _BITSANDBYTES:
        return f"a {type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__} layer"
    if type(layer).forward is not _defining(layer).forward:
        return f"{type(layer).__name__} has a forward of its own"
    if layer.lora_variant:
        names = {type(variant).__name__ for variant in layer.lora_variant.values()}
        return f"a variant of LoRA ({', '.join(sorted(names))})"
    if any(layer.lora_bias.values()):
        return "lora_bias"
    for adapter in layer.lora_A:
        parts = layer.lora_A[adapter], layer.lora_B[adapter]
        if any(type(part) is not nn.Linear or part._forward_hooks for part in parts):
            return "its factors are no plain linear layers, or have hooks"
        if type(layer.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
            return f"dropout of the kind {type(layer.lora_dropout[adapter]).__name__}"
    return None


_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def _defining(layer: LoraLayer) -> type:
    """PEFT's own class of a layer."""
    return next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("peft.tuners.lora"))


def _forward(self: LoraLayer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The base layer's output plus the adapter's, where the case is covered in this call."""
    covered = (
        not kwargs
        and not self.disable_adapters
        and not self.merged
        and len(self.active_adapters) == 1
        and not self.lora_variant
        and not any(hasattr(p, "to_local") for p in self.lora_A.parameters())
    )
    if not covered:
        return type(self).forward(self, x, *args, **kwargs)
    return add_adapters(self, x, self.base_layer(x, *args))
