"""Put super weights back in a model that bitsandbytes quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from swkernels import ops
from swkernels.detect.report import ScanReport
from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of
from swkernels.ops import QuantizedTensor
from swkernels.train import Coordinates, Site
from swkernels.train.sites import _FRESH_OUTPUT, find_targets
from swkernels.train.weights import as_site, find_weights, readable

from .layers import read_layer, scales_of, values_at


@dataclass(frozen=True)
class Restored:
    """One super weight.

    Attributes:
        module, row, column: where.
        before: what the quantized layer multiplied by.
        after: the exact value.
    """

    module: str
    row: int
    column: int
    before: float
    after: float


class RestoreHandle:
    """What ``restore_super_weights`` has done.

    Attributes:
        report: what was restored, by module, row and column.
    """

    def __init__(self, report: tuple[Restored, ...], hooks: list):
        self.report = report
        self._hooks = hooks

    def remove(self) -> None:
        """Take the restored weights off: the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __str__(self) -> str:
        modules = len({restored.module for restored in self.report})
        return f"{len(self.report)} super weights restored in {modules} layers"


def restore_super_weights(
    model: nn.Module,
    super_weights: ScanReport | str | Path | Coordinates | Mapping,
    *,
    values: Mapping[str, torch.Tensor] | nn.Module | None = None,
) -> RestoreHandle:
    """Give layers of bitsandbytes the exact values of a few weights back.

    A forward hook of each layer adds x[:, column] (value - dequantized) to its output, in float32,
    so that the layer multiplies by the exact value. The gradient of x passes through it. Codes,
    scales, parameters, module names and state dicts stay as they are, so what is saved has no
    super weights in it: see docs/bitsandbytes.md for how to keep them.

    Args:
        model: with Linear4bit or Linear8bitLt layers; adapters of PEFT may come on top later.
        super_weights: a report of ``swkernels.scan`` or the path of its JSON, which has the exact
            values of the super weights; ``Coordinates``; {module: [[row, column], ...]}; or
            {module: QuantizedTensor}, whose outliers are restored.
        values: the weights [D, H] before quantization, for coordinates (and instead of the
            report's): the original model, or {module or parameter name: tensor}, such as its
            state dict.

    Returns:
        A handle: what was restored, and ``remove()``.

    Raises:
        InvalidInput: a module that is not there or no quantized layer of bitsandbytes, another
            shape, a coordinate outside of it, a layer with restored weights already, a value that
            is missing or not finite; nothing has been changed.
    """
    coordinates, exact = _wanted(model, super_weights, values)
    report, found = [], []
    for site, target in find_targets(model, coordinates).items():
        layer, indices = base_of(target.module)[0], coordinates.weights[site]
        if restoration_of(layer) is not None:
            raise InvalidInput(
                f"{site} has restored super weights already: call remove() of their handle first"
            )
        restoration = Restoration(indices, exact[site], target.shape, str(site))
        before = restoration.read(layer)
        found.append((layer, restoration))
        for place, old, new in zip(indices.tolist(), before.tolist(), exact[site].tolist()):
            report.append(Restored(site.name, *place, old, new))
    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in found]
    return RestoreHandle(tuple(report), hooks)


class Restoration:
    """The forward hook of one layer; it holds no module, so that a deep copy of the model gets
    hooks of its own.

    Attributes:
        positions: int64 [k], row * H + column, ascending, on the CPU.
        values: float32 [k], exact, on the CPU.
    """

    def __init__(
        self, indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], name: str
    ):
        self.positions = indices[:, 0].long() * shape[1] + indices[:, 1]
        self.values = values
        self._name = name
        self._pattern, _ = ops.SparsePattern.sort(*indices.unbind(1), shape)
        self._scales = self._deltas = None

    def read(self, layer: nn.Module) -> torch.Tensor:
        """Find what the layer lacks at each position; return what it has there, float32 [k]."""
        # The deltas outlive the call, which may run in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            q = read_layer(layer, self._name)
            base = values_at(layer, q, self.positions.to(q.device))
            self._deltas = self.values.to(q.device) - base
            self._pattern = self._pattern.to(q.device)
        self._scales = scales_of(layer)
        return base

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor):
        x = args[0] if args else next(iter(kwargs.values()))
        # What the layer multiplies by changes with its scales: evaluated on a CPU, it rounds them.
        if self._scales is not scales_of(layer):
            self.read(layer)
        # Where nobody else has seen the output.
        inplace = type(layer).__name__ in _FRESH_OUTPUT and len(layer._forward_hooks) == 1
        return ops.pattern_linear(x, output, self._deltas, self._pattern, inplace=inplace)


