"""The tuner: PEFT's own LoRA model with masked layers."""

from __future__ import annotations

import warnings

from peft import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.structure import features
from swkernels.train.lora_masks import check_inside

from .config import MaskedLoraConfig
from .fused import share_inputs
from .layer import MaskedLora, masked


class MaskedLoraModel(LoraModel):
    """A model with the LoRA of a ``MaskedLoraConfig``; ``get_peft_model`` makes it.

    What is wrong with the mask is raised as InvalidInput before the model is changed.
    """

    def inject_adapter(self, model: nn.Module, *args, **kwargs) -> None:
        super().inject_adapter(model, *args, **kwargs)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, MaskedLora)}
        share_inputs(layers.items())

    def _prepare_model(self, peft_config: MaskedLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        shapes = {}
        for name, module in model.named_modules():
            if _is_part(name, model) or not self._check_target_module_exists(peft_config, name):
                continue
            shapes[name] = features(module)
            if shapes[name] is None:
                raise InvalidInput(
                    f"{name} ({type(module).__name__}) is no linear layer: take it out of "
                    "target_modules"
                )
        peft_config.set_adapted(set(shapes))
        if not peft_config.is_masked:
            return
        places = {name: peft_config.place(name, shape) for name, shape in shapes.items()}
        outside = {name: (place.outside, shapes[name]) for name, place in places.items()}
        if peft_config.strict:
            check_inside(outside)
        if shapes and not any(len(place.inside) for place in places.values()):
            raise InvalidInput(
                f"no coordinate lies in any of the {len(shapes)} adapted modules: name their "
                "layers, or modules in them"
            )
        count = sum(place.outside for place in places.values())
        if count:
            warnings.warn(
                f"{count} coordinates lie outside the weights of the adapted modules of their "
                "layer and are passed over (swkernels.train.lora_mask_report counts them)",
                stacklevel=2,
            )

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs) -> LoraLayer:
        layer = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        layer.__class__ = masked(type(layer))
        layer.set_mask(adapter_name, lora_config, kwargs["target_name"])
        return layer

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        if any(config.is_masked for config in self.peft_config.values()):
            raise InvalidInput(
                "masked adapters cannot be combined by their factors: save them and open them "
                "with PEFT's LoraConfig first"
            )
        super().add_weighted_adapter(*args, **kwargs)


def _is_part(name: str, model: nn.Module) -> bool:
    """Whether a module is a part of a layer that a tuner has made."""
    parents = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[: end + 1])), BaseTunerLayer)
        for end in range(len(parents))
    )
