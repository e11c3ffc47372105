"""Track the peaks of every down projection of a model while it runs.

``track(model)`` patches instances, never classes: the forward of each module that computes a down
projection, and the forward of each stack of blocks, which numbers the tokens and leaves padding
out. Nothing is copied; the running state is one int64 key per channel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from swkernels import ops
from swkernels.errors import InvalidInput, NonFiniteActivation
from swkernels.models import (
    DownProjection,
    ProjectionNotFound,
    find_down_projections,
    skipped_towers,
)
from swkernels.models.experts import ExpertObserver
from swkernels.models.glu import GatedMLP, NotGated, gated_mlp

from .fused_mlp import wrap_gated_mlp
from .patching import Patches


@dataclass(frozen=True)
class TrackReport:
    """What ``track`` did.

    Attributes:
        replaced: the names of the projections that are tracked.
        skipped: (name, reason) of what was left alone.
        fused: with ``fused=True``, the names of the MLPs that run through ``ops.glu_absmax``.
        unfused: then also (name, reason) of the projections whose MLP runs as it is.
    """

    replaced: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    fused: tuple[str, ...] = ()
    unfused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SitePeaks:
    """The peaks of one down projection, or of one expert of it.

    Attributes:
        layer, name, expert: where; ``expert`` is None in a dense layer.
        inputs: ``ops.Peaks`` of its H input channels.
        outputs: ``ops.Peaks`` of its D output channels.
        routed: how many tokens it has seen, padding not counted; 0 where an expert is unseen.
    """

    layer: int
    name: str
    expert: int | None
    inputs: ops.Peaks
    outputs: ops.Peaks
    routed: int


class ProjectionState:
    """Running keys of one down projection.

    Attributes:
        inputs: int64 [E, H], outputs: int64 [E, D]; E = 1 where there are no fused experts.
        routed: int64 [E], the rows that counted so far: tokens that were routed to each expert, in
            a dense layer all tokens; padding never. Of two passes it is the sum.
        sample_inputs: int64 [B, E, H], sample_outputs [B, E, D] of the last forward, with token
            positions inside each sample; None unless ``per_sample``.
        moments: float64 [E, 3], the count, sum and sum of squares of Y's elements; None unless
            asked for.
    """

    def __init__(self, projection: DownProjection, device: torch.device, moments: bool):
        self.projection = projection
        self.experts = projection.experts or 1
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.inputs = self._zeros(projection.columns)
        self.outputs = self._zeros(projection.rows)
        self.routed = torch.zeros(self.experts, dtype=torch.int64, device=self.device)
        self.sample_inputs: torch.Tensor | None = None
        self.sample_outputs: torch.Tensor | None = None
        self.moments = (
            torch.zeros(self.experts, 3, dtype=torch.float64, device=self.device)
            if moments
            else None
        )

    def peaks(self) -> list[SitePeaks]:
        """The peaks so far, one entry an expert, or one in all where there are none."""
        projection = self.projection
        routed = self.routed.tolist()
        return [
            SitePeaks(
                projection.layer,
                projection.name,
                projection.expert if projection.experts is None else e,
                ops.peaks(self.inputs[e]),
                ops.peaks(self.outputs[e]),
                routed[e],
            )
            for e in range(self.experts)
        ]

    def _zeros(self, channels: int, *leading: int) -> torch.Tensor:
        return torch.zeros(*leading, self.experts, channels, dtype=torch.int64, device=self.device)

    def reset(self) -> None:
        self.inputs.zero_()
        self.outputs.zero_()
        self.routed.zero_()
        self.sample_inputs = self.sample_outputs = None
        if self.moments is not None:
            self.moments.zero_()

    def begin(self, samples: int) -> None:
        self.sample_inputs = self._zeros(self.projection.columns, samples)
        self.sample_outputs = self._zeros(self.projection.rows, samples)

    def move(self, device: torch.device) -> None:
        """Follow the activations when they are not where the weight was at ``track`` time."""
        self.device = device
        self.inputs, self.outputs = self.inputs.to(device), self.outputs.to(device)
        self.routed = self.routed.to(device)
        if self.sample_inputs is not None:
            self.sample_inputs = self.sample_inputs.to(device)
            self.sample_outputs = self.sample_outputs.to(device)
        if self.moments is not None:
            self.moments = self.moments.to(device)


@dataclass
class _Stack:
    """The module that owns a list of blocks, and the tokens of the forward it is running.

    Attributes:
        offset: int64 0-d, tokens that counted in all forwards so far. A tensor, so that a
            compiled graph does not depend on its value.
        index: int64 [B * S], the running index of each token of this forward, -1 for padding.
        positions: int64 [B, S], the position of each token in its sample, -1 for padding.
        interleaved: several forwards are under way; see ``TrackHandle.interleave``.
        watching: whether what passes counts.
    """

    module: nn.Module
    states: list[ProjectionState] = field(default_factory=list)
    offset: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    index: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    interleaved: bool = False
    watching: bool = True

    def number_tokens(self, batch: int, length: int, mask: torch.Tensor | None, device) -> None:
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        mask = mask.bool()
        offset = self.offset.to(mask.device)
        index = ops.token_index(mask)
        self.index = torch.where(index < 0, index, index + offset).flatten()
        positions = mask.to(torch.int64).cumsum(1) - 1
        self.positions = positions.masked_fill(~mask, -1)
        self.offset = offset + mask.sum()


class TrackHandle:
    """What ``track`` returns: the peaks, and the way back. Also a context manager.

    Attributes:
        report: what was replaced and what was skipped, and why.
    """

    def __init__(self, report: TrackReport, patches: Patches, stacks: list[_Stack]):
        self.report = report
        self._patches = patches
        self._stacks = stacks
        self._states = [state for stack in stacks for state in stack.states]

    @property
    def states(self) -> list[ProjectionState]:
        """The running state of every down projection, in forward order."""
        return self._states

    def peaks(self) -> list[SitePeaks]:
        """Return the peaks so far, one entry a projection (an expert, where there are experts)."""
        return [site for state in self._states for site in state.peaks()]

    def check_finite(self, states: list[ProjectionState] | None = None) -> None:
        """Raise NonFiniteActivation if NaN or infinity has passed, naming where it came first.

        Args:
            states: which to look at; all of them by default.
        """
        for state in self._states if states is None else states:
            for side, keys in (("input", state.inputs), ("output", state.outputs)):
                if int(keys.max()) >= ops.INFINITY_KEY:
                    expert, channel = divmod(int(keys.argmax()), keys.shape[1])
                    value, token = ops.peaks(keys[expert, channel])
                    where = "" if state.projection.experts is None else f", expert {expert}"
                    raise NonFiniteActivation(
                        f"{float(value)} in the {side} of {state.projection.name} (layer "
                        f"{state.projection.layer}{where}), channel {channel}, token "
                        f"{int(token)}: try a wider dtype, or check the weights of that layer"
                    )

    def interleave(self) -> None:
        """Let several forwards run side by side, a block of one after a block of another.

        The caller then gives each forward its ``numbering`` back before it goes on, and calls
        ``begin`` of a block's states before the block runs.
        """
        for stack in self._stacks:
            stack.interleaved = True

    @property
    def numbering(self) -> list[tuple]:
        """Which tokens the forward under way has, for each list of blocks."""
        return [(stack.offset, stack.index, stack.positions) for stack in self._stacks]

    @numbering.setter
    def numbering(self, numbering: list[tuple]) -> None:
        for stack, (offset, index, positions) in zip(self._stacks, numbering):
            stack.offset, stack.index, stack.positions = offset, index, positions

    @contextmanager
    def not_watching(self) -> Iterator[None]:
        """A context in which what runs does not count."""
        for stack in self._stacks:
            stack.watching = False
        try:
            yield
        finally:
            for stack in self._stacks:
                stack.watching = True

    def label_next_token(self, token: int) -> None:
        """Give the first token of the next forward the index ``token``.

        Labelled so, samples give the same keys in whatever order they run.
        """
        for stack in self._stacks:
            stack.offset = torch.tensor(token, dtype=torch.int64)

    def reset(self) -> None:
        """Forget all peaks and start numbering tokens from 0."""
        for state in self._states:
            state.reset()
        self.label_next_token(0)

    def remove(self) -> None:
        """Restore the model exactly; the peaks stay readable. Calling it again does nothing."""
        self._patches.undo()

    def __enter__(self) -> TrackHandle:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def track(
    model: nn.Module,
    *,
    per_sample: bool = False,
    moments: bool = False,
    strict: bool = True,
    fused: bool = False,
    backend: str | None = None,
) -> TrackHandle:
    """Track the input and output peaks of every down projection of ``model``.

    Costs one pass over the activations of each down projection and no copy of them. Works on a
    model that is compiled afterwards, under autocast, over several devices, with gradient
    checkpointing (a recomputed forward is not counted twice) and while training. Padding named by
    a 2-D ``attention_mask`` does not count.

    Args:
        model: any model whose down projections ``find_down_projections`` finds.
        per_sample: keep also the peaks of each sample of the last batch.
        moments: keep count, sum and sum of squares of each projection's output (for the outlier
            rule mean + gamma * std); one more pass over the outputs.
        strict: raise if the model has no down projection; else return a handle that tracks none.
        fused: let gated MLPs of the plain form down(act(gate(x)) * up(x)) compute their product
            and its peaks in one kernel. That saves more than tracking costs on a GPU; outputs
            then differ from the untracked model's in the last place (the product is rounded once,
            not twice). Others are tracked as without it; the report says why.
        backend: the explicit backend of the operations; None lets each device choose.

    Returns:
        A handle: ``peaks()``, ``report``, ``reset()``, ``remove()``; also a context manager.

    Raises:
        ProjectionNotFound: nothing was found and ``strict``; the model is as it was.
        InvalidInput: the model is tracked already.
    """
    try:
        projections = find_down_projections(model)
    except ProjectionNotFound:
        if strict:
            raise
        projections = []
    patches = Patches("track")
    stacks: dict[str, _Stack] = {}
    experts: dict[nn.Module, list[_Observer]] = {}
    for projection in projections:
        if patches.holds(projection.scope or projection.module):
            raise InvalidInput(
                f"{projection.name} is tracked already: call remove() on that handle first"
            )
    taken, left = [], []
    for projection in projections:
        stack = _stack_of(model, projection, stacks)
        state = ProjectionState(projection, projection.weight.device, moments)
        stack.states.append(state)
        observer = _Observer(stack, state, per_sample, backend)
        if projection.scope is not None:
            experts.setdefault(projection.scope, []).append(observer)
            continue
        if fused:
            try:
                name, module, mlp = _gated_mlp_around(model, projection, per_sample)
            except NotGated as reason:
                left.append((projection.name, str(reason)))
            else:
                taken.append(name)
                patches.forward(module, functools.partial(_fuse, module, mlp, observer))
                observer.inputs_seen = True
        patches.forward(projection.module, observer.wrap)
    for scope, observers in experts.items():
        patches.forward(scope, functools.partial(_wrap_experts, observers))
    for stack in stacks.values():
        patches.forward(stack.module, functools.partial(_wrap_stack, stack, per_sample))
    replaced = tuple(projection.name for projection in projections)
    skipped = tuple(skipped_towers(model))
    if fused:
        left += [
            (o.state.projection.name, "it is an expert") for os in experts.values() for o in os
        ]
    report = TrackReport(replaced, skipped, tuple(taken), tuple(left))
    return TrackHandle(report, patches, list(stacks.values()))


def _gated_mlp_around(
    model: nn.Module, projection: DownProjection, per_sample: bool
) -> tuple[str, nn.Module, GatedMLP]:
    """The gated MLP whose down projection this is: its name, itself, its parts."""
    if per_sample:
        raise NotGated("peaks of each sample are kept, which the kernel does not do")
    root = getattr(model, "_orig_mod", model)
    parent, _, child = projection.name.rpartition(".")
    module = root.get_submodule(parent)
    mlp = gated_mlp(module)
    if mlp.down != child:
        raise NotGated(f"it ends in {mlp.down}, not in this projection")
    return parent, module, mlp


def _fuse(module: nn.Module, mlp: GatedMLP, observer: _Observer, original):
    return wrap_gated_mlp(module, mlp, observer.input_keys, observer.backend)


def _stack_of(model: nn.Module, projection: DownProjection, stacks: dict) -> _Stack:
    """Find the module that owns the list of blocks: it sees the attention mask of its tokens."""
    root = getattr(model, "_orig_mod", model)
    owner = projection.block_name.rpartition(".")[0].rpartition(".")[0]
    if owner not in stacks:
        stacks[owner] = _Stack(root.get_submodule(owner))
    return stacks[owner]


def _wrap_stack(stack: _Stack, per_sample: bool, original):
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def forward(*args, **kwargs):
        bound = {**dict(zip(names, args)), **kwargs}
        tokens = bound.get("input_ids")
        if tokens is None:
            tokens = bound.get("inputs_embeds")
        if tokens is None:
            tokens = args[0]
        batch, length = (1, tokens.shape[0]) if tokens.dim() == 1 else tokens.shape[:2]
        if not _recomputing():
            mask = bound.get("attention_mask")
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
                mask = None
            else:
                mask = mask[:, -length:]
            stack.number_tokens(batch, length, mask, tokens.device)
            if per_sample and not stack.interleaved:
                for state in stack.states:
                    state.begin(batch)
        return original(*args, **kwargs)

    return forward


def _recomputing() -> bool:
    """Whether this forward repeats an earlier one for the backward (gradient checkpointing)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class _Observer:
    """Reads the input and output of one down projection while its own forward computes them."""

    def __init__(self, stack: _Stack, state: ProjectionState, per_sample: bool, backend):
        self.stack = stack
        self.state = state
        self.per_sample = per_sample
        self.backend = backend
        self.inputs_seen = False  # whether the kernel before the projection finds x's peaks

    def input_keys(self, x) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The running keys of the inputs and the index of x's rows; None in a repeated forward."""
        if _recomputing():
            return None
        if x.device != self.state.device:
            self.state.move(x.device)
        return self.state.inputs[0], self._index(x, None)

    def wrap(self, original):
        @functools.wraps(original)
        def forward(*args, **kwargs):
            y = original(*args, **kwargs)
            if self.stack.watching and not _recomputing():
                x = args[0] if args else next(iter(kwargs.values()))
                self.observe(0, x, y, None)
            return y

        return forward

    def observe(self, expert: int, x, y, rows) -> None:
        """Merge the peaks of x [..., H] and y [..., D]; ``rows``: which tokens they are."""
        state = self.state
        x, y = x.detach(), y.detach()
        if x.device != state.device:
            state.move(x.device)
        index = self._index(x, rows)
        counted = (index >= 0).sum()  # a tensor: nothing waits for its value
        if state.projection.scope is not None:  # nllb_moe hands an expert a token several times
            counted = torch.minimum(counted, (self.stack.index >= 0).sum().to(x.device))
        state.routed[expert] += counted
        if self.per_sample:
            self._observe_samples(expert, x, y, rows)
        else:
            sides = ((x, state.inputs), (y, state.outputs))
            for value, keys in sides[1:] if self.inputs_seen else sides:
                ops.column_absmax(value, keys[expert], token_mask=index, backend=self.backend)
        if state.moments is not None:
            state.moments[expert] += _moments(y, index)

    def _index(self, x, rows) -> torch.Tensor:
        """The running index of each row of x, int64 [T]; -1 where it does not count."""
        return _pick(self.stack.index.to(x.device), x, rows)

    def _observe_samples(self, expert: int, x, y, rows) -> None:
        state = self.state
        positions = self.stack.positions.to(x.device)  # [B, S]
        batch, length = positions.shape
        flat = positions.flatten()
        offsets = (self.stack.index.to(x.device) - flat).view(batch, length).amax(1)  # [B]
        sample_of = torch.arange(batch, device=x.device).repeat_interleave(length)
        positions, sample_of = _pick(flat, x, rows), _pick(sample_of, x, rows)
        for sample in range(batch):
            index = positions.masked_fill(sample_of != sample, -1)
            for value, keys, running in (
                (x, state.sample_inputs[sample, expert], state.inputs[expert]),
                (y, state.sample_outputs[sample, expert], state.outputs[expert]),
            ):
                ops.column_absmax(value, keys, token_mask=index, backend=self.backend)
                # The low half is the complement of the token: a later token is a smaller key.
                moved = torch.where(keys == 0, keys, keys - offsets[sample])
                torch.maximum(running, moved, out=running)


