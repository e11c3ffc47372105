"""``scan_stream``: a scan of a checkpoint of which one layer at a time is in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections
from swkernels.models.checkpoint import find_checkpoint
from swkernels.models.empty import empty_model
from swkernels.models.hidden import HiddenStates
from swkernels.models.streaming import open_stream, stored_places

from . import loading
from . import samples as sampling
from .candidates import find_candidates
from .document import document
from .identity import identity
from .peaks import locator
from .ranks import Ranks
from .report import ScanReport
from .scan import Progress, ScanConfig, configured, prepared, saving, what_is_scanned
from .stream_evaluate import StreamedEvaluator
from .stream_peaks import StreamedPeaks
from .stream_state import StreamState
from .verify import verify

BUDGET = 2 * 10**9  # bytes of hidden states in host memory
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def scan_stream(
    source: str | Path,
    inputs=None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    budget: int = BUDGET,
    spill: str | Path | None = None,
    eval_inputs=None,
    config: ScanConfig | None = None,
    progress: Progress | None = None,
    text_source: str | None = None,
    ranks: Ranks | None = None,
    by_layers: bool = False,
    state: StreamState | None = None,
    **settings,
) -> ScanReport:
    """Scan a checkpoint that need not fit into memory: ``scan``, layer by layer.

    Every sample passes a layer before the next layer is read, so that the pass for the peaks reads
    each weight once, whatever the number of samples; verification adds a pass for each round of
    zeroing. In memory are at most two layers (or an embedding or head and a layer), ``budget``
    bytes of hidden states, one batch and the norms. Peaks equal those of ``scan`` bit for bit.

    Args:
        source: a folder of safetensors files with config.json and tokenizer, or the name of a
            model in the local cache of the Hugging Face hub.
        inputs, eval_inputs, config, progress, settings: as of ``scan``.
        device, dtype, trust_remote_code: as of ``loading.load_model``; not "auto" for device.
        budget: bytes of host memory for hidden states; the rest waits in a file.
        spill: the folder of that file; None takes the folder for temporary files.
        text_source: what the report calls the text.
        ranks: the processes that share the work, as of ``scan``. Each reads all layers and passes
            a part of the samples through them; or
        by_layers: each reads a range of the layers for the peaks, and passes all samples on.
        state: the file from which this scan goes on if it is there, and which it writes after
            layers; the caller removes it when the report is safe. Not with several ranks.

    Raises:
        InvalidInput: as ``scan`` and ``load_model``; the weights are quantized; a file changes.
        SwkernelsError: accelerate or greenlet is not installed.
    """
    ranks = ranks or Ranks.alone()
    with ranks.together("scanning"):
        config = configured(config, settings)
        device = _checked(device, dtype, budget, spill)
        folder = find_checkpoint(source)
        if not folder.is_dir():
            raise InvalidInput(
                f"{folder} is a file: streaming reads a folder of safetensors files with "
                "config.json; scan a .gguf file in memory"
            )
        places = stored_places(folder)
        model, tokenizer = _empty(folder, dtype, trust_remote_code, places)
        find_down_projections(model)  # a model without any is refused before a text is read
        tokens, windows, text_source = prepared(
            model, inputs, eval_inputs, tokenizer, config, text_source
        )
        fingerprint = loading.fingerprint(folder)
        if ranks.size > 1:
            ranks.check_equal(what_is_scanned(model, config, tokens, windows), "what they scan")
        if state is not None:
            if ranks.size > 1:
                raise InvalidInput(
                    "a scan layer by layer of several ranks keeps no state: give none, or scan "
                    "with one process"
                )
            state.begin(identity(model, config, tokens, windows, fingerprint, folder, ranks), ranks)
        hidden = HiddenStates(budget, None if spill is None else Path(spill))
        weights = next(model.parameters()).dtype
        progress = progress or (lambda stage, done, total: None)
        try:
            with (
                loading.quiet(),
                sampling.evaluating(model),
                open_stream(model, places, device, weights) as stream,
            ):
                runner = sampling.Runner(model)
                runner.device = stream.device
                peaks = StreamedPeaks(
                    stream, runner, tokens, config, hidden, progress, ranks, by_layers, state
                )
                candidates = find_candidates(peaks.handle.states, peaks.spikes, config)
                verification = None
                if config.verify and candidates:
                    windows = [runner.to_device(window) for window in windows]
                    projections = [state.projection for state in peaks.handle.states]
                    evaluator = StreamedEvaluator(
                        stream, runner, hidden, windows, projections, config.seed, ranks
                    )
                    if state is not None:
                        state.restore_cells(evaluator, projections)
                        progress = saving(progress, state, evaluator, projections)
                    verification = verify(candidates, evaluator, config, progress)
        finally:
            hidden.close()
    data = document(
        model,
        tokenizer,
        tokens,
        config,
        peaks.handle.states,
        locator(tokens),
        candidates,
        verification,
        peaks.record.consistency(),
    )
    data["model"].update(
        name=str(source),
        fingerprint=fingerprint,
        device=device,
        streamed={
            "bytes_read": stream.bytes_read,
            "hidden_peak": hidden.peak,
            "hidden_spilled": hidden.spilled,
        },
    )
    data["inputs"]["source"] = text_source
    return ScanReport(data)


def _checked(device: str | None, dtype: str | None, budget: int, spill) -> str:
    """The device, once everything else that can be checked without reading is."""
    if budget < 0:
        raise InvalidInput(f"the budget must be at least 0 bytes, got {budget}")
    if spill is not None and not Path(spill).is_dir():
        raise InvalidInput(f"there is no folder {spill} for hidden states: make it or name another")
    loading.check_dtype(dtype)
    device = loading.check_device(device)
    if device == "auto":
        raise InvalidInput("streaming takes one device, got 'auto': name cpu, cuda or cuda:N")
    return device


def _empty(folder: Path, dtype: str | None, trust_remote_code: bool, places):
    """The model on the meta device, and its tokenizer or None: token ids need none."""
    where, options = loading.source_of(folder)
    options["trust_remote_code"] = trust_remote_code
    with loading.quiet(), loading.one_line_errors(str(folder)):
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(where, **options)
        if getattr(config, "quantization_config", None) is not None:
            raise InvalidInput(
                f"{folder} is quantized: streaming reads plain weights; scan it in memory"
            )
        has_tokenizer = any((folder / name).exists() for name in _TOKENIZERS)
        tokenizer = AutoTokenizer.from_pretrained(where, **options) if has_tokenizer else None
        if dtype in (None, "auto"):
            stored = (place.dtype for place in places.values() if place.dtype.is_floating_point)
            wanted = getattr(config, "dtype", None) or next(stored, torch.float32)
        else:
            wanted = getattr(torch, dtype)
        return empty_model(config, wanted, trust_remote_code=trust_remote_code), tokenizer
