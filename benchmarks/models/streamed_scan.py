"""Cases of ``streamed_scan``: a scan from a file, layer by layer and in memory, not verified.

Both read the checkpoint in every call; the file is in the system's cache after the first.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import expected
from benchmarks.case import Case, Error, Provider
from benchmarks.models import smollm2
from swkernels.detect.loading import load_model, quiet
from swkernels.detect.scan import scan
from swkernels.detect.streamed import scan_stream

OP = "streamed_scan"
MEMORY = "load the model and scan in memory"
SAMPLES, LENGTH = 8, 512
_MEASURE = "entries of the report that differ from the scan in memory"
_SAME = ("layers", "candidates", "consistency")


def case(dtype: str, device: torch.device, folder: Path | None = None, *, length=LENGTH) -> Case:
    """The checkpoint in ``folder``; by default SmolLM2."""
    folder = folder or smollm2.prepare()
    settings = {"samples": SAMPLES, "length": length, "verify": False}
    place = {"device": device.type, "dtype": dtype}
    with quiet():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(0, config.vocab_size, (SAMPLES, length), generator=generator)}

    def streamed(inputs):
        return {"report": scan_stream(folder, inputs["ids"], **place, **settings).to_dict()}

    def in_memory(inputs):
        model, tokenizer, _ = load_model(folder, **place)
        report = scan(model, inputs["ids"], tokenizer=tokenizer, **settings)
        return {"report": report.to_dict()}

    def judge(inputs):
        expected_report = in_memory(inputs)["report"]

        def error(outputs):
            found = outputs["report"]
            wrong = sum(found[part] != expected_report[part] for part in _SAME)
            return Error(wrong, 0, _MEASURE)

        return error

    def providers():
        return [Provider("swkernels", "ours", streamed), Provider(MEMORY, "bare", in_memory)]

    tokens = SAMPLES * length
    shape = {"tokens": tokens, "columns": config.intermediate_size, "rows": config.hidden_size}
    mlp = expected.swiglu_mlp(tokens, config.hidden_size, config.intermediate_size, dtype)
    work = config.num_hidden_layers * mlp
    return Case(
        OP, ("SmolLM2-135M",), f"from its file, {SAMPLES} x {length}", shape, dtype, work, 8, make,
        judge, providers, seconds=100.0,
    )  # fmt: skip
