"""A model that computes with quantized values for a while: what quantization costs, not how fast.

Weights are packed and unpacked again and stand where the originals stood; the inputs of linear
layers pass through int8. Afterwards the model holds the very tensors that it held before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.ops import block_dequantize, block_quantize, quantize_activation
from swkernels.train.weights import nearest

from .config import QuantConfig
from .model import check_values, config_of
from .selection import Layer, select
from .super_weights import Listed, find_listed


@dataclass(frozen=True)
class Simulated:
    """What of a model has quantized values.

    Attributes:
        matrices: how many; of experts, each is one.
        elements: of the largest.
        kept: elements that are exact.
    """

    matrices: int
    elements: int
    kept: int


@contextmanager
def simulated_weights(
    model: nn.Module,
    config: QuantConfig | None = None,
    super_weights: object = None,
    *,
    backend: str | None = None,
) -> Iterator[Simulated]:
    """A context in which weights have the values that ``swkernels.quantize`` would pack.

    Modules, parameters and hooks stay what they are; only the data of the parameters are others,
    in their own dtype, so memory holds the quantized weights twice. Whatever ends the block, the
    parameters get their tensors back: no bit has been written.

    Args:
        model, config, super_weights, backend: as for ``swkernels.quantize``.

    Raises:
        InvalidInput: as ``swkernels.quantize``, but for hooks, which are no hindrance here.
    """
    config = QuantConfig() if config is None else config
    layers = list({id(layer.weight): layer for layer in select(model, config)[0]}.values())
    listed = find_listed(model, super_weights)
    for layer in layers:
        check_values(layer, config, listed)
    sizes, kept = [], 0
    with _undoing() as undo:
        for layer in layers:
            weight, originals = layer.weight, list(layer.matrices())
            values, count = _unpacked(layer, originals, config, listed, backend)
            undo.append(partial(_hold, weight, weight.data))
            weight.data = torch.empty_like(weight.data)
            for matrix, value in zip(layer.matrices(), values, strict=True):  # views of the new
                matrix.copy_(value)
            sizes += [matrix.numel() for matrix in originals]
            kept += count
        yield Simulated(len(sizes), max(sizes), kept)


@contextmanager
def _undoing() -> Iterator[list[Callable[[], None]]]:
    """A context that gives a list and calls what is in it, last first, whatever ends the block.

    An entry stands in the list before what it undoes is done, and may be called twice.
    """
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    finally:
        # A Ctrl-C meanwhile waits until all is undone. Python looks for one where a function
        # begins and where a loop goes round, so both must happen inside the try.
        interrupted = None
        while undo:
            try:
                while undo:
                    undo[-1]()
                    undo.pop()
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


def _hold(weight: torch.Tensor, data: torch.Tensor) -> None:
    weight.data = data


def _unpacked(
    layer: Layer, matrices: Sequence[torch.Tensor], config: QuantConfig, listed: Listed, backend
) -> tuple[list[torch.Tensor], int]:
    """The matrices of a layer packed and unpacked again, and how many elements are exact."""
    arguments = config_of(layer, config).arguments()
    values, kept = [], 0
    for number, matrix in enumerate(matrices):
        outliers = listed.get((layer.weight, None if layer.experts is None else number))
        q = block_quantize(matrix, outliers=outliers, backend=backend, **arguments)
        values.append(block_dequantize(q))
        kept += len(q.positions)
    return values, kept


@contextmanager
def simulated_activations(
    model: nn.Module,
    *,
    per: str = "token",
    super_channels: Mapping[str, Sequence[int]] | None = None,
    backend: str | None = None,
) -> Iterator[int]:
    """A context in which the inputs of the linear layers pass through int8; yields how many layers.

    The layers are those that ``swkernels.quantize`` packs by default. Scales are symmetric and
    found anew in each call. No gradient flows. The products of attention stay as they are.

    Args:
        model: its linear layers are modules: experts that are one parameter have no input of
            their own.
        per: "token" or "tensor": what shares a scale.
        super_channels: by the name of a layer, the input channels [k] that hold a super activation,
            as ``super_channels_of`` finds them. In each sequence the largest magnitude of such a
            channel is set aside: it does not count for the scale and comes back exactly, as in
            ``quantize_activation``.
        backend: of ``quantize_activation``.

    Raises:
        InvalidInput: fused experts, a layer or a channel that is not there, another ``per``; and,
            in the block, what ``quantize_activation`` refuses, infinities for instance.
    """
    quantize_activation(torch.zeros(1, 1), per=per)  # which says now what it would say later
    layers = select(model, QuantConfig())[0]
    fused = [layer.name for layer in layers if layer.kind == "experts"]
    if fused:
        raise InvalidInput(
            f"{fused[0]} holds fused experts, whose inputs cannot be reached: expected a model "
            "whose linear layers are modules"
        )
    channels = {} if super_channels is None else super_channels
    _check_channels(channels, {layer.name: next(layer.matrices()).shape[1] for layer in layers})
    with _undoing() as undo:
        for layer in layers:
            hook = _ThroughInt8(per, tuple(channels.get(layer.name, ())), backend)
            undo.append(partial(_unhook, layer.module, hook))
            layer.module.register_forward_pre_hook(hook)
        yield len(layers)


def _check_channels(channels: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> None:
    for name, listed in channels.items():
        if name not in widths:
            raise InvalidInput(f"{name} is no linear layer of the model{nearest(name, widths)}")
        for channel in listed:
            if type(channel) is not int or not 0 <= channel < widths[name]:
                raise InvalidInput(
                    f"{name} has input channels 0 to {widths[name] - 1}, got {channel!r}"
                )


def _unhook(module: nn.Module, hook: Callable) -> None:
    """Take a forward pre-hook off, if it is there; not by its handle, which a Ctrl-C may lose."""
    for key, there in list(module._forward_pre_hooks.items()):
        if there is hook:
            del module._forward_pre_hooks[key]


class _ThroughInt8:
    """A forward pre-hook: the input [..., H] quantized and dequantized."""

    def __init__(self, per: str, channels: tuple[int, ...], backend: str | None):
        self._per, self._channels, self._backend = per, channels, backend

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        x, *others = args
        if not x.numel():  # an expert without a token
            return None
        places = _largest_of(x.detach(), self._channels) if self._channels else None
        q = quantize_activation(
            x.detach(), super_activation=places, per=self._per, backend=self._backend
        )
        return block_dequantize(q), *others


def _largest_of(x: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
    """The place of the largest magnitude of each channel in each sequence.

    Args:
        x: [B, S, H], or [S, H] for one sequence.
        channels: C of them.

    Returns:
        int64 [B * C, 2]: token, counted over all sequences, and channel.
    """
    sequences = x.reshape(-1, *x.shape[-2:])  # [B, S, H]
    B, S, _ = sequences.shape
    listed = torch.tensor(channels, device=x.device)  # [C]
    at = sequences[:, :, listed].abs().argmax(1)  # [B, C]
    tokens = at + S * torch.arange(B, device=x.device)[:, None]
    return torch.stack((tokens, listed.expand(B, -1)), dim=-1).view(-1, 2)


def super_channels_of(model: nn.Module, super_weights: object) -> dict[str, tuple[int, ...]]:
    """Where linear layers meet super activations: their input channels, by the layer's name.

    A weight [row, column] is fed by the channel ``column`` of its own layer and writes the channel
    ``row`` of the residual stream, which every later layer of that input width is given, later in
    the order of the model. An attention's output projection has that width in many models and no
    super activation: there one exact element in a sequence changes next to nothing.

    Args:
        super_weights: as for ``swkernels.quantize``.
    """
    listed = find_listed(model, super_weights)
    written: dict[int, set[int]] = {}  # rows by the width of the residual stream
    found: dict[str, tuple[int, ...]] = {}
    for layer in select(model, QuantConfig())[0]:
        for number, matrix in enumerate(layer.matrices()):
            D, H = matrix.shape
            channels = set(written.get(H, ())) | set(found.get(layer.name, ()))
            own = listed.get((layer.weight, None if layer.experts is None else number))
            if own is not None:
                channels.update(own[:, 1].tolist())
                written.setdefault(D, set()).update(own[:, 0].tolist())
            if channels:
                found[layer.name] = tuple(sorted(channels))
    return found
