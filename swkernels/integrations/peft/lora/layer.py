"""PEFT's LoRA layers with masks: they compute with masked factors, and save ordinary ones."""

from __future__ import annotations

from functools import cache

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, LoraLayer
from peft.utils.other import transpose
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.ops.lora_linear import correction

from .config import MaskedLoraConfig
from .fused import add_adapters
from .mask import FactorMask

ORIGINALS = "originals"  # in state dicts, beside the weight of lora_A


class MaskedLora:
    """What is put before one of PEFT's LoRA layers: masks by adapter."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.set_mask(adapter_name, config, kwargs["target_name"])

    def set_mask(self, adapter: str, config: MaskedLoraConfig, name: str) -> None:
        """Give an adapter the mask that its configuration names for this layer.

        Args:
            name: of the layer in the model.
        """
        if not hasattr(self, "masks"):
            self.masks: dict[str, FactorMask] = {}
            self.loaded: list[str] = []
            self.name = name
            self._register_state_dict_hook(_pack)
            self.register_load_state_dict_pre_hook(_unpack)
            self.register_load_state_dict_post_hook(_take)
        self.masks.pop(adapter, None)
        mask = config.mask_of(name, (self.out_features, self.in_features))
        extra = 0 if mask is None else mask.extra_rank
        config.note_rank(name, self.r[adapter], self.scaling[adapter], extra)
        if mask is not None:
            self.masks[adapter] = mask
            self.take_held(adapter)

    def take_held(self, adapter: str) -> None:
        """Hold an adapter's masked entries, if its mask holds any, at their present values."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        self.masks[adapter].take(A, B, self.scaling[adapter])

    def effective_factors(self, adapter: str, device: torch.device):
        """(A [r, H], B [D, r], mask) that dW consists of."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        mask = self.masks.get(adapter)
        if mask is None:
            return A, B, None
        mask.to(device)
        return mask.factors(A, B)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base layer's output [..., D] with the adapters' contribution."""
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise InvalidInput(
                "adapter_names mixes adapters in a batch, which masked LoRA does not: call "
                "set_adapter and run the adapters one after the other"
            )
        for key in VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        return add_adapters(self, x, self.base_layer(x, *args, **kwargs))

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """dW as it is merged into the base's weight, in its layout."""
        if adapter not in self.masks:
            return super().get_delta_weight(adapter)
        dtype = self.lora_B[adapter].weight.dtype
        A, B, mask = self.effective_factors(adapter, self.lora_B[adapter].weight.device)
        A, B = A.detach().float(), B.detach().float()
        scaling = self.scaling[adapter]
        if mask is not None and mask.row_scale is not None:
            B = B * mask.row_scale[:, None]
        if mask is not None and mask.column_scale is not None:
            A = A * mask.column_scale
        delta = (B @ A) * scaling
        if mask is not None and mask.pattern is not None:
            pattern = mask.pattern
            at = pattern.rows.long(), pattern.cols.long()
            delta[at] = delta[at] + correction(A, B, scaling, mask)
        return transpose(delta, getattr(self, "fan_in_fan_out", False)).to(dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        self.masks.pop(adapter_name, None)
        super().delete_adapter(adapter_name)


@cache
def masked(layer_class: type[LoraLayer]) -> type[LoraLayer]:
    """The masked kind of one of PEFT's LoRA layers."""
    namespace = {"__module__": __name__}
    return type(f"Masked{layer_class.__name__}", (MaskedLora, layer_class), namespace)


def __getattr__(name: str) -> type[LoraLayer]:
    """The masked kinds by their names, for pickle."""
    found = getattr(lora, name.removeprefix("Masked"), None) if name.startswith("Masked") else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return masked(found)


def _pack(layer: MaskedLora, state: dict, prefix: str, metadata) -> None:
    """Put the masked factors where PyTorch has put the factors."""
    for adapter, mask in layer.masks.items():
        key_A, key_B, originals = _keys(prefix, adapter)
        if key_A not in state:
            continue
        A, B = state[key_A], state[key_B]
        if hasattr(A, "to_local"):
            raise InvalidInput(
                f"the factors of {layer.name} are sharded and cannot be masked in a state dict: "
                "gather the model first"
            )
        mask.to(A.device)
        state[key_A], state[key_B] = mask.pack(A, B, layer.scaling[adapter])
        if mask.needs_originals:
            state[originals] = mask.originals(A, B)


def _unpack(layer: MaskedLora, state: dict, prefix: str, *args) -> None:
    """Put the factors where a file has the masked ones."""
    for adapter, mask in layer.masks.items():
        key_A, key_B, originals = _keys(prefix, adapter)
        stored = state.pop(originals, None)
        if key_A in state and key_B in state:
            A, B = state[key_A], state[key_B]
            r = layer.r[adapter]
            state[key_A], state[key_B] = mask.unpack(layer.name, r, A, B, stored)
            layer.loaded.append(adapter)


def _take(layer: nn.Module, incompatible) -> None:
    while layer.loaded:  # of the others the parameters may not be what is held
        layer.take_held(layer.loaded.pop())


def _keys(prefix: str, adapter: str) -> tuple[str, str, str]:
    A, B = f"{prefix}lora_A.{adapter}", f"{prefix}lora_B.{adapter}"
    return f"{A}.weight", f"{B}.weight", f"{A}.{ORIGINALS}"
