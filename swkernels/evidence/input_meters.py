"""Read M = |x_c| / mean_j |x_j| of the inputs of weights while a model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from swkernels.errors import NonFiniteActivation
from swkernels.models import DownProjection
from swkernels.models.experts import observe_experts
from swkernels.train import Site
from swkernels.train.weights import Weight


@dataclass
class Peak:
    """The largest M at one place, of the prompt that runs and of those before it."""

    values: list[float] = field(default_factory=list)
    now: tuple | None = None  # M, token, channel
    best: tuple | None = None  # M, prompt, token, channel

    def offer(self, value: float, token: int | None, channel: int) -> None:
        if self.now is None or value > self.now[0]:
            self.now = (value, token, channel)

    def close(self, prompt: int) -> None:
        if self.now is None:
            return
        value, token, channel = self.now
        self.values.append(value)
        if self.best is None or value > self.best[0]:
            self.best = (value, prompt, token, channel)
        self.now = None


class InputMeter:
    """Reads the inputs of one weight."""

    def __init__(self, weight: Weight):
        self.weight = weight
        self._top = Peak()
        self._columns: dict[int, Peak] = {}

    def watch(self, columns: Sequence[int]) -> None:
        self._columns = {column: Peak() for column in columns}

    def read(self, x: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Look at rows x [..., H].

        Args:
            tokens: int64, which token each row is, negative for none; None if it is not known.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if tokens is not None and bool((tokens < 0).any()):
            rows, tokens = rows[tokens >= 0], tokens[tokens >= 0]
        means = torch.linalg.vector_norm(rows, 1, dim=-1, dtype=torch.float64) / rows.shape[-1]
        peaks = torch.linalg.vector_norm(rows, math.inf, dim=-1).double()
        self._check(rows, means + peaks)
        ratios = torch.where(means > 0, peaks / means, -1)  # [n]
        if not bool((ratios >= 0).any()):
            return
        channel = int(rows[ratios.argmax()].abs().argmax())
        self._offer(self._top, ratios, tokens, channel)
        for column, peak in self._columns.items():
            at_column = torch.where(means > 0, rows[:, column].abs().double() / means, -1)
            self._offer(peak, at_column, tokens, column)

    def _check(self, rows: torch.Tensor, sums: torch.Tensor) -> None:
        if not bool(sums.isfinite().all()):
            row = int((~sums.isfinite()).int().argmax())
            channel = int((~rows[row].isfinite()).int().argmax())
            raise NonFiniteActivation(
                f"{float(rows[row, channel])} in the input of {self.weight.site}, channel "
                f"{channel}: try a wider dtype, or check the weights before it"
            )

    @staticmethod
    def _offer(peak: Peak, ratios: torch.Tensor, tokens: torch.Tensor | None, channel: int):
        value, row = ratios.max(0)
        peak.offer(float(value), None if tokens is None else int(tokens[row]), channel)

    def close(self, prompt: int) -> None:
        """A prompt has ended."""
        for peak in (peak for _, peak in self.peaks()):
            peak.close(prompt)

    def peaks(self) -> Iterator[tuple[int | None, Peak]]:
        """(None, the largest channel's), then (column, its own) of each column watched."""
        yield None, self._top
        yield from self._columns.items()


@contextmanager
def reading(meters: Sequence[InputMeter]) -> Iterator[None]:
    """A context in which every forward of the model is read by the meters."""
    by_site = {meter.weight.site: meter for meter in meters}
    scopes: dict[nn.Module, list[DownProjection]] = {}

    def routed(projection: DownProjection, expert, x, y, tokens) -> None:
        site = Site(projection.name, None if projection.experts is None else expert)
        by_site[site].read(x, tokens)

    with ExitStack() as stack:
        for meter in meters:
            projection = meter.weight.projection
            if projection is not None and projection.scope is not None:
                inside = scopes.setdefault(projection.scope, [])
                inside += [] if projection in inside else [projection]
                continue
            hook = partial(_hook, meter)
            register = meter.weight.module.register_forward_pre_hook
            stack.callback(register(hook, with_kwargs=True).remove)
        for projections in scopes.values():
            stack.enter_context(observe_experts(projections, routed))
        yield


def _hook(meter: InputMeter, module: nn.Module, args: tuple, kwargs: dict) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    meter.read(x, torch.arange(x.numel() // x.shape[-1], device=x.device))
