"""Watch recorded super weights while the transformers ``Trainer`` trains the model around them."""

from __future__ import annotations

import logging

from transformers import TrainerCallback

from swkernels.errors import InvalidInput, SuperWeightChanged
from swkernels.guard.live import LiveCheck, check
from swkernels.guard.manifest import Manifest

_LOGGER = logging.getLogger(__name__)
_SHOWN = 4  # changed super weights that a message names


class SuperWeightGuard(TrainerCallback):
    """Check every ``every`` steps, and at each save, that no recorded super weight has changed.

    For training that is to leave them as they are: ``swkernels.train.freeze`` with ``protect``,
    adapters, or other weights alone. Only their few values are looked at. The model is checked once
    before the first step, so that one whose super weights cannot be compared is refused there.

    Attributes:
        changes: (step, ``Hit``) of each super weight that was found changed, once.

    Args:
        manifest: of the checkpoint that is trained, with super weights.
        every: optimizer steps between checks.
        on_change: "raise" ends the training with ``SuperWeightChanged``; "log" warns, and goes on.

    Raises:
        InvalidInput: a setting; and, as training begins, a model that cannot be compared.
        SuperWeightChanged: from the training, which names the weights.
    """

    def __init__(self, manifest: Manifest, every: int = 100, on_change: str = "raise"):
        if every < 1:
            raise InvalidInput(f"every must be at least 1 step, got {every}")
        if on_change not in ("raise", "log"):
            raise InvalidInput(f'on_change must be "raise" or "log", got {on_change!r}')
        if not manifest.super_weights:
            raise InvalidInput(
                "the manifest has no super weights to guard: make it with a scan's report"
            )
        self.manifest = manifest
        self.every = every
        self.on_change = on_change
        self.changes: list[tuple[int, object]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        result = self._check(state.global_step, model)
        if result.not_compared:
            name, why = result.not_compared[0]
            raise InvalidInput(
                f"{len(result.not_compared)} tensors with super weights cannot be compared, "
                f"{name} first: {why}"
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._check(state.global_step, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._check(state.global_step, model)

    def _check(self, step: int, model) -> LiveCheck:
        result = check(model, self.manifest, fast=True)
        known = {hit.weight for _, hit in self.changes}
        new = [hit for hit in result.hits if hit.weight not in known]
        self.changes += [(step, hit) for hit in new]
        if new:
            named = "; ".join(map(str, new[:_SHOWN]))
            message = (
                f"{len(new)} super weights have changed by step {step}: {named}"
                f"{', ...' if len(new) > _SHOWN else ''}"
            )
            if self.on_change == "raise":
                raise SuperWeightChanged(
                    f"{message}; freeze them (swkernels.train.freeze) and begin again"
                )
            _LOGGER.warning(message)
        return result
