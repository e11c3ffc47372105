"""Quantize a model in place, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from swkernels.backends.plan import Plan, plan_of
from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of
from swkernels.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from swkernels.nn.quant_experts import QuantExperts, replace_parameter
from swkernels.ops.block_quantize import block_quantize, check_count, check_source
from swkernels.ops.quantized import QuantizedTensor

from .checkpoint import stamp
from .config import QuantConfig
from .report import LayerReport, QuantReport, describe
from .selection import Layer, places_of, select
from .super_weights import Listed, find_listed, read_super_weights

Progress = Callable[[str, int, int], None]


def quantize(
    model: nn.Module,
    config: QuantConfig | None = None,
    super_weights: object = None,
    *,
    progress: bool | Progress = True,
    backend: str | None = None,
) -> QuantReport:
    """Quantize the linear layers of ``model`` in place and keep its super weights exactly.

    All is checked first. Then one layer after the other is packed, put into its place and freed,
    so that memory holds the model and one layer more. If that is interrupted, the layers that are
    done are packed and whole, the others as they were; the exception says so, for what was freed
    cannot be brought back: load the model again.

    Args:
        model: any model whose weights are in memory, neither quantized nor sharded nor adapted.
        config: what is quantized, and how; None is int4 in blocks of 64.
        super_weights: what is kept exactly beside ``config.largest``: a ``ScanReport``,
            ``swkernels.train.Coordinates``, the path of a file of either, or
            {name or (name, expert): [[row, column], ...]}; rows are output channels. None: nothing.
        progress: show a bar; or call back with (stage, done, total).
        backend: of ``block_quantize``; None lets the device choose.

    Returns:
        A report: errors, worst blocks, what is kept and what is left out, bytes.

    Raises:
        InvalidInput: a model that is quantized, sharded, offloaded or adapted, NaN or infinity in
            a weight, a super weight that is not there, a pattern that matches nothing; the model
            is as it was.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise InvalidInput(f"config must be a QuantConfig, got {type(config).__name__}")
    layers, left_out = select(model, config)
    coordinates = read_super_weights(super_weights, model)
    listed = find_listed(model, coordinates)
    root = base_of(model)[0]
    with _shown(progress) as show:
        for number, layer in enumerate(layers):
            show("checking", number, len(layers))
            check(layer, config, listed)
        show("checking", len(layers), len(layers))
        before = size_of(root)
        reports = _replace(root, layers, config, listed, show, backend)
    stamp(root, config, coordinates)
    return QuantReport(
        label_of(root), config, tuple(reports), tuple(left_out), before, size_of(root)
    )


def check(layer: Layer, config: QuantConfig, listed: Listed) -> None:
    """Raise InvalidInput if a layer cannot be quantized, before anything is changed."""
    check_values(layer, config, listed)
    module = layer.module
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if layer.kind != "experts" and any(getattr(module, kind) for kind in hooks):
        raise InvalidInput(f"{layer.name} has hooks, which would be lost: take them off first")
    if "forward" in module.__dict__:
        raise InvalidInput(
            f"the forward of {layer.owner} is replaced (a tracker's, or that of a model spread "
            "over devices): take that off first, or load the model onto one device"
        )


def check_values(layer: Layer, config: QuantConfig, listed: Listed) -> None:
    """Raise InvalidInput if the matrices of a layer cannot be packed."""
    name, weight = layer.name, layer.weight
    if weight.is_meta:
        raise InvalidInput(f"{name} is on the meta device: load or materialize the model first")
    if hasattr(weight, "__tensor_flatten__"):
        raise InvalidInput(
            f"{name} is packed or sharded ({type(weight).__name__}): expected a plain weight"
        )
    check_source(name, weight)
    for number, matrix in enumerate(layer.matrices()):
        expert = None if layer.experts is None else number
        kept = listed.get((weight, expert))
        plan = _plan(matrix, config_of(layer, config))
        largest = config.largest * (plan.blocks if config.largest_per == "block" else 1)
        try:
            check_count((0 if kept is None else len(kept)) + largest, plan)
        except InvalidInput as error:
            raise InvalidInput(f"{_place(name, expert)}: {error}") from error
        _check_finite(name, expert, matrix)


def config_of(layer: Layer, config: QuantConfig) -> QuantConfig:
    """How a layer is quantized: ends have a code of their own."""
    if config.embeddings is not None and layer.is_end:
        return config.of_embeddings()
    return config


