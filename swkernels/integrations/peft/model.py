"""The tuner: puts layers of deltas into a model, as PEFT's own methods do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.train.sites import Target, find_targets

from .config import PREFIX, SparseCoordinateConfig
from .experts import SparseExpertsLayer
from .layer import SparseCoordinateLayer
from .origin import base_of_target, check_base


class SparseCoordinateModel(BaseTuner):
    """A model with deltas at the coordinates of a ``SparseCoordinateConfig``.

    ``get_peft_model`` makes it. What is wrong with the coordinates, or with the base of a loaded
    adapter, is raised as InvalidInput before the model is changed.
    """

    prefix = PREFIX
    tuner_layer_cls = SparseCoordinateLayer
    target_module_mapping: dict = {}

    @staticmethod
    def _check_target_module_exists(peft_config: SparseCoordinateConfig, key: str) -> bool:
        return key in peft_config.module_names  # whole names; PEFT's own compares their ends

    def _prepare_model(self, peft_config: SparseCoordinateConfig, model: nn.Module) -> None:
        layers = _layers(model)
        name = [name for name, config in self.peft_config.items() if config is peft_config][-1]
        for key, layer in layers.items():
            if key in peft_config.module_names and name in layer.values:
                raise InvalidInput(
                    f"the model has an adapter {name!r} already: choose another name or unload it"
                )
        if any(layer.merged for layer in layers.values()):
            warnings.warn("An adapter is merged: it is unmerged first.", stacklevel=2)
            self.unmerge_adapter()
        with _unwrapped(model, layers):
            coordinates = peft_config.resolve(model)
            targets = find_targets(model, coordinates)
        base = {}
        for site, target in targets.items():
            found = base_of_target(target, coordinates.weights[site])
            expected = peft_config.base.get(site)
            check_base(str(site), expected, found)
            base[site] = found or expected
        peft_config.coordinates, peft_config.base = coordinates, base
        ordered = sorted(targets.values(), key=lambda target: target.site)
        groups = groupby(ordered, key=lambda target: target.site.name)
        self._targets: dict[str, list[Target]] = {key: list(group) for key, group in groups}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **unused
    ) -> None:
        targets = self._targets[current_key]
        layer = target
        if not isinstance(layer, SparseCoordinateLayer):
            projection = targets[0].projection
            if projection is not None and projection.experts is not None:
                layer = SparseExpertsLayer(target, targets[0])
            else:
                layer = SparseCoordinateLayer(target, targets[0].shape)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(
            adapter_name,
            targets,
            [peft_config.coordinates.weights[target.site] for target in targets],
            [peft_config.base[target.site] for target in targets],
        )

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # A layer makes its tensors where its base computes; PEFT's own way expects a weight.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in _layers(self.model).values():
            layer.check_merge()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # PyTorch calls this before it loads anything below: all or nothing is loaded.
        for name, layer in _layers(self.model).items():
            layer.check_file(name, state_dict, f"{prefix}model.{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _layers(model: nn.Module) -> dict[str, SparseCoordinateLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseCoordinateLayer)
    }


@contextmanager
def _unwrapped(model: nn.Module, layers: dict[str, SparseCoordinateLayer]) -> Iterator[None]:
    """Inside the ``with`` block the base layers are in their old places, under their old names."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
