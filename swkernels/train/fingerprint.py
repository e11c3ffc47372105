"""A short fingerprint of a base weight at the coordinates that an adapter trains."""

from __future__ import annotations

import hashlib

import torch

from swkernels.errors import InvalidInput

from .sites import Target


def fingerprint(
    target: Target, coordinates: torch.Tensor, before: torch.Tensor | None = None
) -> str | None:
    """Hash the base's values at ``coordinates`` [k, 2], in float32.

    Args:
        before: those values, where an adapter is merged into the weight now.

    Returns:
        16 hexadecimal digits; None where the weight is packed or sharded and has no such values.
    """
    if before is None:
        try:
            matrix = target.matrix()
        except InvalidInput:
            return None
        rows, cols = coordinates.to(matrix.device).long().unbind(1)
        before = matrix.detach()[rows, cols]
    data = before.float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]
