"""A training loop for an adapter: it can be interrupted and goes on bit for bit."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from swkernels.errors import InvalidInput, TrainingDiverged
from swkernels.files import write_atomically

from .data import Example, collate, first_prediction, predictions

_SCHEMA = "swkernels.train-state/1"
_OPTIMIZERS = ("adamw", "adafactor")


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: optimizer steps; None takes ``epochs`` passes over the data.
        epochs: passes over the data, used where ``steps`` is None.
        batch_size: sequences of one forward.
        accumulate: forwards whose gradients make one step.
        learning_rate: the highest; it rises over the first ``warmup`` share of the steps and then
            falls to zero, both in a straight line.
        warmup: share of the steps, 0 to 1.
        weight_decay: of the deltas: it pulls a weight back to where it was.
        clip: largest norm of the gradient; 0 does not clip.
        optimizer: "adamw" or "adafactor".
        seed: of the order of the data and of dropout.
        save_every: steps after which the state is written, where a path for it is given.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    seed: int = 0
    save_every: int = 100

    def __post_init__(self):
        least = {"batch_size": 1, "accumulate": 1, "save_every": 1, "seed": 0}
        if self.steps is not None:
            least["steps"] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InvalidInput(f"{name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInput(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise InvalidInput(f"warmup must be a share from 0 to 1, got {self.warmup}")
        if self.optimizer not in _OPTIMIZERS:
            raise InvalidInput(
                f"optimizer must be one of {', '.join(_OPTIMIZERS)}, got {self.optimizer!r}"
            )

    def count(self, examples: int) -> int:
        """How many optimizer steps there are."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * examples / (self.batch_size * self.accumulate)))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (steps - step) / (steps - rising)


class Trainable(Protocol):
    """What ``fit`` trains: an adapter on a model, such as the handle of ``sparse``."""

    model: torch.nn.Module

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained; everything else stays as it is."""

    def identity(self) -> dict[str, str]:
        """What tells it from others of its kind: a state of another one is refused."""


def fit(
    handle: Trainable,
    examples: Sequence[Example],
    settings: Settings,
    *,
    state: Path | None = None,
    until: int | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[float]:
    """Train the parameters of ``handle``, which keep what was reached.

    The loss of a step is the mean over all predicted tokens of its sequences, however they are
    split into forwards.

    Args:
        handle: of ``swkernels.train.sparse``, or another ``Trainable``.
        examples: of ``read_examples``.
        settings: how.
        state: a file for the state: gone on from where it is there, written every
            ``settings.save_every`` steps and when the run ends, for whatever reason. It is left
            there; of a run that is complete it gives the values back without a step.
        until: stop after this step; called again with the same state, the run goes on as if it
            had not stopped. None trains to the end.
        on_step: called with the steps done, all steps, and the loss of the last.

    PyTorch's random generators are seeded with ``settings.seed``.

    Returns:
        The loss of every step in nats, those before an interruption too.

    Raises:
        InvalidInput: the state is of another run.
        TrainingDiverged: a loss or a gradient is NaN or infinite; values and state are those of
            the last good step.
    """
    model, parameters = handle.model, handle.parameters()
    if not any(predictions([example]) for example in examples):
        raise InvalidInput("the data predicts no token: give longer texts")
    steps = settings.count(len(examples))
    last = steps if until is None else min(until, steps)
    key = _key(handle, examples, settings)
    optimizer = _optimizer(parameters, settings)
    torch.manual_seed(settings.seed)
    losses: list[float] = []
    if state is not None and state.exists():
        losses = _restore(state, key, parameters, optimizer)
    good = len(losses), _snapshot(parameters, optimizer)
    was_training = model.training
    model.train()
    try:
        while len(losses) < last:
            loss = _step(model, parameters, optimizer, examples, settings, len(losses), steps)
            losses.append(loss)
            good = len(losses), _snapshot(parameters, optimizer)
            due = len(losses) % settings.save_every == 0 or len(losses) == last
            if state is not None and due:
                _write(state, key, good[1], losses)
            on_step(len(losses), steps, loss)
    except BaseException as error:
        done, tensors = good
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{number}.value"])
        if state is not None and done:
            _write(state, key, tensors, losses[:done])
        if isinstance(error, TrainingDiverged):
            error.losses = losses[:done]
        raise
    finally:
        model.train(was_training)
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: Sequence[Example], batch_size: int) -> float:
    """The mean loss over all predicted tokens in nats, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        total = 0.0
        for first in range(0, len(examples), batch_size):
            part = examples[first : first + batch_size]
            if count := predictions(part):
                loss = _loss(model, part, device)
                total += float(loss.double()) * count
    finally:
        model.train(was_training)
    return total / predictions(examples)


