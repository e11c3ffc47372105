"""A gated MLP whose product and peaks come from one kernel while it is tracked."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from swkernels import ops
from swkernels.models.glu import GatedMLP


def wrap_gated_mlp(
    module: nn.Module,
    mlp: GatedMLP,
    keys: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None],
    backend: str | None,
) -> Callable:
    """Return what replaces the forward of ``module``.

    ``ops.glu_absmax`` takes the place of the activation, the product and the pass over its result:
    it reads gate and up once and writes h once. The children are called as the modules they are.

    Args:
        keys: from h's layout, the running keys of h and the index of each token; None for a
            forward that does not count (one that gradient checkpointing repeats).
    """

    def forward(*args, **kwargs) -> torch.Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        children = module._modules
        if mlp.gate == mlp.up:
            gate, up = children[mlp.gate](x).chunk(2, dim=-1)
        else:
            gate, up = children[mlp.gate](x), children[mlp.up](x)
        running = keys(gate)
        state, index = (None, None) if running is None else running
        h, _ = ops.glu_absmax(gate, up, mlp.activation, state, token_mask=index, backend=backend)
        return children[mlp.down](h)

    return functools.wraps(type(module).forward)(forward)