def restoration_of(layer: nn.Module) -> Restoration | None:
    """What is restored in a layer."""
    hooks = layer._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Restoration)), None)


def _wanted(model, super_weights, values) -> tuple[Coordinates, dict[Site, torch.Tensor]]:
    """The coordinates, and by site their exact values, float32 [k] in the same order."""
    coordinates, exact = _listed(model, super_weights)
    if values is not None:
        exact = _taken(values, coordinates)
    if exact is None:
        raise InvalidInput(
            "coordinates do not say what their weights were: pass values=, the original model or "
            "its state dict"
        )
    for site, known in exact.items():
        if not known.isfinite().all():
            place = coordinates.weights[site][~known.isfinite()][0].tolist()
            raise InvalidInput(f"the weight {place} of {site} is not finite: it cannot be restored")
    return coordinates, exact


def _listed(model, super_weights) -> tuple[Coordinates, dict[Site, torch.Tensor] | None]:
    """The coordinates, and their values where these come with them."""
    if isinstance(super_weights, (str, Path)):
        super_weights = ScanReport.load(super_weights)
    if isinstance(super_weights, ScanReport):
        coordinates = Coordinates.from_report(super_weights)
        known = {
            (c["module"], c["row"], c["column"]): c["weight"] for c in super_weights.candidates
        }
        return coordinates, {
            site: torch.tensor([known[site.name, r, c] for r, c in indices.tolist()])
            for site, indices in coordinates.weights.items()
        }
    if isinstance(super_weights, Coordinates):
        return super_weights, None
    if not isinstance(super_weights, Mapping):
        raise InvalidInput(
            "super_weights must be a report or its path, Coordinates, or {module: [[row, column], "
            f"...]}}, got {type(super_weights).__name__}"
        )
    if not all(isinstance(listed, QuantizedTensor) for listed in super_weights.values()):
        return Coordinates.of(super_weights, model), None
    packed = {as_site(name): q for name, q in super_weights.items()}
    indices = {
        site: torch.stack([q.positions // q.plan.columns, q.positions % q.plan.columns], 1)
        for site, q in packed.items()
    }
    shapes = {site: (q.plan.rows, q.plan.columns) for site, q in packed.items()}
    exact = {site: q.values.float().cpu() for site, q in packed.items()}
    return Coordinates(indices, shapes), exact


def _taken(values, coordinates: Coordinates) -> dict[Site, torch.Tensor]:
    """The values at the coordinates of the original model, or of its tensors by name."""
    if isinstance(values, nn.Module):
        matrices = {w.site: w.matrix() for w in find_weights(values, coordinates.weights)}
    elif isinstance(values, Mapping):
        matrices = {site: _of_state_dict(values, site) for site in coordinates.weights}
    else:
        raise InvalidInput(
            "values must be the original model or {module or parameter name: tensor}, got "
            f"{type(values).__name__}"
        )
    taken = {}
    for site, indices in coordinates.weights.items():
        matrix, shape = matrices[site], coordinates.shapes[site]
        if tuple(matrix.shape) != tuple(shape) or not readable(matrix.dtype):
            raise InvalidInput(
                f"values of {site} must be floating-point {list(shape)}, got {matrix.dtype} "
                f"{list(matrix.shape)}: take the weight from before quantization"
            )
        rows, columns = indices.to(matrix.device).long().unbind(1)
        taken[site] = matrix.detach()[rows, columns].float().cpu()
    return taken


def _of_state_dict(values: Mapping, site: Site) -> torch.Tensor:
    for name in (site.name, f"{site.name}.weight"):
        if name in values:
            return values[name]
    raise InvalidInput(f"values has neither {site.name!r} nor its weight: add the tensor")
