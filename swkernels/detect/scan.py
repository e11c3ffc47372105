"""Scan a model for super weights: candidates from peaks, sets, verification by measurement."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone

import torch
from torch import nn

from swkernels import ops
from swkernels.errors import InvalidInput
from swkernels.models import find_down_projections

from . import samples as sampling
from .candidates import Candidate, find_candidates, find_spikes
from .consistency import Consistency
from .criteria import outlier_threshold
from .evaluate import Evaluator, Measurement
from .report import SCHEMA, ScanReport, versions
from .tracking import TrackHandle, track
from .verify import (
    CRITICAL_SET,
    INERT,
    MILD,
    PART_OF_SET,
    SUPER_WEIGHT,
    Verification,
    verify,
)
from .witness import witness

METHODS = ("dominance", "outlier", "threshold")
CANDIDATE = "candidate"  # the verdict of a scan that does not verify
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

    Returns:
        A ``ScanReport``; ``super_weights``, ``candidates``, ``sets``, ``save(path)``.

    Raises:
        ProjectionNotFound: the model has no down projection.
        InvalidInput: a text, ids or a setting that cannot be used.
        NonFiniteActivation: NaN or infinity in an activation, with layer, channel and token.
    """
    config = _configured(config, settings)
    report_progress = progress or (lambda stage, done, total: None)
    find_down_projections(model)  # a model without any is refused before a text is read
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
    with sampling.evaluating(model):
        runner = sampling.Runner(model)
        handle, consistency = _peaks(model, runner, tokens, config, report_progress)
        locate = _locator(tokens)
        spikes = find_spikes(handle, locate, config)
        report_progress("looking at the spikes", 0, 1)
        projections = [state.projection for state in handle.states]
        witness(lambda sample: runner.body(tokens[sample][None]), projections, spikes)
        report_progress("looking at the spikes", 1, 1)
        candidates = find_candidates(handle, spikes, config)
        verification = None
        if config.verify and candidates:
            windows = [runner.to_device(window) for window in windows]
            evaluator = Evaluator(runner.logits, windows, projections, config.seed)
            verification = verify(candidates, evaluator, config, report_progress)
    document = _document(
        model, tokenizer, tokens, config, handle, locate, candidates, verification, consistency
    )
    document["model"].update(name=name or type(model).__name__, fingerprint=fingerprint)
    document["inputs"]["source"] = source
    return ScanReport(document)


