"""The report's document, from what the stages of a scan found."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone

import torch

from swkernels import ops
from swkernels.models import DownProjection

from .candidates import Candidate
from .criteria import outlier_threshold
from .evaluate import Measurement
from .formats import stored_as
from .mixtures import FIGURES, super_experts, unseen_sentence
from .report import SCHEMA, versions
from .tracking import ProjectionState
from .verify import (
    CRITICAL_SET,
    INERT,
    MILD,
    PART_OF_SET,
    SUPER_WEIGHT,
    Verification,
)

CANDIDATE = "candidate"  # the verdict of a scan that does not verify


def document(
    model, tokenizer, tokens, config, states, locate, candidates, verification, consistency
) -> dict:
    """Build the report's document (docs/report.md) from what a scan found."""

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
    layers, unseen = _layer_entries(states, sum(map(len, tokens)), config, locate, text)
    supers = super_experts(listed, sets, layers)
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
            "layers": len({state.projection.layer for state in states}),
            "quantization": stored_as(model),
        },
        "settings": {**asdict(config), "methods": list(config.methods)},
        "inputs": {
            "samples": len(tokens),
            "tokens": sum(len(sample) for sample in tokens),
            "length": max(len(sample) for sample in tokens),
            "special_tokens": config.special_tokens,
        },
        "layers": layers,
        "unseen": unseen,
        "candidates": listed,
        "sets": sets,
        "super_experts": supers,
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
        "summary": " ".join(
            filter(
                None,
                (
                    summarize(listed, sets, partial=bool(unseen)),
                    _super_sentence(supers),
                    unseen_sentence({"layers": layers, "unseen": unseen}),
                    _caveat(verification, config),
                ),
            )
        ),
    }


def _layer_entries(
    states: list[ProjectionState], tokens: int, config, locate, text
) -> tuple[list[dict], list[dict]]:
    """The entries of what tokens have reached, and of the experts that none has."""
    entries: list[dict] = []
    unseen: list[dict] = []
    sites = [(state, site) for state in states for site in state.peaks()]
    for state, site in sites:
        place = {
            "layer": site.layer,
            "module": site.name,
            "expert": site.expert,
            "mixture": _mixture(state.projection),
        }
        if not site.routed:
            unseen.append(place)
            continue
        mean = std = None
        if state.moments is not None:
            moments = state.moments[site.expert if state.projection.experts else 0].tolist()
            mean = outlier_threshold(*moments, 0.0)
            std = outlier_threshold(*moments, 1.0) - mean
        entries.append(
            {
                **place,
                "routed": site.routed,
                "routed_share": site.routed / tokens,
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
    return entries, unseen


def _mixture(projection: DownProjection) -> str | None:
    """The path of the module that routes tokens to this expert; None of a dense projection."""
    if projection.scope is None:
        return None
    for name, module in projection.block.named_modules():
        if module is projection.scope:
            return f"{projection.block_name}.{name}" if name else projection.block_name
    return projection.name


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
    return {name: getattr(m, name) if measured else None for name in FIGURES}


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


def summarize(candidates: list[dict], sets: list[dict], partial: bool = False) -> str:
    """Say in a sentence what a scan found; ``partial``: there are experts that were not seen."""
    none = "None found in what tokens reached" if partial else "None found"

    def count(verdict: str) -> int:
        return sum(c["verdict"] == verdict for c in candidates)

    if not candidates:
        return f"{none}: no output channel of a down projection stands out by one weight."
    if candidates[0]["verdict"] == CANDIDATE:
        return f"{len(candidates)} candidates, not verified by measurement."
    critical = [s for s in sets if s["verdict"] == CRITICAL_SET]
    rest = f"{count(MILD)} mild, {count(INERT)} inert."
    if not count(SUPER_WEIGHT) and not critical:
        one = len(candidates) == 1
        spiking = f"{len(candidates)} candidate{' spikes' if one else 's spike'}"
        return f"{none}: {spiking}, none ruins the model; {rest}"
    alone = [_name(c) for c in candidates if c["verdict"] == SUPER_WEIGHT]
    found = [f"{len(alone)} super weight{'s' * (len(alone) != 1)}: {', '.join(alone)}"] * bool(
        alone
    )
    for s in critical:
        members = ", ".join(_name(candidates[i]) for i in s["members"])
        found.append(f"critical set {{{members}}}, jointly x{s['ratio']:.4g}")
    part = count(PART_OF_SET)
    return f"{'; '.join(found)}; {part} more part of a critical set, {rest}"


def _super_sentence(supers: list[dict]) -> str:
    if not supers:
        return ""
    names = ", ".join(f"layer {e['layer']} expert {e['expert']}" for e in supers)
    return f"{len(supers)} super expert{'s' * (len(supers) != 1)}: {names}."


def _caveat(verification: Verification | None, config) -> str:
    if verification is None or verification.baseline.information >= config.min_information:
        return ""
    return (
        f"The intact model's predictions carry only {verification.baseline.information:.2g} "
        "nats about this text, so verdicts rest on how much they change, not on perplexity."
    )


def _name(c: dict) -> str:
    expert = "" if c["expert"] is None else f" expert {c['expert']}"
    return f"layer {c['layer']}{expert} [{c['row']}, {c['column']}]"
