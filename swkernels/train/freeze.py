"""Full fine-tuning with some weights held where they are: frozen super weights."""

from __future__ import annotations

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.ops import masked_grad_

from .coordinates import Coordinates, Site
from .sites import Target, find_targets


def freeze(model: nn.Module, coordinates: Coordinates, *, scale: float = 0.0) -> FreezeHandle:
    """Zero, or scale, the gradients of ``coordinates`` while everything else of a model trains.

    The gradient of a weight is changed in place where it has been accumulated, before an
    optimizer sees it. An optimizer may still move a weight whose gradient is zero: by weight decay
    or by momentum from before. ``handle.protect(optimizer)`` puts the frozen weights back after
    every step, exactly.

    Args:
        model: its weights at the coordinates must be plain ones that can be written.
        coordinates: which weights stay.
        scale: 0 freezes; another factor slows the weights down (and is not protected).

    Raises:
        InvalidInput: a module that is not there, another shape, a packed or sharded weight.
    """
    targets = find_targets(model, coordinates)
    for target in targets.values():
        target.matrix()  # says what is wrong before anything is changed
    return FreezeHandle(targets, coordinates, scale)


class FreezeHandle:
    """What ``freeze`` returns; also a context manager."""

    def __init__(self, targets: dict[Site, Target], coordinates: Coordinates, scale: float):
        self._scale = scale
        self._entries: dict[nn.Parameter, list[tuple[Target, torch.Tensor, torch.Tensor]]] = {}
        self._before: list[tuple[Target, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for site, target in targets.items():
            matrix = target.matrix()
            rows, cols = coordinates.weights[site].to(matrix.device).unbind(1)
            parameter = target.parameter
            self._entries.setdefault(parameter, []).append((target, rows, cols))
            kept = matrix.detach()[rows.long(), cols.long()].clone()
            self._before.append((target, rows.long(), cols.long(), kept))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._mask) for parameter in self._entries
        ]

    def protect(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the frozen weights back after every step of ``optimizer``.

        Raises:
            InvalidInput: the weights are slowed down, not frozen.
        """
        if self._scale != 0:
            raise InvalidInput(f"only frozen weights can be protected, the scale is {self._scale}")
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the frozen weights as they were when ``freeze`` was called."""
        for target, rows, cols, kept in self._before:
            target.matrix()[rows, cols] = kept

    def remove(self) -> None:
        """Let gradients and optimizers alone again."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> FreezeHandle:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def _mask(self, parameter: nn.Parameter) -> None:
        for target, rows, cols in self._entries[parameter]:
            masked_grad_(target.as_matrix(parameter.grad), rows, cols, self._scale)
