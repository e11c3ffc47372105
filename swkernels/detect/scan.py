"""Scan a model for super weights: candidates from peaks, sets, verification by measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections

from . import samples as sampling
from .candidates import find_candidates, find_spikes
from .document import document
from .evaluate import Evaluator
from .identity import identity
from .peaks import batches, locator, read_peaks
from .ranks import Ranks
from .report import ScanReport
from .state import ScanState
from .verify import verify
from .witness import witness

METHODS = ("dominance", "outlier", "threshold")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScanConfig:
    """Every choice of a scan. docs/detection.md derives the defaults and sweeps them.

    Attributes:
        samples, length: how many samples of how many tokens the peaks are taken over.
        batch_size: samples of one length that run together. 1 makes the result independent of
            how a matrix product rounds in batches of different sizes.
        special_tokens: "tokenizer" (as it does by itself), "force" (a BOS before every sample)
            or "none".
        methods: which rules may name candidates: "dominance" (ours), "outlier" (the review's
            |Y| > mean + gamma * std with a dominating product), "threshold" (the super-weight
            paper's code: both sides' argmax above a constant).
        prominence: a channel stands out when its peak is this many times its layer's median.
        share: a weight is a candidate when its product is this share of the absolute sum.
        top_rows, top_columns: how many rows of a layer and columns of a row are looked at.
        max_candidates: the strongest are kept.
        outlier_gamma, threshold: of the two other methods.
        verify: measure; without it every candidate's verdict is "candidate".
        eval_tokens, eval_length: size of the evaluation text and of its windows.
        critical_ratio: a loss that ruins the model: perplexity times this.
        critical_damage, min_information: where the intact model's predictions carry less than
            ``min_information`` nats, a loss of this part of it is critical too.
        mild_ratio, mild_damage: a loss that is there at all (and above every null draw).
        spare_share: a set's member is dropped when it accounts for less than this part of an
            equal share of the set's severity.
        null_draws: random weights of the candidates' magnitude that are zeroed for comparison.
        seed: of the null and the bootstrap.
        backend: explicit backend of the operations, or None.
    """

    samples: int = 8
    length: int = 512
    batch_size: int = 1
    special_tokens: str = "tokenizer"
    methods: tuple[str, ...] = ("dominance",)
    prominence: float = 20.0
    share: float = 0.1
    top_rows: int = 8
    top_columns: int = 4
    max_candidates: int = 16
    outlier_gamma: float = 20.0
    threshold: float = 50.0
    verify: bool = True
    eval_tokens: int = 2048
    eval_length: int = 512
    critical_ratio: float = 4.0
    critical_damage: float = 0.25
    min_information: float = 0.5
    mild_ratio: float = 1.05
    mild_damage: float = 0.02
    spare_share: float = 0.5
    null_draws: int = 6
    seed: int = 42
    backend: str | None = None

    def __post_init__(self):
        for name in ("samples", "length", "batch_size", "top_rows", "top_columns"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_length < 2 or self.eval_tokens < 2:
            raise InvalidInput("eval_length and eval_tokens must be at least 2")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise InvalidInput(f"methods must be among {METHODS}, got {self.methods!r}")


def scan(
    model: nn.Module,
    inputs=None,
    *,
    tokenizer=None,
    eval_inputs=None,
    config: ScanConfig | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    fingerprint: str | None = None,
    source: str | None = None,
    ranks: Ranks | None = None,
    state: ScanState | None = None,
    **settings,
) -> ScanReport:
    """Find the super weights of ``model``, prove them by measurement, and report.

    Three stages: the peaks of every down projection over the samples, in one plain forward each
    and without the language-model head; a second look at the tokens that spike; zeroing, alone,
    in sets and but one, on an evaluation text, against random weights of the same magnitude.
    "None found" is a normal result. The model is left as it was, also after an error.

    Args:
        model: a language model whose down projections ``find_down_projections`` finds.
        inputs: a text, a list of texts, token ids (int64 [N, S] or a list of [S_i]), or a dict
            with ``input_ids`` and ``attention_mask``. None takes the default English prose.
        tokenizer: needed for texts; else only for showing tokens.
        eval_inputs: the evaluation text, in the same forms; None takes ``inputs``.
        config: a ``ScanConfig``; ``settings`` override its fields.
        progress: called with (stage, done, total).
        name, fingerprint, source: of the model and the text, for the report.
        ranks: the processes that share the work, each with the whole model and the same
            arguments; all return the same report. None for this process alone. See
            docs/scale/ranks.md.
        state: the file from which this scan goes on if it is there, and which it writes at an
            interval; the caller removes it when the report is safe. See docs/scale/resume.md.

    Returns:
        A ``ScanReport``; ``super_weights``, ``candidates``, ``sets``, ``save(path)``.

    Raises:
        ProjectionNotFound: the model has no down projection.
        InvalidInput: a text, ids or a setting that cannot be used.
        NonFiniteActivation: NaN or infinity in an activation, with layer, channel and token.
        RankFailed: another rank has failed, died or fallen silent.
    """
    ranks = ranks or Ranks.alone()
    with ranks.together("scanning"):
        config = configured(config, settings)
        given = inputs, tokenizer, eval_inputs
        data = _scan(model, *given, config, progress, source, ranks, state, fingerprint)
    data["model"].update(name=name or type(model).__name__, fingerprint=fingerprint)
    return ScanReport(data)


def _scan(
    model, inputs, tokenizer, eval_inputs, config, progress, source, ranks, state, fingerprint
) -> dict:
    """The report's document, without what names the model."""
    report_progress = progress or (lambda stage, done, total: None)
    find_down_projections(model)  # a model without any is refused before a text is read
    tokens, windows, source = prepared(model, inputs, eval_inputs, tokenizer, config, source)
    if ranks.size > 1:
        ranks.check_equal(what_is_scanned(model, config, tokens, windows), "what they scan")
    if state is not None:
        files = state.files
        what = identity(model, config, tokens, windows, fingerprint, files, ranks)
        state.begin(what, ranks)
    with sampling.evaluating(model):
        runner = sampling.Runner(model)
        handle, record = read_peaks(model, runner, tokens, config, report_progress, ranks, state)
        locate = locator(tokens)
        spikes = find_spikes(handle.states, locate, config)
        step = "looking at the spikes"
        report_progress(step, 0, 1)
        projections = [state.projection for state in handle.states]
        run = lambda batch: runner.body(batch.ids)  # noqa: E731
        witness(run, batches(tokens, config.batch_size), projections, spikes, ranks, step)
        report_progress(step, 1, 1)
        candidates = find_candidates(handle.states, spikes, config)
        verification = None
        if config.verify and candidates:
            windows = [runner.to_device(window) for window in windows]
            evaluator = Evaluator(runner.logits, windows, projections, config.seed, ranks)
            if state is not None:
                state.restore_cells(evaluator, projections)
                evaluator.share_cells()
                report_progress = saving(report_progress, state, evaluator, projections)
            verification = verify(candidates, evaluator, config, report_progress)
    data = document(
        model,
        tokenizer,
        tokens,
        config,
        handle.states,
        locate,
        candidates,
        verification,
        record.consistency(),
    )
    data["inputs"]["source"] = source
    data["model"]["device"] = str(runner.device)  # its first weight may be offloaded
    return data


