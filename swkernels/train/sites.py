"""Where the weights are that coordinates name, and how a layer of deltas is put beside each."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of
from swkernels.nn import SparseDelta

from .coordinates import Coordinates
from .experts import CHILD, adapt_experts, release_experts
from .weights import Site, Weight, find_weights

# Layers whose forward makes a new tensor that nobody else reads and no backward needs: the
# contribution may be added to it in place. (Linear8bitLt gives a view made inside a function.)
_FRESH_OUTPUT = ("Linear", "Conv1D", "Linear4bit", "QuantLinear")


class Target(Weight):
    """One weight [D, H] that is trained at some coordinates."""

    @property
    def child(self) -> str:
        """The name of the layer of deltas, below the module."""
        return CHILD if not self.fused else f"{CHILD}_{self.site.expert}"

    @property
    def delta(self) -> SparseDelta | None:
        """The layer of deltas that lies below the module, if any."""
        found = getattr(self.module, self.child, None)
        return found if isinstance(found, SparseDelta) else None

    def adapt(self) -> SparseDelta:
        """Put a layer of deltas below the module and let its output pass through it."""
        delta = self.delta
        if delta is None:
            delta = SparseDelta(self.shape, self.device)
            self.module.add_module(self.child, delta)
            if self.fused:
                adapt_experts(self.projection)
            else:
                fresh = type(base_of(self.module)[0]).__name__ in _FRESH_OUTPUT
                hook = _Contribution(self.child, fresh)
                delta.hook = self.module.register_forward_hook(hook, with_kwargs=True)
        return delta

    def release(self, adapter: str) -> None:
        """Take one adapter away, and the layer of deltas with the last one."""
        delta = self.delta
        delta.remove_adapter(adapter)
        if delta.values:
            return
        delattr(self.module, self.child)
        if self.fused:
            release_experts(self.projection)
        else:
            delta.hook.remove()

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return next(chain(self.module.parameters(), self.module.buffers())).device

    def check_for_lora(self) -> None:
        """Raise InvalidInput where a LoRA file has no form for this weight."""
        if self.fused or self.transposed:
            kind = "transposed (Conv1D)" if self.transposed else "fused with other experts"
            raise InvalidInput(f"{self.site} is {kind}: export a checkpoint instead of a LoRA")


class _Contribution:
    """A forward hook that adds the deltas' contribution; it holds no module, so that a deep copy
    of the model gets hooks of its own."""

    def __init__(self, child: str, fresh: bool):
        self._child = child
        self._fresh = fresh

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor):
        x = args[0] if args else next(iter(kwargs.values()))
        inplace = self._fresh and len(module._forward_hooks) == 1
        return getattr(module, self._child).add(x, output, inplace=inplace)


def find_targets(model: nn.Module, coordinates: Coordinates) -> dict[Site, Target]:
    """Find the weight of every site.

    Raises:
        InvalidInput: a module or expert that is not there, or a weight of another shape.
    """
    targets = {}
    found = {weight.site: weight for weight in find_weights(model, coordinates.weights)}
    for site in coordinates.weights:
        weight = found.get(site)
        if weight is None:  # all its experts were found in its place
            raise InvalidInput(f"{site} holds several experts: name one of them, as (name, expert)")
        target = Target(site, weight.shape, weight.module, weight.projection)
        expected = tuple(coordinates.shapes[site])
        if target.shape != expected:
            raise InvalidInput(
                f"{site.name} is {list(target.shape)} in this model, the coordinates are for "
                f"{list(expected)}: take those of this model"
            )
        targets[site] = target
    return targets
