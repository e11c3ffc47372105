"""From what a caller gives (texts, ids, batches) to samples of token ids, and how they are run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models.offloaded import execution_device


def as_samples(
    inputs, tokenizer, samples: int, length: int, special_tokens: str, source: str | None
) -> tuple[list[torch.Tensor], str]:
    """Turn ``inputs`` into at most ``samples`` int64 [S_i] tensors, and name where they are from.

    Texts are cut into windows of ``length`` tokens; ids are taken as they are, cut at ``length``
    and without their padding.
    """
    if inputs is None or isinstance(inputs, str) or _all_texts(inputs):
        from . import text

        if tokenizer is None:
            raise InvalidInput("texts need a tokenizer: pass tokenizer=, or pass token ids")
        if inputs is None:
            inputs, source = text.default_text(), source or text.DEFAULT_SOURCE
        return text.make_samples(
            inputs, tokenizer, samples=samples, length=length, special_tokens=special_tokens
        ), source or "text given by the caller"
    ids = [row[:length] for row in _rows(inputs)][:samples]
    if not ids:
        raise InvalidInput("the inputs hold no sample")
    if any(len(row) < 1 for row in ids):
        raise InvalidInput("a sample is empty: every sample needs at least 1 token")
    return ids, source or "token ids given by the caller"


def _all_texts(inputs) -> bool:
    return isinstance(inputs, (list, tuple)) and all(isinstance(item, str) for item in inputs)


def _rows(inputs) -> list[torch.Tensor]:
    mask = None
    if not isinstance(inputs, (torch.Tensor, list, tuple)):
        inputs, mask = inputs["input_ids"], inputs.get("attention_mask")
    rows = [torch.as_tensor(row) for row in inputs]
    for row in rows:
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise InvalidInput(
                f"token ids must be integers [N, S] or a list of [S], got a row of "
                f"{row.dtype} {list(row.shape)}"
            )
    if mask is not None:
        rows = [row[torch.as_tensor(keep).bool()] for row, keep in zip(rows, mask)]
    return [row.long().cpu() for row in rows]


def as_windows(samples: list[torch.Tensor], length: int, tokens: int) -> list[torch.Tensor]:
    """Cut samples into [1, S] windows of at most ``length`` tokens, ``tokens`` in all."""
    windows, taken = [], 0
    for sample in samples:
        for window in sample.split(length):
            if len(window) >= 2 and taken < tokens:
                windows.append(window[None])
                taken += len(window)
    if not windows:
        raise InvalidInput("the evaluation text is shorter than one window of 2 tokens")
    return windows


def check_vocabulary(model: nn.Module, samples: list[torch.Tensor]) -> None:
    """Raise InvalidInput if a token id has no embedding: tokenizer and model do not match."""
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embed, "num_embeddings", None)
    low, high = min(int(s.min()) for s in samples), max(int(s.max()) for s in samples)
    if rows is not None and (high >= rows or low < 0):
        raise InvalidInput(
            f"token id {high if high >= rows else low} is outside the model's vocabulary of "
            f"{rows}: use the tokenizer that belongs to the model"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in eval mode; give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def most_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model takes; None where its config names no limit."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class Runner:
    """Runs a model on token ids: the body without its head, or the whole for logits."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._body = _without_head(model)
        self._encoder_decoder = bool(
            getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        )
        self._hugging_face = hasattr(model, "config")
        takes = inspect.signature(model.forward).parameters
        self._keeps_logits = self._hugging_face and "logits_to_keep" in takes
        embed = getattr(model, "get_input_embeddings", lambda: None)()
        weight = getattr(embed, "weight", None)
        self.device = next(model.parameters()).device if weight is None else weight.device
        if self.device.type == "meta" and embed is not None:  # offloaded between forwards
            self.device = execution_device(embed) or self.device

    def to_device(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.to(self.device)

    def body(self, ids: torch.Tensor) -> None:
        """Run everything but the language-model head on ids [B, S]."""
        self._call(self._body, ids)

    def logits(self, ids: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Return the logits [B, S, V] for ids [B, S].

        ``last``: only the logits of so many last tokens are needed. Where the model can leave the
        others out, they are not there.
        """
        fewer = last is not None and last < ids.shape[1] and self._keeps_logits
        output = self._call(self.model, ids, **({"logits_to_keep": last} if fewer else {}))
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) else logits
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise InvalidInput(
                f"{type(self.model).__name__} gives no logits [B, S, V]: verification needs a "
                "model with a language-model head; scan with verify=False"
            )
        return logits

    def _call(self, module: nn.Module, ids: torch.Tensor, **options):
        ids = self.to_device(ids)
        if self._encoder_decoder:
            return module(input_ids=ids, decoder_input_ids=ids, use_cache=False)
        if self._hugging_face:
            return module(input_ids=ids, use_cache=False, **options)
        return module(ids)


def _without_head(model: nn.Module) -> nn.Module:
    body = model
    while isinstance(getattr(body, getattr(body, "base_model_prefix", "") or "", None), nn.Module):
        body = getattr(body, body.base_model_prefix)
    return body