def saving(progress: Progress, state: ScanState, evaluator, projections) -> Progress:
    """``progress`` that also saves: it is called after each measurement."""

    def call(stage: str, done: int, total: int) -> None:
        state.cell_done(evaluator, projections)
        progress(stage, done, total)

    return call


def what_is_scanned(model, config: ScanConfig, tokens, windows) -> dict:
    """What ranks must agree on: the settings, and hashes of the inputs and the model.

    Of the weights: names, shapes and dtypes of all, and a few values of each down projection.
    """

    def digest(parts) -> str:
        total = hashlib.sha256()
        for part in parts:
            total.update(repr(part).encode())
        return total.hexdigest()

    return {
        "samples": digest(sample.tolist() for sample in tokens),
        "windows": digest(window.tolist() for window in windows),
        "settings": asdict(config) | {"methods": list(config.methods)},
        "tensors": digest((n, list(p.shape), p.dtype) for n, p in model.named_parameters()),
        "weights": digest(
            value[(0,) * (value.dim() - 1)][:8].tolist()
            for projection in find_down_projections(model)
            for value in projection.module.parameters()
            if not value.is_meta and not hasattr(value, "__tensor_flatten__")
        ),
    }


def prepared(
    model: nn.Module, inputs, eval_inputs, tokenizer, config: ScanConfig, source: str | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], str]:
    """The samples [S_i], the windows [1, S] to verify on, and what the text is called."""
    tokens, source = sampling.as_samples(
        inputs, tokenizer, config.samples, config.length, config.special_tokens, source
    )
    sampling.check_vocabulary(model, tokens)
    if eval_inputs is None:
        windows = sampling.as_windows(tokens, config.eval_length, config.eval_tokens)
    else:
        eval_samples, _ = sampling.as_samples(
            eval_inputs,
            tokenizer,
            -(-config.eval_tokens // config.eval_length),
            config.eval_length,
            config.special_tokens,
            None,
        )
        sampling.check_vocabulary(model, eval_samples)
        windows = sampling.as_windows(eval_samples, config.eval_length, config.eval_tokens)
    return tokens, windows, source


def configured(config: ScanConfig | None, settings: dict) -> ScanConfig:
    """``config``, or the defaults, with ``settings`` in place of its fields."""
    known = {field.name for field in fields(ScanConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InvalidInput(f"unknown setting {', '.join(unknown)}: expected {sorted(known)}")
    if "methods" in settings:
        settings["methods"] = tuple(settings["methods"])
    return ScanConfig(**{**asdict(config or ScanConfig()), **settings})