def _pick(numbers: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The entry of ``numbers`` [tokens] for each row of x; -1 for a row that is no token's.

    Where the tokens of routed rows cannot be known, all rows go under the first token that counts.
    """
    if rows is not None:
        return torch.where(rows < 0, -1, numbers[rows.clamp_min(0)])
    count = x.numel() // max(1, x.shape[-1])
    if count == numbers.numel():
        return numbers
    last = torch.iinfo(torch.int64).max
    first = numbers.masked_fill(numbers < 0, last).min()
    return torch.where(first == last, -1, first).expand(count)


def _wrap_experts(observers: list[_Observer], original):
    """Watch the products with the experts' weights while the module around them runs.

    Which experts run, and on which tokens, depends on the data, so this is not compiled.
    """
    by_projection = {observer.state.projection: observer for observer in observers}

    def callback(projection, expert, x, y, rows):
        by_projection[projection].observe(expert or 0, x, y, rows)

    @functools.wraps(original)
    def forward(*args, **kwargs):
        if _recomputing() or not observers[0].stack.watching:
            return original(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        tokens = hidden.numel() // hidden.shape[-1]
        with ExpertObserver(list(by_projection), tokens, callback):
            return original(*args, **kwargs)

    return torch.compiler.disable(forward)


def _moments(y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of the rows of y that count, in float64, without a copy."""
    rows = y.reshape(-1, y.shape[-1])
    kept = index >= 0
    sums = rows.sum(1, dtype=torch.float64)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    count = kept.sum() * rows.shape[1]
    return torch.stack([count, (sums * kept).sum(), (norms.square() * kept).sum()])
