"""What ``swkernels quantize`` and ``swkernels eval`` share: files, documents, tables."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

from swkernels.detect.report import versions

REPORT = "quantize_report.json"
SCHEMA = "swkernels.eval/1"
MODEL, QUANTIZED, ORIGINAL, PLAIN = "model", "quantized", "original", "round to nearest"


def render_report(report, source: dict) -> str:
    """The document of a ``QuantReport`` and what it was made of, without a time or a date."""
    document = report.to_dict() | {"source": source, "versions": versions("torch", "transformers")}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def source_of_model(model: str, fingerprint: str | None, dtype, super_weights: Path | None) -> dict:
    """What ``eval`` finds the original by, and what was said to be kept."""
    path = Path(model).expanduser()
    return {
        "model": str(path.resolve()) if path.exists() else model,
        "fingerprint": fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "super_weights": None if super_weights is None else str(super_weights.resolve()),
    }


def read_source(model: str) -> dict | None:
    """What the report beside a model says that it was made of; None where there is no report.

    Raises:
        InvalidInput: the report is damaged.
    """
    from swkernels.errors import InvalidInput
    from swkernels.train.files import read_json

    path = Path(model).expanduser() / REPORT
    if not path.is_file():
        return None
    document = read_json(path)
    source = document.get("source") if isinstance(document, dict) else None
    if not isinstance(source, dict) or not isinstance(source.get("model"), str):
        raise InvalidInput(f"{path} does not say what was quantized: give --against or --alone")
    return source


def original_of(source: dict | None) -> str | None:
    """The model that a checkpoint was made of, or None where it is not there any more.

    Raises:
        InvalidInput: another model is in its place now.
    """
    from swkernels.detect import loading
    from swkernels.errors import InvalidInput

    if source is None:
        return None
    path = Path(source["model"])
    if not path.exists():
        return None if path.is_absolute() else source["model"]
    if source.get("fingerprint") not in (None, loading.fingerprint(path)):
        raise InvalidInput(
            f"{path} is not the model any more that was quantized: give --against or --alone"
        )
    return str(path)


def config_of(model):
    """The QuantConfig of a loaded model; None where it is not quantized by swkernels."""
    from swkernels.quant.checkpoint import METHOD
    from swkernels.quant.config import QuantConfig

    described = getattr(model.config, "quantization_config", None)
    data = described if isinstance(described, dict | None) else described.to_dict()
    if data is None or data["quant_method"] != METHOD:
        return None
    return QuantConfig.from_dict({field.name: data[field.name] for field in fields(QuantConfig)})


def plain(config):
    """The same settings by round to nearest alone: no clip, and nothing kept."""
    return replace(config, clip=None, largest=0)


def comparison(
    model: str, original: str | None, config, text: str, tokens: int, results: list[tuple]
) -> dict:
    """The document of ``eval``.

    Args:
        config: a QuantConfig; None for a model that is not quantized.
        text: what it is.
        results: (which, perplexity, bytes of parameters and buffers) of each model; where the
            original is among them, all are divided by it.
    """
    base = {which: found for which, found, _ in results}.get(ORIGINAL)
    measured = []
    for which, found, size in results:
        ratio, error = (None, None) if base is None else found.ratio(base)
        entry = {"which": which, "bytes": size, "ratio": ratio, "ratio_error": error}
        measured.append(entry | found.to_dict())
    return {
        "schema": SCHEMA,
        "model": model,
        "original": original,
        "config": None if config is None else config.to_dict(),
        "text": text,
        "tokens": tokens,
        "results": measured,
        "versions": versions("torch", "transformers"),
    }


def show_comparison(document: dict, console, built_in_text: bool, written: list[Path]) -> None:
    """Print the table of ``eval``, what was measured, and the paths."""
    from rich.table import Table

    compared = document["results"][0]["ratio"] is not None
    table = Table("", box=None, pad_edge=False)
    for title in ["perplexity", *["x original"] * compared, "size"]:
        table.add_column(title, justify="right")
    for entry in document["results"]:
        ratio = [_with_error(entry["ratio"], entry["ratio_error"])] if compared else []
        value = _with_error(entry["perplexity"], entry["error"])
        table.add_row(entry["which"], value, *ratio, f"{entry['bytes'] / 1e6:,.1f} MB")
    console.print(table)
    first = document["results"][0]
    lines = [
        f"{sum(first['tokens'])} predicted tokens of {document['text']}, in "
        f"{len(first['tokens'])} windows of {first['window']}"
    ]
    if document["config"] is not None and document["original"] is None:
        lines.append("alone: the original is not known or not there; --against names it")
    if built_in_text:
        lines.append(
            "The built-in text under-reports damage: for figures that others can compare, give "
            "--text wiki.test.raw"
        )
    for line in [*lines, *map(str, written)]:
        console.print(line, soft_wrap=True, markup=False)


def show_report(report, console) -> None:
    """Print the report with the layers of one kind, which differ in numbers only, in one row."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("layers", overflow="fold")
    for title in ("matrices", "bits", "error", "worst (in)", "kept", "bytes"):
        table.add_column(title, justify="right")
    kinds: dict[str, list] = {}
    for layer in report.layers:
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer.name), []).append(layer)
    for kind, layers in kinds.items():
        sizes = [math.prod(layer.shape) for layer in layers]
        error = sum(layer.error * size for layer, size in zip(layers, sizes)) / sum(sizes)
        worst = max(layers, key=lambda layer: layer.error)
        kept = sum(len(layer.super_weights) + layer.largest for layer in layers)
        before = sum(layer.bytes_before for layer in layers)
        after = sum(layer.bytes_after for layer in layers)
        table.add_row(
            kind, str(len(layers)), str(worst.bits), f"{error:.2%}",
            f"{worst.error:.2%} ({_numbers(worst)})", str(kept), f"{after / before:.1%}",
        )  # fmt: skip
    console.print(table)
    for layer in report.layers:
        for row, column, value in layer.super_weights:
            expert = "" if layer.expert is None else f", expert {layer.expert}"
            console.print(f"kept: {layer.name}{expert} [{row}, {column}] = {value:.6g}")
    console.print(str(report), soft_wrap=True, markup=False)


def _numbers(layer) -> str:
    """Where a layer is, without what its row says already."""
    found = re.findall(r"\.(\d+)(?=\.|$)", layer.name)
    return ".".join([*found, *([] if layer.expert is None else [str(layer.expert)])]) or "-"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g}" if error is None else f"{value:.5g} ± {error:.2g}"
