"""The step ``sanitize``: compute-sanitizer over a small case of each kernel."""

from __future__ import annotations

import re
import sys

from benchmarks.gpu.context import Context, Outcome, outcome_of
from benchmarks.gpu.jobs import Finished, run_all

# As in benchmarks.kernel_cases, which is not imported: it loads PyTorch.
KERNELS = (
    "triton-column_absmax",
    "triton-glu_absmax",
    "triton-linear_absmax-pointers",
    "triton-linear_absmax-descriptors",
    "triton-sampled_grad",
    "triton-sparse_linear",
    "triton-masked_grad",
    "triton-lora_linear-project",
    "triton-lora_linear-expand",
    "triton-lora_linear-reduce",
    "triton-topk_low_rank",
    "triton-block_quantize-fused",
    "triton-block_quantize-ranges",
    "triton-block_quantize-sums",
    "triton-block_quantize-encode",
    "triton-block_dequantize",
    "triton-quant_linear-vector",
    "triton-quant_linear-dot",
    "cuda-column_absmax",
    "cuda-topk_abs-count",
    "cuda-topk_abs-gather",
)
PLANTED = "planted-error"

TOOLS = ("memcheck", "racecheck")
_FOUND = 99  # the exit status that says that a tool reported something
_OPTIONS = (
    *("--error-exitcode", str(_FOUND)),
    *("--report-api-errors", "no"),  # PyTorch asks the driver for what may not be there
)
_WORKERS = 4
_SUMMARY = re.compile(r"SUMMARY: (.+)")
_CLEAN = re.compile(r"0 (errors|hazards)")


def sanitize(context: Context, seconds: float) -> Outcome:
    """Watch each kernel with each tool. A planted error shows that memcheck sees one here."""
    command = ["-m", "benchmarks.kernel_cases"]
    if context.dry:
        (finished,) = run_all([context.job("sanitize", command)], seconds)
        parts = dict(_line(line) for line in finished.text.splitlines() if _is_outcome(line))
        outcome = outcome_of(finished, "without compute-sanitizer: results only")
        return Outcome(outcome.status, outcome.note, parts)
    sanitizer = context.tool("compute-sanitizer")
    if sanitizer is None:
        return Outcome("skipped", "no compute-sanitizer is installed (it comes with CUDA)")
    # PyTorch's allocator would serve tensors from one large block, and an access past the end of
    # a tensor would still be inside the block.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pairs = [("memcheck", PLANTED), *((tool, kernel) for kernel in KERNELS for tool in TOOLS)]
    jobs = [
        context.job(
            f"sanitize-{tool}-{kernel}",
            [
                *(sanitizer, "--tool", tool, *_OPTIONS, "--kernel-name", f"kns={watched(kernel)}"),
                *(sys.executable, *command, "--kernel", kernel),
            ],
            environment=variables,
        )
        for tool, kernel in pairs
    ]
    ended = run_all(jobs, seconds, workers=_WORKERS)
    parts = {}
    for (tool, kernel), finished in zip(pairs, ended):
        verdict = control(finished) if kernel == PLANTED else verdict_of(finished)
        parts[f"{tool} {kernel}"] = verdict
    bad = [name for name, verdict in parts.items() if verdict.startswith("failed")]
    late = [name for name, verdict in parts.items() if verdict.startswith("timed out")]
    if bad:
        return Outcome("failed", ", ".join(bad), parts)
    if late:
        return Outcome("timed out", ", ".join(late), parts)
    return Outcome("ok", f"{len(parts)} runs", parts)


def watched(kernel: str) -> str:
    """The device function that is watched; PyTorch's own are not our concern, and take long."""
    _, op, *variant = kernel.split("-")
    shared = {
        "lora_linear": "lora", "block_quantize": "block", "quant_linear": op, "topk_abs": op,
    }  # fmt: skip
    return f"{f'{shared[op]}_{variant[0]}' if op in shared else op}_kernel"


def verdict_of(finished: Finished) -> str:
    """How a kernel did under a tool. Silence of a tool that did not run is no proof."""
    if finished.code is None:
        return "timed out"
    said, summary = _said(finished), _SUMMARY.search(finished.text)
    if said.startswith("skipped"):
        return said
    if summary and not _CLEAN.match(summary[1]):
        return f"failed: {summary[1]}"
    if said != "ok" or finished.code:
        return f"failed: {said or finished.last_line}"
    return f"ok: {summary[1]}" if summary else "failed: the tool wrote no summary"


def control(finished: Finished) -> str:
    """Whether the tool saw the planted error."""
    summary = _SUMMARY.search(finished.text)
    if finished.code is None:
        return "timed out"
    if summary and not _CLEAN.match(summary[1]):
        return "ok: the planted error was seen"
    return f"failed: the planted error was not seen ({finished.last_line})"


def _said(finished: Finished) -> str:
    """What the kernel's own program said, among the lines of the tool; empty if nothing."""
    lines = [line for line in finished.text.splitlines() if _is_outcome(line)]
    return _line(lines[-1])[1] if lines else ""


def _is_outcome(line: str) -> bool:
    return line.split(" ")[0] in ("ok", "wrong", "failed", "skipped")


def _line(line: str) -> tuple[str, str]:
    """Kernel and outcome from a line of benchmarks.kernel_cases."""
    word, _, rest = line.partition(" ")
    kernel, _, reason = rest.partition(": ")
    return kernel, f"{word}: {reason}" if reason else word
