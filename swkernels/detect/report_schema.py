"""What a scan's report must hold for all that reads one (docs/report.md says what it means)."""

from __future__ import annotations

from collections.abc import Mapping

from swkernels.documents import (
    COUNT,
    FLAG,
    MAGNITUDE,
    NUMBER,
    SHARE,
    TEXT,
    Either,
    Fields,
    Integer,
    ListOf,
    MapOf,
    Maybe,
    Number,
    OneOf,
    Row,
    Text,
    check_document,
)
from swkernels.errors import InvalidInput

SCHEMA = "swkernels.scan/1"
VERDICTS = ("super weight", "part of a critical set", "mild", "inert", "candidate")
SET_VERDICTS = ("critical set", "mild", "inert")
_MOST_LISTED = 1 << 16  # candidates, sets: a page has a row for each
_SHORT = Text(1024)
_POSITIVE = Number(1e-100, 1e100)  # a threshold, drawn on a log scale
_ROUNDED_SHARE = Number(0, 1.01)

_MEASURED = {
    "perplexity": Maybe(MAGNITUDE),
    "ratio": Maybe(MAGNITUDE),
    "ratio_low": Maybe(MAGNITUDE),
    "ratio_high": Maybe(MAGNITUDE),
    "kl": Maybe(NUMBER),
    "damage": Maybe(NUMBER),
}
_PLACE = {
    "layer": COUNT,
    "module": TEXT,
    "expert": Maybe(COUNT),
    "row": COUNT,
    "column": COUNT,
}
_PEAK = Fields(
    {"value": MAGNITUDE, "channel": COUNT, "sample": COUNT, "position": COUNT, "text": Maybe(TEXT)}
)
_TOP = ListOf(Row((COUNT, MAGNITUDE)))
_COUNTED = {"mixture": Maybe(TEXT), "routed": COUNT, "routed_share": Number(0)}
_LAYER = Fields(
    {
        "layer": COUNT,
        "module": TEXT,
        "expert": Maybe(COUNT),
        "rows": Integer(1),
        "columns": Integer(1),
        "in_peak": _PEAK,
        "out_peak": _PEAK,
        "in_median": MAGNITUDE,
        "out_median": MAGNITUDE,
        "in_top": _TOP,
        "out_top": _TOP,
        "mean": Maybe(NUMBER),
        "std": Maybe(MAGNITUDE),
    },
    _COUNTED,
)
_CANDIDATE = Fields(
    {
        "id": COUNT,
        **_PLACE,
        "weight": NUMBER,
        "in_peak": MAGNITUDE,
        "out_peak": MAGNITUDE,
        "sample": COUNT,
        "position": COUNT,
        "text": Maybe(TEXT),
        "share": _ROUNDED_SHARE,
        "dominance": MAGNITUDE,
        "signed_share": NUMBER,
        "persistence": SHARE,
        "prominence": MAGNITUDE,
        "spikes": COUNT,
        "set": Maybe(COUNT),
        "verdict": OneOf(VERDICTS),
        "methods": Fields(dict.fromkeys(("dominance", "outlier", "threshold"), Maybe(FLAG))),
        **_MEASURED,
        "reason": TEXT,
    }
)
_SET = Fields(
    {
        "id": COUNT,
        "members": ListOf(COUNT, 1, _MOST_LISTED),
        **_MEASURED,
        "leave_one_out": ListOf(Fields({"candidate": COUNT, **_MEASURED}), 0, _MOST_LISTED),
        "verdict": OneOf(SET_VERDICTS),
        "reason": TEXT,
    }
)
_UNSEEN = Fields({name: _PLACE[name] for name in ("layer", "module", "expert")}, _COUNTED)
_SUPER_EXPERT = Fields(
    {
        "layer": COUNT,
        "module": TEXT,
        "expert": COUNT,
        **_COUNTED,
        "candidates": ListOf(COUNT, 1, _MOST_LISTED),
        "sets": ListOf(COUNT, 0, _MOST_LISTED),
        "zeroed": ListOf(COUNT, 1, _MOST_LISTED),
        **_MEASURED,
    }
)
_QUANTIZATION = Fields(
    {"method": _SHORT},
    {"bits": Integer(1), "code": _SHORT, "block": Either((Integer(), _SHORT))},
)
_TIERS = ("100 %", ">= 50 %", ">= 20 %", "any")
_CONSISTENCY = Fields(
    {
        "samples": COUNT,
        "positions": ListOf(Fields({**_PLACE, "count": Integer(1), "share": _ROUNDED_SHARE})),
        "tiers": Fields(dict.fromkeys(_TIERS, COUNT)),
        "settling": ListOf(
            Fields({"samples": Integer(1)} | dict.fromkeys(("all", "half", "fifth", "any"), COUNT)),
            0,
            4096,
        ),
    }
)
_REPORT = Fields(
    {
        "schema": OneOf((SCHEMA,)),
        "created": _SHORT,
        "versions": Fields({"swkernels": _SHORT}),
        "model": Fields(
            {
                "name": TEXT,
                "class": TEXT,
                "parameters": COUNT,
                "dtype": _SHORT,
                "device": _SHORT,
                "layers": COUNT,
                "fingerprint": Maybe(TEXT),
            },
            {"quantization": Maybe(_QUANTIZATION)},
        ),
        "settings": Fields(
            {
                **dict.fromkeys(("critical_ratio", "mild_ratio"), _POSITIVE),
                **dict.fromkeys(
                    (
                        "prominence",
                        "share",
                        "outlier_gamma",
                        "threshold",
                        "critical_damage",
                        "mild_damage",
                        "min_information",
                    ),
                    NUMBER,
                ),
                "methods": ListOf(_SHORT, 0, 16),
            }
        ),
        "inputs": Fields({"samples": COUNT, "tokens": COUNT, "length": COUNT}),
        "layers": ListOf(_LAYER),
        "candidates": ListOf(_CANDIDATE, 0, _MOST_LISTED),
        "sets": ListOf(_SET, 0, _MOST_LISTED),
        "baseline": Maybe(
            Fields(
                {"perplexity": MAGNITUDE, "tokens": COUNT, "windows": COUNT, "information": NUMBER}
            )
        ),
        "null_distribution": Maybe(
            Fields(
                {
                    "draws": COUNT,
                    "ratios": ListOf(MAGNITUDE),
                    "kls": ListOf(NUMBER),
                    "ratio_max": MAGNITUDE,
                    "kl_max": NUMBER,
                    "matched": MAGNITUDE,
                }
            )
        ),
        "consistency": _CONSISTENCY,
        "summary": TEXT,
    },
    {"unseen": ListOf(_UNSEEN), "super_experts": ListOf(_SUPER_EXPERT, 0, _MOST_LISTED)},
)
_VERSIONS = MapOf(Maybe(_SHORT))


