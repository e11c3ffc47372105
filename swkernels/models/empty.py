"""A language model without its weights, and transformers' way from a checkpoint's tensors to them.

transformers renames tensors of a checkpoint and joins some of them (experts kept apart) to make a
model's weights. ``Converter`` applies that to the tensors of one part of a model at a time.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from swkernels.errors import InvalidInput, SwkernelsError


def empty_model(config, dtype: torch.dtype, **options) -> nn.Module:
    """The language model of a configuration, parameters on the meta device, buffers computed.

    Args:
        config: of transformers.
        dtype: of its parameters.
        options: of ``from_config`` (``trust_remote_code``).

    Raises:
        SwkernelsError: accelerate is not installed.
    """
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise SwkernelsError(
            "streaming needs the library accelerate: pip install 'swkernels[stream]'"
        ) from error
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.initialization import no_init_weights

    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    factory = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = factory.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    return model.eval()


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter that has several names: the others."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {
        name: [other for other in same if other != name]
        for same in names.values()
        if len(same) > 1
        for name in same
    }


Places = list[tuple[nn.Module, str, torch.Tensor]]  # of a parameter: its owner, its name, itself


class Converter:
    """Fills parts of an empty model.

    Args:
        model: from ``empty_model``.
        device, dtype: of the weights.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.modeling_utils import LoadStateDictConfig

        mapping = get_model_conversion_mapping(model, None, None) or []
        self._model = model
        self._names = model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=mapping,
        )

    def target(self, key: str) -> str | None:
        """The (first) parameter or buffer that the checkpoint's tensor ``key`` becomes, if any."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        for rules in ((self._renamings, self._converters), ([], [])):
            name = rename_source_key(key, *rules, prefix, self._names)[0]
            if name in self._names:
                return name
        return None

    def fill(self, name: str, tensors: dict[str, torch.Tensor]) -> Places:
        """Put the weights that ``tensors`` make in their places below the module ``name``.

        Args:
            name: of a module of the model; "" for the model.
            tensors: by their names in the checkpoint, or in the model.

        Returns:
            What stood there before.

        Raises:
            InvalidInput: a tensor has another shape than the model's weight, or cannot be
                converted.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        module = self._model.get_submodule(name)
        before = [
            (owner, key, tensor)
            for owner in module.modules()
            for held in (owner._parameters, owner._buffers)
            for key, tensor in held.items()
            if tensor is not None
        ]
        info, _ = convert_and_load_state_dict_in_model(self._model, tensors, self._config)
        for key, found, expected in info.mismatched_keys:
            raise InvalidInput(
                f"{key} is {list(found)} in the checkpoint, expected {list(expected)}: the "
                "configuration and the weights do not belong together"
            )
        for key, reason in info.conversion_errors.items():
            raise InvalidInput(f"cannot make {key} of the checkpoint's tensors: {reason}")
        return [
            place for place in before if getattr(place[0], place[1], None) is not place[2]
        ]


def put_back(places: Places) -> None:
    """Undo ``Converter.fill``."""
    for owner, key, tensor in places:
        holder = owner._parameters if key in owner._parameters else owner._buffers
        holder[key] = tensor