def pack(
    layer: Layer, config: QuantConfig, listed: Listed, backend: str | None = None
) -> tuple[list[QuantizedTensor], list[LayerReport]]:
    """Pack the matrices of a layer, one by one; the layer is as it was."""
    packed, reports = [], []
    arguments = config_of(layer, config).arguments()
    for number, matrix in enumerate(layer.matrices()):
        expert = None if layer.experts is None else number
        kept = listed.get((layer.weight, expert))
        try:
            q = block_quantize(matrix, outliers=kept, backend=backend, **arguments)
        except InvalidInput as error:
            raise InvalidInput(f"{_place(layer.name, expert)}: {error}") from error
        packed.append(q)
        reports.append(describe(layer.name, expert, matrix, q, kept))
    return packed, reports


def _replace(root, layers, config, listed, show, backend) -> list[LayerReport]:
    """Pack each layer and put it in place; ``layers`` is emptied so that nothing holds them."""
    places = places_of(root, [layer.module for layer in layers])
    uses = Counter(id(layer.weight) for layer in layers)
    shared: dict[int, list[QuantizedTensor]] = {}
    embedding: nn.Module | None = None
    reports: list[LayerReport] = []
    total = len(layers)
    layers.reverse()
    try:
        while layers:
            layer = layers.pop()
            show(layer.name, total - len(layers) - 1, total)
            key = id(layer.weight)
            packed = shared.get(key)
            if packed is None:
                packed, described = pack(layer, config, listed, backend)
                reports += described
                _forget(listed, layer.weight)
            if uses[key] > 1:
                shared[key] = packed
            if layer.kind == "experts":
                stack = QuantExperts.from_packed(packed, layer.layout)
                replace_parameter(layer.module, layer.parameter, stack)
                continue
            replacement = replacement_of(layer, packed[0], embedding)
            if layer.kind == "embedding":
                embedding = embedding or replacement
            for parent, name in places.pop(layer.module):
                parent._modules[name] = replacement
        show("done", total, total)
    except BaseException as error:
        done = total - len(layers) - 1
        if done:
            error.args = (
                f"{error or type(error).__name__}: {done} of the {total} layers are quantized and "
                "whole, the others as they were; load the model again",
            )
        raise
    return reports


def _forget(listed: Listed, weight: nn.Parameter) -> None:
    """Let go of a weight: nothing may keep it alive once it is packed."""
    for key in [key for key in listed if key[0] is weight]:
        del listed[key]


def replacement_of(
    layer: Layer, q: QuantizedTensor, embedding: QuantEmbedding | None
) -> nn.Module:
    """The module that takes the place of a layer's; ``embedding`` is what a tied head shares."""
    module = layer.module
    if layer.kind == "embedding":
        new = QuantEmbedding.from_packed(q, module.padding_idx)
    elif layer.kind == "tied":
        new = TiedQuantLinear(embedding, module.bias)
    else:
        new = QuantLinear.from_packed(q, module.bias)
    return new.train(module.training)


def _plan(matrix: torch.Tensor, config: QuantConfig) -> Plan:
    return plan_of(
        matrix.shape, code=config.code, symmetric=config.symmetric, block_size=config.block_size,
        clip=config.clip, scale_dtype=config.scale_dtype,
    )  # fmt: skip


def _check_finite(name: str, expert: int | None, matrix: torch.Tensor) -> None:
    if torch.isfinite(matrix.sum(dtype=torch.float32)):
        return
    wrong = ~torch.isfinite(matrix)  # a sum of finite values may overflow
    if wrong.any():
        row, col = wrong.nonzero()[0].tolist()
        raise InvalidInput(
            f"{_place(name, expert)} holds {float(matrix[row, col])} at [{row}, {col}]: a weight "
            "must be finite; repair the checkpoint"
        )


def _place(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name} expert {expert}"


def size_of(root: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model."""
    tensors = {id(t): t for t in (*root.parameters(), *root.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def label_of(root: nn.Module) -> str:
    """The class of a model, and where it was loaded from if that is known."""
    path = getattr(getattr(root, "config", None), "name_or_path", "")
    return f"{type(root).__name__} ({path})" if path else type(root).__name__


@contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    """Yield what to call with (stage, done, total)."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("")

        def show(stage: str, done: int, total: int) -> None:
            bars.update(bar, description=stage, completed=done, total=total)

        yield show
