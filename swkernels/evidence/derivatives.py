"""The loss of one input, and its exact first and second derivatives by single weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swkernels.detect.samples import Runner
from swkernels.errors import InvalidInput

from .offsets import Offsets

_NOT_TWICE = re.compile(r"not implemented|differentiate twice|double backward", re.I)


def loss_of(runner: Runner, ids: torch.Tensor, number: int | None) -> torch.Tensor:
    """The mean next-token loss of ids [S], 0-d, in float32 or wider.

    Raises:
        InvalidInput: it is not finite, and ``number`` says which input it is.
    """
    logits = runner.logits(ids[None])[0, :-1]  # [S - 1, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits.to(wide), ids[1:].to(logits.device))
    if number is not None and not math.isfinite(loss.item()):
        raise InvalidInput(
            f"the loss of input {number} is {loss.item()}: the model gives logits that are not "
            "finite; leave that input out or check the weights"
        )
    return loss


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """A context in which graphs are recorded that have second derivatives, by leaves alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def derivatives(model, runner: Runner, ids: torch.Tensor, offsets: Offsets, number: int):
    """([dL/dw], [d2L/dw2]) of one input, in the order of ``offsets.entries``."""
    count = len(offsets.entries)
    gradients, curvatures = [0.0] * count, [0.0] * count
    with _differentiable(model), offsets.attached():
        loss = loss_of(runner, ids, number)
        offsets.check()
        if not loss.requires_grad:
            return gradients, curvatures  # no token came to these experts
        leaves = list(offsets.leaves.values())
        try:
            first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            _check_graph(first)
            for numbers, leaf, gradient in zip(offsets.index.values(), leaves, first):
                for place, entry in enumerate(numbers if gradient is not None else ()):
                    gradients[entry] = gradient[place].item()
                    curvatures[entry] = _second(gradient[place], leaf, place)
        except RuntimeError as error:
            if not _NOT_TWICE.search(str(error)):
                raise
            raise InvalidInput(
                f"{type(model).__name__} cannot be differentiated twice "
                f"({str(error).splitlines()[0]:.120}): load it with attn_implementation='eager'"
            ) from error
    return gradients, curvatures


def _second(gradient: torch.Tensor, leaf: torch.Tensor, place: int) -> float:
    if not gradient.requires_grad:
        return 0.0
    [found] = torch.autograd.grad(gradient, leaf, retain_graph=True, allow_unused=True)
    return 0.0 if found is None else found[place].item()


def _check_graph(gradients: Sequence[torch.Tensor | None]) -> None:
    """Raise where a function in the backward has no derivative of its own.

    PyTorch ends its graph there in a node that raises when it is reached; the way to the leaves
    does not lead through it, so that a part of the second derivative would be missing in silence.
    """
    pending = [one.grad_fn for one in gradients if one is not None and one.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name().endswith("::Error"):
            raise RuntimeError("a function in it is marked as one not to differentiate twice")
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                pending.append(below)
