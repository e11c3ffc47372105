"""Zero weights that are packed: their codes stay, the outputs that they feed are computed anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from swkernels.models import DownProjection
from swkernels.models.experts import ExpertObserver
from swkernels.models.structure import base_of

from .patching import Patches

# What the rows with zeroed columns are, by projection and expert: {row: [columns], float32}.
Rows = dict[DownProjection, "dict[int | None, dict[int, torch.Tensor]]"]


@contextmanager
def zeroed_packed(
    coordinates: list[tuple[DownProjection, int | None, int, int]],
) -> Iterator[None]:
    """A context in which packed weights count as zero; nothing that is stored changes.

    Output channel r of a layer with W[r, c] zeroed is x W[r]^T + b with that row dequantized, its
    columns c zero, computed in float32 and rounded to the output's type.

    Args:
        coordinates: (projection, expert, row, column).
    """
    rows: Rows = defaultdict(dict)
    for projection, expert, row, column in coordinates:
        of_expert = rows[projection].setdefault(expert, {})
        if row not in of_expert:
            of_expert[row] = projection.row(row, expert).clone()
        of_expert[row][column] = 0
    scopes: dict = defaultdict(list)
    patches = Patches("zeroed")
    try:
        for projection, by_expert in rows.items():
            if projection.experts is None:
                patches.forward(projection.module, _linear(projection, by_expert))
                continue
            scopes[projection.scope].append(projection)
        for scope, projections in scopes.items():
            patches.forward(scope, _observed(projections, rows))
        yield
    finally:
        patches.undo()


def _changed(x: torch.Tensor, y: torch.Tensor, rows: dict[int, torch.Tensor], bias=None):
    """y [..., D] with the channels ``rows`` computed anew from x [..., H]."""
    channels = list(rows)
    weight = torch.stack([rows[row] for row in channels]).to(x.device)
    bias = None if bias is None else bias[channels].float()
    y = y.clone()
    with torch.autocast(x.device.type, enabled=False):
        y[..., channels] = F.linear(x.float(), weight, bias).to(y.dtype)
    return y


def _linear(projection: DownProjection, by_expert: dict):
    (rows,) = by_expert.values()
    base, _ = base_of(projection.module)

    def wrap(original):
        def forward(x, *args, **kwargs):
            return _changed(x, original(x, *args, **kwargs), rows, getattr(base, "bias", None))

        return forward

    return wrap


def _observed(projections: list[DownProjection], rows: Rows):
    def callback(projection, expert, x, y, tokens):  # y is without the bias: that comes later
        changed = rows[projection].get(expert)
        return None if changed is None else _changed(x, y, changed)

    def wrap(original):
        def forward(*args, **kwargs):
            hidden = args[0] if args else next(iter(kwargs.values()))
            tokens = hidden.numel() // hidden.shape[-1]
            with ExpertObserver(projections, tokens, callback, replace=True):
                return original(*args, **kwargs)

        return forward

    return wrap
