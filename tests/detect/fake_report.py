"""Synthetic scan reports: documents of the true format without a model behind them."""

from __future__ import annotations

from dataclasses import asdict

from swkernels.detect.mixtures import super_experts
from swkernels.detect.scan import ScanConfig

METHODS = {"dominance": True, "outlier": None, "threshold": False}
UNMEASURED = dict.fromkeys(("perplexity", "ratio", "ratio_low", "ratio_high", "kl", "damage"))


def measured(ratio: float) -> dict:
    """The six figures of a measurement, as they follow from a ratio."""
    return {
        "perplexity": 16.75 * ratio,
        "ratio": ratio,
        "ratio_low": ratio * 0.91,
        "ratio_high": ratio * 1.12,
        "kl": 0.1234 * ratio,
        "damage": 0.04321 * ratio,
    }


def candidate(
    id: int, layer: int, row: int, column: int, verdict: str, ratio: float | None, **changes
) -> dict:
    """One candidate; ``ratio`` None means not verified."""
    entry = {
        "id": id,
        "layer": layer,
        "row": row,
        "column": column,
        "expert": None,
        "module": f"model.layers.{layer}.mlp.down_proj",
        "weight": 1.9375 - id,
        "in_peak": 813.25 / (id + 1),
        "out_peak": 1571.5 / (id + 1),
        "sample": 1,
        "position": 0,
        "text": " the",
        "share": 0.7303,
        "dominance": 2.7077,
        "signed_share": 0.7339,
        "persistence": 0.8947,
        "prominence": 486.43,
        "spikes": 3,
        "set": None,
        "verdict": verdict,
        "methods": dict(METHODS),
        **(UNMEASURED if ratio is None else measured(ratio)),
        "reason": f"channel {row} peaks at 486 times its layer's median",
    }
    return {**entry, **changes}


def weight_set(id: int, members: list[int], verdict: str, ratio: float) -> dict:
    """One set; the more members are zeroed, the larger its leave-one-out ratios."""
    return {
        "id": id,
        "members": members,
        **measured(ratio),
        "leave_one_out": [
            {"candidate": member, **measured(1 + 0.25 * (i + 1))}
            for i, member in enumerate(members)
        ],
        "verdict": verdict,
        "reason": f"zeroed together, perplexity x{ratio:.4g}",
    }


def layer(
    index: int, expert: int | None = None, peak: float = 30.0, shape: tuple = (4096, 11008)
) -> dict:
    """One entry of ``layers``, of a matrix of ``shape``."""
    place = {"sample": 0, "position": 3, "text": "The"}
    rows, columns = shape
    routed = 2048 if expert is None else 17 + (expert * 37 + index) % 113
    channel, spike = (7003 + index) % columns, 2533 % rows
    return {
        "layer": index,
        "module": f"model.layers.{index}.mlp.down_proj",
        "expert": expert,
        "mixture": None if expert is None else f"model.layers.{index}.mlp",
        "routed": routed,
        "routed_share": routed / 2048,
        "rows": rows,
        "columns": columns,
        "in_peak": {"value": peak / 3, "channel": channel, **place},
        "out_peak": {"value": peak, "channel": spike, **place},
        "in_median": 1.1,
        "out_median": 4.2,
        "in_top": [[channel, peak / 3], [12, 1.5]],
        "out_top": [[spike, peak], [9, 5.5]],
        "mean": None,
        "std": None,
    }


