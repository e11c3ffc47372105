"""Quantized weights or activations: perplexity of the text, and accuracy on the tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from swkernels.backends.plan import Clip
from swkernels.detect.perplexity import Perplexity, perplexity, window_of
from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from swkernels.quant.config import QuantConfig
from swkernels.quant.simulate import (
    Simulated,
    simulated_activations,
    simulated_weights,
    super_channels_of,
)

from ..lab import Lab, NotInModel

PLAIN, CLIP, PRESERVE = METHODS = ("plain", "clip", "preserve")


def quantize(lab: Lab, config: dict, path: Path) -> dict:
    """Measure one cell; the model is as it was afterwards.

    Args:
        config: ``weights`` None (as they are) or {``bits``, ``symmetric``, ``block``, ``method``},
            the last of ``METHODS``; ``activations`` None or {``per``, ``keep``: whether the super
            activations are set aside}; ``z``, the clips to choose from, None being none; ``tokens``
            of the text that are measured (None: all that follow) after ``clip_tokens`` on which
            the clip is chosen; ``window``; ``tasks`` {part: how many questions or None}.

    Returns:
        ``perplexity`` (a ``Perplexity.to_dict``), ``choices`` by task, ``clip``, and ``weights``
        (``matrices``, ``elements`` of the largest, ``kept``) or None.
    """
    window = min(config["window"], window_of(lab.model))
    first, tokens = config["clip_tokens"], config["tokens"]
    text = lab.tokens(None if tokens is None else first + tokens)
    check_text(text, first)

    def loss(clip: float | None) -> float:
        with _quantized(lab, config, clip):
            found = _perplexity(lab, text[:first], window).loss
        return found if math.isfinite(found) else math.inf

    clips = config["z"]
    clip = min(clips, key=loss) if len(clips) > 1 else clips[0]
    with _quantized(lab, config, clip) as weights:
        measured = _perplexity(lab, text[first:], window)
        choices = {}
        if config["tasks"]:
            yardstick = lab.yardstick(tasks=config["tasks"])
            scores = yardstick.read(lab.model, strict=False, progress=lab.progress)
            choices = scores.to_dict()["choices"]
    return {
        "perplexity": measured.to_dict(),
        "choices": choices,
        "clip": clip,
        "weights": None if weights is None else asdict(weights),
    }


def check_text(text: torch.Tensor, first: int) -> None:
    """Refuse a text [N] with less than ``first`` tokens to choose a clip on, and two to measure.

    Raises:
        InvalidInput: so it is.
    """
    if len(text) < first + 2:
        raise InvalidInput(
            f"the text has {len(text):,} tokens: expected {first:,} to choose a clip on, and more "
            "to measure; give a longer text"
        )


def _perplexity(lab: Lab, tokens, window: int) -> Perplexity:
    """A broken model may give a loss that is not finite: that is a figure, too."""
    progress = lambda done, total: lab.progress("perplexity", done, total)  # noqa: E731
    return perplexity(lab.model, tokens, window=window, strict=False, progress=progress)


def _check_reachable(lab: Lab) -> None:
    if any(projection.experts is not None for projection in find_down_projections(lab.model)):
        raise NotInModel("the inputs of fused experts cannot be reached: no such activations")


@contextmanager
def _quantized(lab: Lab, config: dict, clip: float | None) -> Iterator[Simulated | None]:
    """A context in which the model is that of the cell; it gives what its weights are."""
    weights, activations = config["weights"], config["activations"]
    simulated = None
    with ExitStack() as stack:
        if weights is not None:
            kept = lab.super_weights if weights["method"] == PRESERVE else None
            packing = QuantConfig(
                code=f"int{weights['bits']}",
                symmetric=weights["symmetric"],
                block_size=weights["block"],
                clip=None if clip is None else Clip("zscore", clip),
            )
            simulated = stack.enter_context(simulated_weights(lab.model, packing, kept))
        if activations is not None:
            _check_reachable(lab)
            keep = activations["keep"]
            channels = super_channels_of(lab.model, lab.super_weights) if keep else None
            stack.enter_context(
                simulated_activations(lab.model, per=activations["per"], super_channels=channels)
            )
        yield simulated
