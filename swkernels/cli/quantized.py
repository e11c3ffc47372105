"""What ``swkernels quantize`` and ``swkernels eval`` share: files, documents, tables."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

from swkernels.detect.report import versions

REPORT = "quantize_report.json"
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
    from swkernels.files import read_json

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
