"""First and second derivatives of a model's loss by single weights, exact and by differences.

Both are taken in one visit to each input. The exact ones come from automatic differentiation by
``Offsets``: the gradient once for all entries, then the gradient of each of its elements, one
backward pass an entry. The differences come from the loss with a weight changed where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from swkernels.detect.samples import Runner, as_samples, check_vocabulary, evaluating
from swkernels.errors import InvalidInput
from swkernels.models.structure import base_of
from swkernels.train import Coordinates
from swkernels.train.sites import find_targets

from .derivatives import derivatives, loss_of
from .differences import differences, rounding, true_steps
from .edits import Edits, Entry
from .offsets import Offsets
from .results import Progress, silent
from .spread import Spread

EPSILON = 1e-4
_EVERYTHING = 1 << 60


@dataclass(frozen=True)
class Probe:
    """A loss around its weights. N inputs, P entries, R controls each, Q = P + P R.

    Attributes:
        entries: the P weights that were asked for.
        controls: P x R random entries, those of an entry in its own matrix.
        eps: the step of the differences; steps: float64 [2, Q], up and down, as they were after
            rounding to the weights' dtype.
        tokens: of each input.
        losses: float64 [N], mean next-token loss in nats.
        rounding: float64 [N], standard deviation of what rounding does to such a loss.
        gradients, curvatures: float64 [N, Q], dL/dw and d2L/dw2: the P entries, then the controls
            in order.
        up, down: float64 [N, Q], the loss with one weight moved by its step; as it is where it is
            not finite.
        notes: what else changes with an entry.
    """

    entries: tuple[Entry, ...]
    controls: tuple[tuple[Entry, ...], ...]
    eps: float
    steps: torch.Tensor
    tokens: tuple[int, ...]
    losses: torch.Tensor
    rounding: torch.Tensor
    gradients: torch.Tensor
    curvatures: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    notes: tuple[str, ...] = ()

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Those of the entries: [..., Q] to [..., P]."""
        return values[..., : len(self.entries)]

    def random(self, values: torch.Tensor) -> torch.Tensor:
        """Those of the controls: [..., Q] to [..., P, R]."""
        return values[..., len(self.entries) :].unflatten(-1, (len(self.entries), -1))

    def ratios(self, values: torch.Tensor) -> Spread:
        """Entry over control, of values [N, Q], over all inputs and pairs."""
        return Spread.of(self.own(values)[..., None] / self.random(values))

    def rows(self, measured: dict[str, torch.Tensor]) -> list[dict]:
        """A row for each entry: where it is, then each of the values [N, Q] and its control's.

        All are means over inputs, the control's over its R positions too.
        """
        rows = []
        for number, entry in enumerate(self.entries):
            row = entry.to_dict()
            for name, values in measured.items():
                row[name] = float(self.own(values)[:, number].mean())
                row[f"random_{name}"] = float(self.random(values)[:, number].mean())
            rows.append(row)
        return rows

    def to_dict(self) -> dict:
        """Everything, as plain values."""
        found = {
            "eps": self.eps,
            "entries": [entry.to_dict() for entry in self.entries],
            "controls": [[one.to_dict() for one in controls] for controls in self.controls],
            "tokens": list(self.tokens),
            "notes": list(self.notes),
        }
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {k: v.tolist() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return found | tensors


@torch.inference_mode(False)
def probe(
    model: nn.Module,
    coordinates: Coordinates,
    inputs: object,
    *,
    random: int = 1,
    same_row: bool = False,
    eps: float = EPSILON,
    seed: int = 0,
    progress: Progress = silent,
) -> Probe:
    """Differentiate the loss of ``model`` twice by each of some weights, and by random ones.

    Args:
        model: a decoder in float32 or float64, run in eval mode and given back as it was: weights,
            modes, ``requires_grad``, hooks.
        coordinates: of this model.
        inputs: token ids, a list of integers [S] or [N, S], S >= 2; each is an input by itself.
        random: random positions for each weight, in its own matrix, none of them twice.
        same_row: in its own row, too: they share dL/dy with it, and differ in the input alone.
        eps: how far a weight is moved for the differences.
        seed: of the random positions.
        progress: called with (stage, done, total).

    Returns:
        ``Probe``.

    Raises:
        InvalidInput: an argument that is not as above, a weight that ``Edits`` refuses, a step
            that is lost in rounding, a loss of the intact model that is not finite, or a forward
            that cannot be differentiated twice.
    """
    edits = Edits(model, coordinates)
    _check(model, edits.entries, random, eps)
    samples, _ = as_samples(inputs, None, _EVERYTHING, _EVERYTHING, "none", None)
    short = [number for number, ids in enumerate(samples) if len(ids) < 2]
    if short:
        raise InvalidInput(f"input {short[0]} has 1 token: a loss needs 2 tokens or more")
    check_vocabulary(model, samples)
    samples = [ids.clone() for ids in samples]  # none of inference mode's
    if same_row:
        controls = _row_controls(edits.entries, random, seed)
    else:
        controls = _controls(model, edits.entries, coordinates, random, seed)
    entries = [*edits.entries, *(one for drawn in controls for one in drawn)]
    steps = torch.stack([true_steps(entries, eps), -true_steps(entries, -eps)])
    runner, offsets = Runner(base_of(model)[0]), Offsets(model, entries)
    found: dict[str, list] = {
        name: [] for name in ("losses", "rounding", "gradients", "curvatures", "up", "down")
    }
    with evaluating(model):
        for number, ids in enumerate(samples):
            loss = loss_of(runner, ids, number).item()
            gradient, curvature = derivatives(model, runner, ids, offsets, number)
            up, down = differences(runner, ids, edits, entries, eps)
            found["losses"].append(loss)
            found["gradients"].append(gradient)
            found["curvatures"].append(curvature)
            found["up"].append(up)
            found["down"].append(down)
            found["rounding"].append(
                rounding(runner, ids, edits, entries, loss, gradient, curvature, number)
            )
            progress("derivatives and differences", number + 1, len(samples))
    return Probe(
        tuple(edits.entries), controls, eps, steps, tuple(map(len, samples)),
        **{name: torch.tensor(v, dtype=torch.float64) for name, v in found.items()},
        notes=tuple(edits.notes),
    )  # fmt: skip


def _check(model: nn.Module, entries: Sequence[Entry], random: int, eps: float) -> None:
    if not isinstance(random, int) or isinstance(random, bool) or random < 1:
        raise InvalidInput(f"random must be an integer of at least 1, got {random!r}")
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise InvalidInput(f"eps must be a finite number above 0, got {eps!r}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InvalidInput(
            f"{type(model).__name__} is an encoder and a decoder: a next-token loss needs a decoder"
        )
    for entry in entries:
        dtype = entry.weight.matrix().dtype
        if dtype.itemsize < 4:
            name = str(dtype).removeprefix("torch.")
            raise InvalidInput(
                f"{entry.site} is {name}, too coarse for second derivatives: load the model in "
                "float32"
            )


def _controls(model, entries: Sequence[Entry], coordinates, random: int, seed: int):
    """P x R random entries; all zeros of a matrix are as likely as its other entries."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict = {}
    for site, target in find_targets(model, coordinates).items():
        count = random * len(coordinates.weights[site])
        own_seed = int(torch.randint(1 << 62, (), generator=generator))
        chosen = Coordinates.random({site: target.shape}, count, coordinates, own_seed)
        places = chosen.weights[site][torch.randperm(count, generator=generator)]
        rows, columns = places.to(target.matrix().device).long().unbind(1)
        values = target.matrix()[rows, columns].double().tolist()
        drawn[site] = [Entry(target, *p, v) for p, v in zip(places.tolist(), values)]
    return tuple(tuple(drawn[entry.site].pop() for _ in range(random)) for entry in entries)


def _row_controls(entries: Sequence[Entry], random: int, seed: int):
    """P x R random entries, those of an entry in its own row."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[tuple, list[Entry]] = {}
    for entry in entries:
        rows.setdefault((entry.site, entry.row), []).append(entry)
    drawn = {}
    for (site, row), inside in rows.items():
        weight, taken = inside[0].weight, {entry.column for entry in inside}
        order = torch.randperm(weight.shape[1], generator=generator).tolist()
        free = [column for column in order if column not in taken]
        count = random * len(inside)
        if len(free) < count:
            raise InvalidInput(
                f"row {row} of {site} has {len(free)} other entries, expected {count} for "
                f"{random} random ones beside each weight: give a smaller random"
            )
        values = weight.matrix()[row, free[:count]].double().tolist()
        drawn[site, row] = [Entry(weight, row, c, v) for c, v in zip(free, values)]
    return tuple(
        tuple(drawn[entry.site, entry.row].pop() for _ in range(random)) for entry in entries
    )