def check_report(data: object, where: object) -> None:
    """Check a report: every field that something reads, and that its parts refer to each other.

    Args:
        data: the document, with its infinities and NaN as floats.
        where: what it is called in messages.

    Raises:
        InvalidInput: another schema, a field that is missing or out of range, a candidate outside
            of its matrix, a set of candidates that are not there.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        raise InvalidInput(f"{where}: expected a report of schema {SCHEMA}, got {schema!r:.200}")
    check_document(data, _REPORT, where)
    check_document(data["versions"], _VERSIONS, f"{where} (versions)")
    try:
        _check_references(data)
    except ValueError as error:
        raise InvalidInput(f"{where} is damaged: {error}; scan the model again") from None


def _check_references(data: Mapping) -> None:
    shapes = {(e["layer"], e["module"]): (e["rows"], e["columns"]) for e in data["layers"]}
    for entry in data["layers"]:
        for side, size in (("in", entry["columns"]), ("out", entry["rows"])):
            channels = [entry[f"{side}_peak"]["channel"], *(c for c, _ in entry[f"{side}_top"])]
            if max(channels) >= size:
                raise ValueError(
                    f"{entry['module']!r:.200} has {size} channels, but a peak in {max(channels)}"
                )
    for listed in ("candidates", "sets"):
        for place, entry in enumerate(data[listed]):
            if entry["id"] != place:
                raise ValueError(f"{listed}[{place}] has the id {entry['id']}")
    for c in data["candidates"]:
        rows, columns = shapes.get((c["layer"], c["module"]), (0, 0))
        if c["row"] >= rows or c["column"] >= columns:
            raise ValueError(
                f"candidate {c['id']} is at [{c['row']}, {c['column']}] of {c['module']!r:.200}, "
                f"which is [{rows}, {columns}]"
            )
        if c["set"] is not None and c["set"] >= len(data["sets"]):
            raise ValueError(f"candidate {c['id']} is in set {c['set']}, which is not there")
        if c["ratio"] is not None and None in (c[name] for name in _MEASURED):
            raise ValueError(f"candidate {c['id']} is measured in part")
    for s in data["sets"]:
        members = set(s["members"])
        if len(members) != len(s["members"]) or max(members) >= len(data["candidates"]):
            raise ValueError(f"set {s['id']} has the members {s['members']!r:.80}")
        if not {entry["candidate"] for entry in s["leave_one_out"]} <= members:
            raise ValueError(f"set {s['id']} leaves out what is no member")
        for entry in (s, *s["leave_one_out"]):
            if None in (entry[name] for name in _MEASURED):
                raise ValueError(f"set {s['id']} is measured in part")
    for e in data.get("super_experts", ()):
        for listed, named in (("candidates", e["candidates"] + e["zeroed"]), ("sets", e["sets"])):
            if any(number >= len(data[listed]) for number in named):
                raise ValueError(f"a super expert names {listed} that are not there")
        if None in (e[name] for name in _MEASURED):
            raise ValueError("a super expert is measured in part")
    if (data["baseline"] is None) != (data["null_distribution"] is None):
        raise ValueError("it has a baseline or a null distribution alone")
    samples = data["consistency"]["samples"]
    for entry in data["consistency"]["positions"]:
        if entry["count"] > samples:
            raise ValueError(f"a position spikes in {entry['count']} of {samples} samples")
