"""The ``quantization_config`` of ``from_pretrained``, and of a quantized model's config.json."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from swkernels.errors import InvalidInput
from swkernels.quant.checkpoint import METHOD, VERSION, document, listed
from swkernels.quant.config import QuantConfig
from swkernels.quant.super_weights import read_super_weights
from swkernels.train.coordinates import Coordinates


class SuperWeightQuantConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model while it loads it.

    Args:
        config: a ``swkernels.QuantConfig``; or its fields as keywords (code, block_size, ...).
        super_weights: what is kept exactly, as in ``swkernels.quantize``: a ``ScanReport``,
            ``Coordinates``, the path of a file of either, or {name: [[row, column], ...]}.
        progress: called with (stage, weights done, weights) while a model is loaded.

    Raises:
        InvalidInput: a field that is unknown or wrong, or a file that cannot be read.
    """

    def __init__(
        self,
        config: QuantConfig | None = None,
        *,
        super_weights: object = None,
        progress: Callable[[str, int, int], None] | None = None,
        **fields_given,
    ):
        self.quant_method = METHOD
        self.progress = progress
        if config is not None and (fields_given or not isinstance(config, QuantConfig)):
            given = fields_given or type(config).__name__
            raise InvalidInput(f"expected a QuantConfig or its fields as keywords, got {given}")
        self.config = QuantConfig.from_dict(fields_given) if config is None else config
        by_hand = isinstance(super_weights, Mapping) and "schema" not in super_weights
        # What lists names by hand is read with the model, which has the shapes.
        self.super_weights = super_weights if by_hand else read_super_weights(super_weights)

    @classmethod
    def from_dict(cls, config_dict: Mapping, return_unused_kwargs: bool = False, **kwargs):
        """The config of a dict; that of a quantized model says where it is packed."""
        given = dict(config_dict)
        method = given.pop("quant_method", METHOD)
        if method != METHOD:
            raise InvalidInput(f"quant_method must be {METHOD!r}, got {method!r}")
        config = QuantizedModelConfig(given) if "version" in given else cls(**given)
        return (config, kwargs) if return_unused_kwargs else config

    def coordinates(self, model: nn.Module) -> Coordinates | None:
        """The super weights, in a model."""
        return read_super_weights(self.super_weights, model)

    def of_model(self, model: nn.Module, coordinates: Coordinates | None) -> SuperWeightQuantConfig:
        """The config of a model that has been quantized."""
        return QuantizedModelConfig(document(model, self.config, coordinates))

    def to_dict(self) -> dict:
        """The fields as JSON knows them."""
        kept = self.super_weights
        if isinstance(kept, Coordinates):
            kept = listed(kept)
        return {"quant_method": METHOD, **self.config.to_dict(), "super_weights": kept}

    def __iter__(self):
        yield from self.to_dict().items()


class QuantizedModelConfig(SuperWeightQuantConfig):
    """Of a model that is quantized: nothing about it can be asked for any more.

    It is a class of its own so that transformers refuses a config beside it.
    """

    def __init__(self, content: Mapping):
        self.quant_method = METHOD
        self.content = copy.deepcopy(dict(content)) | {"quant_method": METHOD}
        version = self.content.get("version")
        if version != VERSION:
            raise InvalidInput(
                f"the quantization_config is of version {version!r}, expected {VERSION}: update "
                "swkernels, or quantize the model again"
            )
        if "packed" not in self.content:
            raise InvalidInput(
                "the quantization_config does not say where the model is packed: get the file anew"
            )
        known = {field.name for field in fields(QuantConfig)}
        self.config = QuantConfig.from_dict({k: v for k, v in self.content.items() if k in known})
        self.super_weights = self.content.get("super_weights")

    @property
    def packed(self) -> object:
        """Where the model is packed; see ``swkernels.quant.checkpoint.packed_groups``."""
        return self.content["packed"]

    def to_dict(self) -> dict:
        return copy.deepcopy(self.content)