def _step(model, parameters, optimizer, examples, settings, step, steps) -> float:
    size = settings.batch_size * settings.accumulate
    chosen = [examples[i] for i in _order(len(examples), step * size, size, settings.seed)]
    chosen.sort(key=lambda example: len(example.ids))  # like lengths together: less padding
    device = next(model.parameters()).device
    count = max(1, predictions(chosen))
    optimizer.zero_grad()
    total = 0.0
    for first in range(0, size, settings.batch_size):
        part = chosen[first : first + settings.batch_size]
        of_part = predictions(part)
        if not of_part:  # the mean over no token is NaN
            continue
        loss = _loss(model, part, device) * (of_part / count)
        loss.backward()
        total += float(loss.detach().double())
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf)
    if not (math.isfinite(total) and math.isfinite(norm)):
        what = "loss" if not math.isfinite(total) else "gradient"
        raise TrainingDiverged(
            f"the {what} is not finite in step {step + 1}: the values of step {step} are kept; "
            "try a lower learning rate or another dtype"
        )
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step, steps)
    optimizer.step()
    return total


def _loss(model, examples, device) -> torch.Tensor:
    """The model's own loss: the mean over the predicted tokens.

    Its head is left out before the first of them where the model can do so: of a question with a
    short answer the head over the vocabulary costs more than a layer does.
    """
    batch = collate(examples, device)
    first = first_prediction(examples)
    if first and "logits_to_keep" in inspect.signature(model.forward).parameters:
        places = torch.arange(first, batch["labels"].shape[1], device=device)
        batch["labels"] = batch["labels"][:, first:]  # [B, S - first]
        # Places and not their number: a gather is contiguous, and the head one product. Of a slice
        # that needs a gradient PyTorch makes a batched product, which reads the head B times.
        batch["logits_to_keep"] = places
    return model(**batch, use_cache=False).loss


def _order(count: int, first: int, size: int, seed: int) -> list[int]:
    """The examples of a step: every pass over the data goes through all in an order of its own."""
    found = []
    for place in range(first, first + size):
        epoch, index = divmod(place, count)
        found.append(int(_permutation(count, seed + epoch)[index]))
    return found


@functools.lru_cache(maxsize=2)  # a step may span two passes; drawing anew each step is slow
def _permutation(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _optimizer(parameters, settings: Settings) -> torch.optim.Optimizer:
    made = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adafactor
    return made(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _key(handle: Trainable, examples: Sequence[Example], settings: Settings) -> dict:
    """What a state must have been made with, as JSON has it."""
    data = hashlib.sha256()
    for example in examples:
        data.update(example.ids.numpy().tobytes() + example.labels.numpy().tobytes())
    found = {name: value for name, value in asdict(settings).items() if name != "save_every"}
    found |= {"data": data.hexdigest()[:16]} | handle.identity()
    return found | {"dtype": str(next(handle.model.parameters()).dtype)}


def _snapshot(parameters, optimizer) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on, copied."""
    found = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda_rng"] = torch.cuda.get_rng_state()
    for number, parameter in enumerate(parameters):
        found[f"{number}.value"] = parameter.detach().clone()
        for name, value in optimizer.state[parameter].items():
            found[f"{number}.{name}"] = value.detach().clone()
    return found


def _write(path: Path, key: dict, good: dict, losses: list[float]) -> None:
    from safetensors.torch import save

    tensors = {name: value.cpu().contiguous() for name, value in good.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    metadata = {"schema": _SCHEMA, "step": str(len(losses)), "key": json.dumps(key)}
    write_atomically(path, save(tensors, metadata))


def _restore(path: Path, key: dict, parameters, optimizer) -> list[float]:
    """Put a state back; returns the losses so far. Nothing is changed where it does not fit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        found = json.loads(metadata["key"]) if metadata.get("schema") == _SCHEMA else None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InvalidInput(f"cannot read {path} as the state of a run: {error}") from error
    if found is None:
        raise InvalidInput(f"{path} is no state of a run ({_SCHEMA}): remove it or name another")
    other = [name for name in key if found.get(name) != key[name]]
    if other:
        raise InvalidInput(
            f"{path} is the state of a run with another {', '.join(other)}: give the same, or "
            "begin anew elsewhere"
        )
    torch.set_rng_state(tensors["rng"])
    if "cuda_rng" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda_rng"])
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            prefix = f"{number}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            parameter.copy_(own.pop("value"))
            optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device)
                for name, value in own.items()
            }
    return tensors["losses"].tolist()
