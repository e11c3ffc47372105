"""Log the peaks of a model while the transformers ``Trainer`` trains it."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback

from swkernels.detect.tracking import TrackHandle, track
from swkernels.errors import InvalidInput


def log_peaks(trainer: Trainer, every: int = 50, **options) -> TrackHandle:
    """Track ``trainer.model`` and log the largest peak of each layer every ``every`` steps.

    Adds entries ``peaks/layer_<i>_in`` and ``peaks/layer_<i>_out`` to the trainer's logs, so they
    reach its history and every reporter; the peaks are those since the last entry.

    Args:
        trainer: a ``transformers.Trainer`` or a subclass of it.
        every: optimizer steps between entries.
        options: of ``swkernels.track``.

    Returns:
        The handle; ``remove()`` ends the tracking.

    Raises:
        InvalidInput: ``every`` is not positive.
        ProjectionNotFound: the model has no down projection.
    """
    if every < 1:
        raise InvalidInput(f"every must be at least 1 step, got {every}")
    handle = track(trainer.model, **options)
    trainer.add_callback(_PeakLogger(trainer, handle, every))
    return handle


class _PeakLogger(TrainerCallback):
    def __init__(self, trainer: Trainer, handle: TrackHandle, every: int):
        self.trainer = trainer
        self.handle = handle
        self.every = every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.trainer.log(peak_entries(self.handle))
            self.handle.reset()


def peak_entries(handle: TrackHandle) -> dict[str, float]:
    """Return the largest input and output peak of each layer as flat log entries."""
    entries: dict[str, float] = {}
    for site in handle.peaks():
        for side, peaks in (("in", site.inputs), ("out", site.outputs)):
            name = f"peaks/layer_{site.layer}_{side}"
            entries[name] = max(entries.get(name, 0.0), float(peaks.values.max()))
    return entries
