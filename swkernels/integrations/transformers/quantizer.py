"""Quantize while loading, and load what is quantized: the method's part in ``from_pretrained``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from swkernels.errors import InvalidInput, SwkernelsError
from swkernels.nn import QuantLinear
from swkernels.nn.packed import PackedModule
from swkernels.nn.quant_experts import QuantExperts, replace_parameter
from swkernels.quant.checkpoint import (
    METHOD,
    forget_tie,
    keep_names,
    packed_groups,
    rebuild,
    tripwire,
)
from swkernels.quant.model import label_of, pack, replacement_of, size_of
from swkernels.quant.report import LayerReport, QuantReport
from swkernels.quant.selection import Layer, places_of, select
from swkernels.quant.super_weights import find_listed

from .config import QuantizedModelConfig, SuperWeightQuantConfig


def register() -> None:
    """Make the method known to transformers, once in a process."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SuperWeightQuantConfig)
        register_quantizer(METHOD)(SuperWeightQuantizer)


class SuperWeightQuantizer(HfQuantizer):
    """What ``from_pretrained`` calls; users meet it as ``model.hf_quantizer``.

    A model in full precision keeps its modules until their weights are read; then each weight is
    packed and its module replaced, one after the other. A quantized model gets empty packed
    modules first, which the loader fills; afterwards every one of them is verified.

    Attributes:
        reports: of each matrix that was packed while loading.
        left_out: (name, reason) of each that was not.
    """

    def __init__(self, quantization_config: SuperWeightQuantConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized != isinstance(quantization_config, QuantizedModelConfig):
            raise InvalidInput(
                "the config.json of this model says nothing of how it is packed: get it anew"
                if self.pre_quantized
                else "expected a SuperWeightQuantConfig, got the config of a quantized model"
            )
        self.reports: list[LayerReport] = []
        self.left_out: list[tuple[str, str]] = []
        self.refused: SwkernelsError | None = None
        self._layers: dict[str, list[Layer]] = {}  # that wait for a weight, by its names
        self._replaced: set[str] = set()  # of these names, those that will be gone

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        """Raise InvalidInput for a device map that offloads to a disk."""
        if device_map == "disk" or (
            isinstance(device_map, dict) and "disk" in device_map.values()
        ):
            raise InvalidInput("packed weights cannot lie on a disk: take it out of device_map")

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes of a weight once it is packed, which device maps are made by."""
        return None if self.pre_quantized else self.quantization_config.config.bits / 8

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict, dict]:
        """What ``save_pretrained`` writes."""
        return {**model.state_dict(), **tripwire(packed_groups(model))}, {}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        """Whether the loader leaves a tensor to this quantizer.

        Of a quantized model that means that the loader does not compare shapes: how many outliers
        there are is the file's to say, and ``verify`` checks all of it.
        """
        if self.pre_quantized:
            return param_name.rpartition(".")[2].startswith("packed_")
        return param_name in self._layers

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def report(self, model: nn.Module) -> QuantReport:
        """What was done to ``model`` while it was loaded, in the model's order."""
        order = {name: number for number, (name, _) in enumerate(model.named_modules())}
        layers = sorted(self.reports, key=lambda one: (order[one.name], one.expert or 0))
        after = size_of(model)
        before = after + sum(one.bytes_before - one.bytes_after for one in layers)
        config = self.quantization_config.config
        left_out = tuple(self.left_out)
        return QuantReport(label_of(model), config, tuple(layers), left_out, before, after)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.pre_quantized:
            rebuild(model, self.quantization_config.packed)
            known = model._keys_to_ignore_on_load_unexpected
            names = [f"{re.escape(name)}$" for name in tripwire(self.quantization_config.packed)]
            kind = set if isinstance(known, set) else list  # transformers 5.0 has a list, or None
            model._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *names])
            _mark_initialized(model)
            return
        config = self.quantization_config
        _tie(model)
        with _unmarked(model):
            layers, self.left_out = select(model, config.config)
        with torch.device("cpu"):  # tensors are made on the meta device otherwise
            self._coordinates = config.coordinates(model)
            self._listed = find_listed(model, self._coordinates)
        self._places = places_of(model, [layer.module for layer in layers])
        self._embedding: nn.Module | None = None
        # Weights that are tied are one parameter: the file may have it under any of its names.
        by_weight: dict[nn.Parameter, list[Layer]] = {}
        for layer in layers:
            by_weight.setdefault(layer.weight, []).append(layer)
        self._done, self._total = 0, len(by_weight)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in by_weight:
                self._layers[name] = by_weight[parameter]
                owner = model.get_submodule(name.rpartition(".")[0])
                if owner in self._places:
                    self._replaced.add(name)
        for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
            if target in self._layers or source in self._layers:
                forget_tie(model, target)

    def pack(self, name: str, weight: torch.Tensor, missing_keys: set[str]) -> bool:
        """Pack a weight that was read, under the name it has, for all layers that wait for it.

        Returns:
            Whether the parameter of that name is still there.
        """
        layers = self._layers[name]
        if layers and self.refused is None:
            self._pack(layers, weight)
            self._show_progress()
        missing_keys -= {n for n in self._replaced if self._layers[n] is layers}
        layers.clear()
        return name not in self._replaced

    def _pack(self, layers: list[Layer], weight: torch.Tensor) -> None:
        expected = layers[0].weight
        if weight.shape != expected.shape:
            self.refused = InvalidInput(
                f"{layers[0].name} is {list(weight.shape)} in the checkpoint, expected "
                f"{list(expected.shape)}"
            )
            return
        parameter = nn.Parameter(weight, requires_grad=False)
        listed = {
            (parameter, expert): pairs
            for (other, expert), pairs in self._listed.items()
            if other is expected
        }
        for layer in layers:
            setattr(layer.module, layer.parameter, parameter)
        try:
            packed, reports = pack(layers[0], self.quantization_config.config, listed)
        except SwkernelsError as error:  # the loader would make a report of it
            self.refused = error
            return
        self.reports += reports
        for layer in layers:
            self._put(layer, packed)

    def _show_progress(self) -> None:
        self._done += 1
        if self.quantization_config.progress is not None:
            self.quantization_config.progress("packing", self._done, self._total)

    def _put(self, layer: Layer, packed: list) -> None:
        if layer.kind == "experts":
            stack = QuantExperts.from_packed(packed, layer.layout)
            replace_parameter(layer.module, layer.parameter, stack)
            _mark_initialized(stack)
            return
        module = replacement_of(layer, packed[0], self._embedding)
        if layer.kind == "embedding":
            self._embedding = self._embedding or module
        _mark_initialized(module)
        for parent, name in self._places[layer.module]:
            parent._modules[name] = module

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if self.refused is not None:
            raise self.refused
        missing = [layers[0].name for layers in self._layers.values() if layers]
        if missing:
            raise InvalidInput(f"the checkpoint has no weight for {missing[0]}: it is incomplete")
        for name, module in model.named_modules():
            if isinstance(module, PackedModule):
                module.verify(name)
            if isinstance(module, QuantLinear) and module.bias is not None:
                module.bias.requires_grad_(False)
        if not self.pre_quantized:
            config = self.quantization_config.of_model(model, self._coordinates)
            self.quantization_config = model.config.quantization_config = config
            del self._places, self._listed, self._embedding
        keep_names(model)
        return model


class _Pack(ConversionOps):
    """The loader's step for a weight that is to be packed."""

    def __init__(self, quantizer: SuperWeightQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict, *, full_layer_name, missing_keys, **kwargs) -> dict:
        [value] = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        stays = self.quantizer.pack(full_layer_name, weight, missing_keys)
        return {full_layer_name: weight} if stays else {}


def _tie(model: nn.Module) -> None:
    """Make tied weights one parameter, as they will be; transformers puts this off."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(source))


def _mark_initialized(model: nn.Module) -> None:
    """Keep transformers from drawing weights for packed modules, which have none."""
    for module in model.modules():
        if isinstance(module, (PackedModule, QuantExperts)):
            module._is_hf_initialized = True


@contextmanager
def _unmarked(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the model is not marked as quantized, which it is not yet."""
    config = model.config.__dict__.pop("quantization_config")
    model.is_quantized = False
    try:
        yield
    finally:
        model.config.quantization_config = config
        model.is_quantized = True