def _configured(config: ScanConfig | None, settings: dict) -> ScanConfig:
    known = {field.name for field in fields(ScanConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InvalidInput(f"unknown setting {', '.join(unknown)}: expected {sorted(known)}")
    if "methods" in settings:
        settings["methods"] = tuple(settings["methods"])
    return ScanConfig(**{**asdict(config or ScanConfig()), **settings})


def _peaks(model, runner, tokens, config: ScanConfig, progress: Progress):
    """Stage 1's pass: one forward of the body a batch, peaks merged, spikes counted."""
    consistency = Consistency(config)
    moments = "outlier" in config.methods
    handle = track(model, per_sample=True, moments=moments, backend=config.backend)
    with handle:
        done = 0
        for batch in _batches(tokens, config.batch_size):
            runner.body(torch.stack(batch))
            handle.check_finite()
            for sample in range(len(batch)):
                consistency.add(handle.states, sample)
            done += len(batch)
            progress("reading peaks", done, len(tokens))
    return handle, consistency


def _batches(tokens: list[torch.Tensor], batch_size: int):
    batch: list[torch.Tensor] = []
    for sample in tokens:
        if batch and (len(batch) == batch_size or len(sample) != len(batch[0])):
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def _locator(tokens: list[torch.Tensor]) -> Callable[[int], tuple[int, int]]:
    starts = [0]
    for sample in tokens[:-1]:
        starts.append(starts[-1] + len(sample))

    def locate(token: int) -> tuple[int, int]:
        sample = bisect.bisect_right(starts, token) - 1
        return sample, token - starts[sample]

    return locate


def _document(
    model, tokenizer, tokens, config, handle, locate, candidates, verification, consistency
) -> dict:
    def text(sample: int, position: int) -> str | None:
        if tokenizer is None:
            return None
        return tokenizer.decode([int(tokens[sample][position])])

    counts = consistency.counts
    listed = [
        _candidate_entry(i, c, verification, counts.get(c.position, 0), text)
        for i, c in enumerate(candidates)
    ]
    sets = _set_entries(verification)
    parameters = sum(p.numel() for p in model.parameters())
    first = next(model.parameters())
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions("torch", "transformers", "triton"),
        "model": {
            "class": type(model).__name__,
            "parameters": parameters,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "layers": len({state.projection.layer for state in handle.states}),
        },
        "settings": {**asdict(config), "methods": list(config.methods)},
        "inputs": {
            "samples": len(tokens),
            "tokens": sum(len(sample) for sample in tokens),
            "length": max(len(sample) for sample in tokens),
            "special_tokens": config.special_tokens,
        },
        "layers": _layer_entries(handle, config, locate, text),
        "candidates": listed,
        "sets": sets,
        "baseline": None
        if verification is None
        else {
            "perplexity": verification.baseline.perplexity,
            "tokens": sum(verification.baseline.tokens),
            "windows": verification.baseline.windows,
            "information": verification.baseline.information,
        },
        "null_distribution": None
        if verification is None
        else {
            "draws": len(verification.null.measurements),
            "ratios": [m.ratio for m in verification.null.measurements],
            "kls": [m.kl for m in verification.null.measurements],
            "ratio_max": verification.null.ratio_max,
            "kl_max": verification.null.kl_max,
            "matched": verification.null.matched,
        },
        "consistency": consistency.to_dict(),
        "summary": summarize(listed, sets) + _caveat(verification, config),
    }


def _layer_entries(handle: TrackHandle, config: ScanConfig, locate, text) -> list[dict]:
    entries = []
    per_site = [state for state in handle.states for _ in range(state.experts)]
    for state, site in zip(per_site, handle.peaks()):
        if int(site.outputs.tokens.max()) < 0:
            continue
        mean = std = None
        if state.moments is not None:
            moments = state.moments[site.expert if state.projection.experts else 0].tolist()
            mean = outlier_threshold(*moments, 0.0)
            std = outlier_threshold(*moments, 1.0) - mean
        entries.append(
            {
                "layer": site.layer,
                "module": site.name,
                "expert": site.expert,
                "rows": state.projection.rows,
                "columns": state.projection.columns,
                "in_peak": _peak_entry(site.inputs, locate, text),
                "out_peak": _peak_entry(site.outputs, locate, text),
                "in_median": float(site.inputs.values.median()),
                "out_median": float(site.outputs.values.median()),
                "in_top": _top(site.inputs.values, config.top_rows),
                "out_top": _top(site.outputs.values, config.top_rows),
                "mean": mean,
                "std": std,
            }
        )
    return entries


def _peak_entry(peaks: ops.Peaks, locate, text) -> dict:
    channel = int(peaks.values.argmax())
    sample, position = locate(int(peaks.tokens[channel]))
    return {
        "value": float(peaks.values[channel]),
        "channel": channel,
        "sample": sample,
        "position": position,
        "text": text(sample, position),
    }


def _top(values: torch.Tensor, count: int) -> list[list]:
    top = values.topk(min(count, len(values)))
    return [[int(c), float(v)] for c, v in zip(top.indices, top.values)]


def _candidate_entry(
    i: int, c: Candidate, verification: Verification | None, spikes: int, text
) -> dict:
    measured = verification.singles[i] if verification else Measurement()
    verdict = verification.verdicts[i] if verification else CANDIDATE
    entry = {
        "id": i,
        "layer": c.projection.layer,
        "row": c.row,
        "column": c.column,
        "expert": c.expert,
        "module": c.projection.name,
        "weight": c.weight,
        "in_peak": c.in_peak,
        "out_peak": c.spike.peak,
        "sample": c.spike.sample,
        "position": c.spike.position,
        "text": text(c.spike.sample, c.spike.position),
        "share": c.share,
        "dominance": c.dominance,
        "signed_share": c.signed_share,
        "persistence": c.spike.persistence,
        "prominence": c.spike.prominence,
        "spikes": spikes,
        "set": verification.set_of[i] if verification else None,
        "verdict": verdict,
        "methods": c.methods,
        **_measured(measured, verification is not None),
    }
    entry["reason"] = _reason(c, entry)
    return entry


def _measured(m: Measurement, measured: bool) -> dict:
    names = ("perplexity", "ratio", "ratio_low", "ratio_high", "kl", "damage")
    return {name: getattr(m, name) if measured else None for name in names}


def _reason(c: Candidate, entry: dict) -> str:
    spike = (
        f"channel {c.row} peaks at {c.spike.prominence:.0f} times its layer's median and this "
        f"product makes {c.share:.0%} of it"
    )
    if c.spike.persistence == 0:
        spike += "; the residual stream does not carry it on: it cancels what stood there"
    if entry["ratio"] is None:
        return f"{spike}; not verified"
    loss = f"zeroed alone, perplexity x{entry['ratio']:.4g}, damage {entry['damage']:.1%}"
    return f"{spike}; {loss}: {entry['verdict']}"


def _set_entries(verification: Verification | None) -> list[dict]:
    if verification is None:
        return []
    entries = []
    for i, s in enumerate(verification.sets):
        entries.append(
            {
                "id": i,
                "members": s.members,
                **_measured(s.measurement, True),
                "leave_one_out": [
                    {"candidate": member, **_measured(m, True)}
                    for member, m in s.leave_one_out.items()
                ],
                "verdict": s.verdict,
                "reason": f"zeroed together, perplexity x{s.measurement.ratio:.4g}, damage "
                f"{s.measurement.damage:.1%}: {s.verdict}",
            }
        )
    return entries


def summarize(candidates: list[dict], sets: list[dict]) -> str:
    """Say in a sentence what a scan found."""

    def count(verdict: str) -> int:
        return sum(c["verdict"] == verdict for c in candidates)

    if not candidates:
        return "None found: no output channel of a down projection stands out by one weight."
    if candidates[0]["verdict"] == CANDIDATE:
        return f"{len(candidates)} candidates, not verified by measurement."
    critical = [s for s in sets if s["verdict"] == CRITICAL_SET]
    rest = f"{count(MILD)} mild, {count(INERT)} inert."
    if not count(SUPER_WEIGHT) and not critical:
        return f"None found: {len(candidates)} candidates spike, none ruins the model; {rest}"
    alone = [_name(c) for c in candidates if c["verdict"] == SUPER_WEIGHT]
    found = [f"{len(alone)} super weight{'s' * (len(alone) != 1)}: {', '.join(alone)}"] * bool(
        alone
    )
    for s in critical:
        members = ", ".join(_name(candidates[i]) for i in s["members"])
        found.append(f"critical set {{{members}}}, jointly x{s['ratio']:.4g}")
    part = count(PART_OF_SET)
    return f"{'; '.join(found)}; {part} more part of a critical set, {rest}"


def _caveat(verification: Verification | None, config: ScanConfig) -> str:
    if verification is None or verification.baseline.information >= config.min_information:
        return ""
    return (
        f" The intact model's predictions carry only {verification.baseline.information:.2g} "
        "nats about this text, so verdicts rest on how much they change, not on perplexity."
    )


def _name(c: dict) -> str:
    expert = "" if c["expert"] is None else f" expert {c['expert']}"
    return f"layer {c['layer']}{expert} [{c['row']}, {c['column']}]"
