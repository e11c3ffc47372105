"""Offsets of single weights as inputs of a model: what its loss is differentiated by.

``W[r, c] + e`` instead of ``W[r, c]`` adds ``e x[..., c]`` to output channel r. That much is added
behind the layer, so no weight is touched and no gradient of a matrix is formed; the derivatives by
e at e = 0 are those by the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from swkernels.detect.patching import Patches
from swkernels.errors import InvalidInput
from swkernels.models.experts import ExpertObserver
from swkernels.models.structure import base_of, features
from swkernels.train.weights import Site, Weight

from .edits import Entry


class Offsets:
    """One number beside each of some entries of a model, zero.

    Attributes:
        entries: the entries, in any order.
        leaves: by site, zeros [k] that require gradients, one for each entry of that weight.
        index: by site, which of ``entries`` those are.
    """

    def __init__(self, model: nn.Module, entries: Sequence[Entry]):
        self.entries = tuple(entries)
        self.index: dict[Site, list[int]] = {}
        for number, entry in enumerate(self.entries):
            self.index.setdefault(entry.site, []).append(number)
        self._weights = {entry.site: entry.weight for entry in self.entries}
        self._uses = {site: _uses(model, w) for site, w in self._weights.items() if not w.fused}
        self._places: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}
        self.leaves: dict[Site, torch.Tensor] = {}
        for site, numbers in self.index.items():
            matrix = self._weights[site].matrix()
            listed = [(self.entries[n].row, self.entries[n].column) for n in numbers]
            self._places[site] = torch.tensor(listed, device=matrix.device).unbind(1)
            zeros = torch.zeros(len(numbers), dtype=matrix.dtype, device=matrix.device)
            self.leaves[site] = zeros.requires_grad_()
        self._called: set[Site] = set()
        self._mixtures: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which the model's output depends on the leaves."""
        handles, patches = [], Patches("offsets")
        try:
            for site, modules in self._uses.items():
                for module in modules:
                    hook = partial(self._beside, site)
                    register = module.register_forward_hook
                    handles.append(register(hook, prepend=True, with_kwargs=True))
            for scope, projections in self._scopes().items():
                patches.forward(scope, partial(self._around, projections))
            yield
        finally:
            patches.undo()
            for handle in handles:
                handle.remove()

    def check(self) -> None:
        """Raise InvalidInput if a layer's product was not seen in any forward so far.

        An expert that no token is routed to is not called, and its derivatives are zero.
        """
        for site, weight in self._weights.items():
            if weight.fused and site.name not in self._mixtures:
                raise InvalidInput(
                    f"no product with the experts of {site.name} was seen: call "
                    "set_experts_implementation('eager') on the model"
                )
            routed = weight.projection is not None and weight.projection.scope is not None
            if site not in self._called and not routed:
                raise InvalidInput(
                    f"{site} was not called in the forward: its weight is used in another way, "
                    "which cannot be differentiated by; leave it out"
                )

    def _scopes(self) -> dict[nn.Module, list]:
        scopes: dict[nn.Module, list] = {}
        for weight in self._weights.values():
            if weight.fused:
                projections = scopes.setdefault(weight.projection.scope, [])
                known = [p.name for p in projections]
                projections += [] if weight.site.name in known else [weight.projection]
        return scopes

    def _beside(self, site: Site, module: nn.Module, args: tuple, kwargs: dict, output):
        """The forward hook of a layer, or of the embedding that a head is tied to."""
        x = args[0] if args else next(iter(kwargs.values()))
        self._called.add(site)
        if not isinstance(module, nn.Embedding):
            return self._add(site, x, output)
        rows, columns = (place.to(output.device) for place in self._places[site])
        chosen = (x[..., None] == rows).to(output.dtype)  # [..., k]
        return output.index_add(-1, columns, chosen * self.leaves[site].to(output.device))

    def _add(self, site: Site, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y [..., D] plus what the offsets add for x [..., H]."""
        rows, columns = (place.to(y.device) for place in self._places[site])
        return y.index_add(-1, rows, x[..., columns] * self.leaves[site].to(y.device))

    def _around(self, projections: list, original):
        """The forward of a mixture of fused experts."""

        def contribute(projection, expert, x, y, tokens):
            site = Site(projection.name, expert)
            self._mixtures.add(projection.name)
            if site not in self.leaves:
                return None
            return self._add(site, x, y)

        def forward(*args, **kwargs):
            hidden = args[0] if args else next(iter(kwargs.values()))
            tokens = hidden.numel() // hidden.shape[-1]
            with ExpertObserver(projections, tokens, contribute, replace=True):
                return original(*args, **kwargs)

        return forward


def _uses(model: nn.Module, weight: Weight) -> list[nn.Module]:
    """The module whose forward uses a weight, and those that it is tied to.

    Raises:
        InvalidInput: one of these is neither an embedding nor a layer that keeps it the same way.
    """
    own, found = base_of(weight.module)[0], [weight.module]
    for name, module in model.named_modules():
        held = [p for p in module._parameters.values() if p is not None]
        if module is own or not any(p is weight.parameter for p in held):
            continue
        alike = features(module) is not None and type(module) is type(own)
        if not (alike or type(module) is nn.Embedding and not weight.transposed):
            raise InvalidInput(
                f"{weight.site} is tied to {name}, a {type(module).__name__}: expected a layer of "
                "its kind or a plain nn.Embedding; leave this weight out"
            )
        found.append(module)
    return found