def report(
    candidates: list[dict] = (),
    sets: list[dict] = (),
    *,
    layers: int = 6,
    experts: int | None = None,
    unseen: set[tuple[int, int]] = frozenset(),
    verified: bool = True,
    summary: str = "A summary.",
    shape: tuple = (4096, 11008),
) -> dict:
    """A whole document; verified is what gives it a baseline and a null.

    ``unseen``: (layer, expert) of the experts that no token reached.
    """
    verified = verified and bool(candidates)
    positions = [
        {
            **{key: c[key] for key in ("layer", "module", "expert", "row", "column")},
            "count": 4 - i % 4,
            "share": (4 - i % 4) / 4,
        }
        for i, c in enumerate(candidates)
    ]
    size = len(positions)
    config = ScanConfig(verify=verified, null_draws=3)
    settings = {**asdict(config), "methods": list(config.methods)}
    return {
        "schema": "swkernels.scan/1",
        "created": "2026-11-23T12:25:13+00:00",
        "versions": {
            "swkernels": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "triton": None,
        },
        "model": {
            "class": "LlamaForCausalLM",
            "parameters": 6738415616,
            "dtype": "float16",
            "device": "cpu",
            "layers": layers,
            "quantization": None,
            "name": "a-model",
            "fingerprint": None,
        },
        "settings": settings,
        "inputs": {
            "samples": 4,
            "tokens": 2048,
            "length": 512,
            "special_tokens": "tokenizer",
            "source": "token ids given by the caller",
        },
        "layers": [
            layer(i, expert, 30.0 + 700.0 * (i == 2) + (expert or 0), shape)
            for i in range(layers)
            for expert in (range(experts) if experts else [None])
            if (i, expert) not in unseen
        ],
        "unseen": [
            {
                "layer": i,
                "module": f"model.layers.{i}.mlp.down_proj",
                "expert": expert,
                "mixture": f"model.layers.{i}.mlp",
            }
            for i, expert in sorted(unseen)
        ],
        "candidates": list(candidates),
        "sets": list(sets),
        "super_experts": [],
        "baseline": {"perplexity": 16.754, "tokens": 1530, "windows": 6, "information": 3.0443}
        if verified
        else None,
        "null_distribution": {
            "draws": 3,
            "ratios": [1.00002, 0.99979, 1.000157],
            "kls": [1.5e-07, 1.5e-05, 2.5e-05],
            "ratio_max": 1.000157,
            "kl_max": 2.5e-05,
            "matched": 0.2246,
        }
        if verified
        else None,
        "consistency": {
            "samples": 4,
            "positions": positions,
            "tiers": {"100 %": (size + 3) // 4, ">= 50 %": size, ">= 20 %": size, "any": size},
            "settling": [
                {"samples": n, "all": size // n, "half": size, "fifth": size, "any": size}
                for n in (1, 2, 4)
            ],
        },
        "summary": summary,
    }


def found() -> dict:
    """One super weight, a critical pair, a mild pair and an inert weight."""
    candidates = [
        candidate(0, 2, 3968, 7003, "super weight", 41.5),
        candidate(1, 4, 2533, 7890, "part of a critical set", 1.31, set=0),
        candidate(2, 4, 2533, 10411, "part of a critical set", 1.27, set=0),
        candidate(3, 5, 1415, 901, "mild", 1.071, set=1),
        candidate(4, 5, 1415, 902, "mild", 1.062, set=1),
        candidate(5, 5, 77, 78, "inert", 1.0004, persistence=0.0),
    ]
    sets = [weight_set(0, [1, 2], "critical set", 187.25), weight_set(1, [3, 4], "mild", 1.92)]
    return report(candidates, sets, summary="1 super weight: layer 2 [3968, 7003]; and more.")


def none_found() -> dict:
    """No candidate at all."""
    return report(summary="None found: no output channel stands out by one weight.")


def mixture() -> dict:
    """A mixture of experts: one super expert, and experts that no token reached."""
    candidates = [
        candidate(0, 1, 12, 3456, "super weight", 9.75, expert=63),
        candidate(1, 3, 12, 3457, "inert", 1.001, expert=0),
    ]
    unseen = {(0, 5), (4, 0), (4, 1), (4, 2), (4, 63)}
    document = report(candidates, experts=64, unseen=unseen)
    document["super_experts"] = super_experts(candidates, [], document["layers"])
    return document


def large_mixture() -> dict:
    """128 experts in each of 94 layers, many of them unseen."""
    unseen = {(i, e) for i in range(94) for e in range(128) if (i * 31 + e * 17) % 23 == 0}
    unseen |= {(93, e) for e in range(0, 128, 2)}
    return report(layers=94, experts=128, unseen=unseen, summary="None found in what was read.")


def deep() -> dict:
    """80 layers, 24 candidates."""
    candidates = [
        candidate(i, 3 * i + 2, 8000 + i, 28000 + i, "inert", 1 + i / 1000) for i in range(24)
    ]
    return report(candidates, layers=80, shape=(16384, 32768))


def single_layer() -> dict:
    """The smallest model."""
    return report([candidate(0, 0, 1, 2, "super weight", 5.25)], layers=1)


def unverified() -> dict:
    """Candidates that were not measured."""
    candidates = [candidate(i, 2, 100 + i, 200 + i, "candidate", None) for i in range(3)]
    return report(candidates, verified=False, summary="3 candidates, not verified by measurement.")


def not_finite() -> dict:
    """Ratios that are infinite or NaN, and a weight whose dominance is infinite."""
    inf, nan = float("inf"), float("nan")
    broken = {"perplexity": nan, "ratio_low": nan, "ratio_high": nan, "kl": nan, "damage": nan}
    candidates = [
        candidate(0, 2, 10, 20, "super weight", inf, dominance=inf, prominence=inf),
        candidate(1, 3, 11, 21, "inert", nan, **broken),
        candidate(2, 4, 12, 22, "inert", 1.0, ratio_high=inf),
    ]
    return report(candidates, [weight_set(0, [0, 2], "critical set", inf)])


NASTY = [
    "<script>alert('x')</script>",
    "\x1b[31mred\x1b[0m\x00\x07",
    "\u202eesrever\ud800",
    "</code></table>" + "long" * 500,
    '[bold]$x^2$[/bold] & "quotes" {{ 7 * 6 }}',
]


def nasty() -> dict:
    """Token texts, a name, a module and a source that try to break out."""
    candidates = [
        candidate(i, 2, i, i, "inert", 1.0, text=text, module=text) for i, text in enumerate(NASTY)
    ]
    document = report(candidates, summary="[/red] <b>bold</b> \x1b[2J")
    document["model"].update(name=NASTY[0], fingerprint=NASTY[1])
    document["inputs"]["source"] = NASTY[4]
    for entry, text in zip(document["layers"], NASTY):
        entry["out_peak"]["text"] = text
    return document


ALL = {
    factory.__name__: factory
    for factory in (
        found,
        none_found,
        mixture,
        large_mixture,
        deep,
        single_layer,
        unverified,
        not_finite,
        nasty,
    )  # fmt: skip
}
