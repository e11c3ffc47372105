"""What the records are held against, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.book import OURS, Book, Entry


@dataclass(frozen=True)
class Target:
    """A bar: ``measure`` gives the value of an entry, at most or at least ``bar``.

    Attributes:
        work: what is measured, for the table.
        machine: a part of the machine's name, or "cpu".
        op, wanted: which entries.
    """

    work: str
    machine: str
    op: str
    wanted: dict
    measure: Callable[[Entry], float | None]
    bar: float
    at_least: bool = False

    def found(self, book: Book) -> list[tuple[str, float]]:
        """Machine and value of every record there is."""
        values = []
        for machine in book.machines:
            for entry in book.find(machine, self.op, **self.wanted):
                here = entry.header["device"]
                if self.machine not in (here["type"],) and self.machine not in here["name"]:
                    continue
                value = self.measure(entry)
                if value is not None:
                    values.append((machine, value))
        return values

    def met(self, value: float) -> bool:
        return value >= self.bar if self.at_least else value <= self.bar


def over_bare(entry: Entry) -> float | None:
    return entry.over_bare()


def best_over_bare(entry: Entry) -> float | None:
    """The fastest of our variants over the bare operation."""
    values = [entry.over_bare(r["provider"]) for r in entry.timed("ours")]
    return min((value for value in values if value is not None), default=None)


def of_copy(entry: Entry) -> float | None:
    """Share of the copy bandwidth of the same run."""
    ours = entry.of(OURS)
    if ours is None:
        return None
    return ours["bytes"] / ours["median"] / entry.header["ceilings"]["copy"]


def of_read(entry: Entry) -> float | None:
    """Time of reading the input once over ours, interleaved: a shared machine drifts."""
    ours, read = entry.of(OURS), entry.of("read")
    return read["median"] / ours["median"] if ours and read else None


def over_full_forward(entry: Entry) -> float | None:
    """The tracked base model over the plain forward with its head."""
    ours, full = entry.of(OURS), entry.of("base model and head")
    return ours["median"] / full["median"] if ours and full else None


def times_faster(*providers: str) -> Callable[[Entry], float | None]:
    """How many times faster we are than the fastest of these providers that was timed."""

    def measure(entry: Entry) -> float | None:
        ours = entry.of(OURS)
        others = [found["median"] for name in providers if (found := entry.of(name))]
        return min(others) / ours["median"] if ours and others else None

    return measure


def added_over(peer: str, variant: str = OURS) -> Callable[[Entry], float | None]:
    """What our LoRA adds to the bare work over what a peer's adds."""

    def measure(entry: Entry) -> float | None:
        ours, bare, other = entry.of(variant), entry.of("frozen base"), entry.of(peer)
        if not (ours and bare and other) or other["median"] <= bare["median"]:
            return None
        return (ours["median"] - bare["median"]) / (other["median"] - bare["median"])

    return measure


def over_provider(name: str, variant: str = OURS) -> Callable[[Entry], float | None]:
    """One of our variants over another provider."""

    def measure(entry: Entry) -> float | None:
        ours, other = entry.of(variant), entry.of(name)
        return ours["median"] / other["median"] if ours and other else None

    return measure


def weights_over(name: str) -> Callable[[Entry], float | None]:
    """Bytes of our model's weights over those of another provider's."""

    def measure(entry: Entry) -> float | None:
        ours, other = entry.of(OURS), entry.of(name)
        return ours["weights"] / other["weights"] if ours and other else None

    return measure


def step_memory_over(name: str) -> Callable[[Entry], float | None]:
    """Memory of our training step over that of another provider's."""

    def measure(entry: Entry) -> float | None:
        found = [(entry.of(provider) or {}).get("step_memory") for provider in (OURS, name)]
        return None if None in found else found[0] / found[1]

    return measure


_ATTENTION = {"tokens": 1024, "columns": 2048}
_DENSE, _GATHERED = "dense gradient and gather", "gathered columns, multiplied and summed"
_MASKED = ("PEFT Super-Tuning", "PEFT SHiRA, r = 1")
_LAYER = {"dtype": "float32", "tokens": 1024, "rows": 2048, "columns": 8192}
_DOWN = {"Llama-3-8B": (4096, 14336), "Llama-3-70B": (8192, 28672)}
_PACKED = {"rows": 4096, "columns": 14336, "block": 64}
_PACKED_ON_GPU = {"8192 x 8192": (8192, 8192), "Llama-3-8B down_proj": (4096, 14336)}
_UNPACKED = "unpack, F.linear"
_BITSANDBYTES = "bitsandbytes matmul_4bit, nf4"

TARGETS = [
    *(
        Target(
            f"`linear_absmax` over `F.linear`, {model} down_proj, {tokens} tokens, bfloat16",
            "H100",
            "linear_absmax",
            {"dtype": "bfloat16", "tokens": tokens, "rows": rows, "columns": columns},
            over_bare,
            1.02,
        )
        for model, (rows, columns) in _DOWN.items()
        for tokens in (4096, 16384)
    ),
    Target(
        "tracked SwiGLU MLP over the plain eager MLP, Llama-3-8B, 4096 tokens, bfloat16",
        "H100",
        "tracked_mlp",
        {"dtype": "bfloat16", "tokens": 4096, "rows": 4096},
        best_over_bare,
        0.98,
    ),
    Target(
        "`column_absmax`, share of the copy bandwidth, 16384 x 14336 bfloat16",
        "H100",
        "column_absmax",
        {"dtype": "bfloat16", "tokens": 16384, "columns": 14336},
        of_copy,
        0.85,
        at_least=True,
    ),
    Target(
        "`column_absmax`, share of the read bandwidth, 8192 x 2048 float32",
        "cpu",
        "column_absmax",
        {"dtype": "float32", "tokens": 8192, "columns": 2048},
        of_read,
        0.60,
        at_least=True,
    ),
    *(
        Target(
            f"SmolLM2 base model, 8 x 512 tokens, tracked over plain, {dtype}",
            "cpu",
            "tracked_model",
            {"dtype": dtype},
            over_bare,
            1.02,
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Target(
            f"the same, tracked without the head over the plain full forward, {dtype}",
            "cpu",
            "tracked_model",
            {"dtype": dtype},
            over_full_forward,
            0.85,
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Target(
            f"`sampled_grad`, times faster than {what}, 2048 x 8192, 1024 tokens, k = {k}, float32",
            "cpu",
            "sampled_grad",
            _LAYER | {"k": k},
            times_faster(provider),
            bar,
            at_least=True,
        )
        for k, bars in {256: (60, 3), 4096: (1, 1), 36864: (1, 1)}.items()
        for (what, provider), bar in zip(
            {"the dense gradient": _DENSE, "gathered columns": _GATHERED}.items(), bars
        )
    ),
    Target(
        "a step of SmolLM2, k = 4096, over its forward and activation gradient, float32",
        "cpu",
        "sparse_training",
        {"dtype": "float32"},
        over_bare,
        1.05,
    ),
    Target(
        "the same step, times faster than the faster of PEFT's SHiRA and Super-Tuning, float32",
        "cpu",
        "sparse_training",
        {"dtype": "float32"},
        times_faster(*_MASKED),
        1.0,
        at_least=True,
    ),
    Target(
        "peak memory of a step with k = 4096 over LoRA's, beyond the loaded SmolLM2, float32",
        "cpu",
        "sparse_training",
        {"dtype": "float32"},
        step_memory_over("PEFT LoRA, r = 8"),
        1.0,
    ),
    *(
        Target(
            f"`swkernels eval`: perplexity of SmolLM2 over the bare batched forward, {dtype}",
            "cpu",
            "perplexity",
            {"dtype": dtype, "projection": "windows of 1024, 2 together"},
            over_bare,
            1.05,
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Target(
            f"scan of SmolLM2 layer by layer over loading it and scanning in memory, {dtype}",
            "cpu",
            "streamed_scan",
            {"dtype": dtype},
            over_bare,
            1.15,
        )
        for dtype in ("float32", "bfloat16")
    ),
    Target(
        "scan of SmolLM2 by two processes on two cores, times faster than one process on one core",
        "cpu",
        "shared_scan",
        {},
        times_faster("one process on one core"),
        1.6,
        at_least=True,
    ),
    *(
        Target(
            f"`guard verify` of 1 GiB, share of the speed of reading it, {projection}",
            "cpu",
            "guard_verify",
            {"projection": projection},
            of_read,
            0.80,
            at_least=True,
        )
        for projection in ("cached file", "cold file")
    ),
    Target(
        "an ablation of SmolLM2 with 4 conditions over 4 evaluations, float32",
        "cpu",
        "ablation",
        {"dtype": "float32"},
        over_bare,
        1.05,
    ),
    *(
        Target(
            "multiple choice by SmolLM2, times faster than each choice in full, questions as long "
            f"as {of}'s, float32",
            "cpu",
            "choices",
            {"dtype": "float32", "projection": f"128 items as {of}"},
            times_faster("each choice in full"),
            1.5,
            at_least=True,
        )
        for of in ("ARC-Easy", "Winogrande")
    ),
    *(
        Target(
            f"LoRA on OLMo-1B's q, k, v, o, 1024 tokens: time added{what}, over PEFT's, {dtype}",
            "cpu",
            "lora_linear",
            _ATTENTION | {"dtype": dtype},
            added_over("PEFT", variant),
            0.5,
        )
        for dtype in ("float32", "bfloat16")
        for what, variant in {
            "": OURS,
            " with rows and columns masked": "swkernels, rows and columns",
            " with positions masked": "swkernels, positions",
        }.items()
    ),
    Target(
        "`topk_low_rank`, times faster than materialising and topk, 128 modules of 4096 x 4096, "
        "r = 8, k = 1000, float32",
        "cpu",
        "topk_low_rank",
        {"dtype": "float32", "columns": 4096},
        times_faster("materialise, topk"),
        25,
        at_least=True,
    ),
    Target(
        "`topk_abs`, times faster than `abs().topk`, 4096 x 4096, k = 10000, float32",
        "cpu",
        "topk_abs",
        {"dtype": "float32", "rows": 4096, "columns": 4096},
        times_faster("abs().topk(k)"),
        50,
        at_least=True,
    ),
    Target(
        "`topk_abs` over Llama-3-8B's 32 down projections, k = 10000, bytes a second over those "
        "of a copy, bfloat16",
        "H100",
        "topk_abs",
        {"dtype": "bfloat16", "rows": 4096, "columns": 14336},
        of_copy,
        0.7,
        at_least=True,
    ),
    Target(
        "`topk_abs` of a whole SmolLM2 from its cached safetensors file, k = 10000, reading that "
        "file over this, float32",
        "cpu",
        "topk_abs",
        {"projection": "every tensor of its safetensors file", "dtype": "float32"},
        of_read,
        0.5,
        at_least=True,
    ),
    *(
        Target(
            f"LoRA on Llama-3-8B's q, k, v, o, {tokens} tokens, bfloat16: {what}",
            "H100",
            "lora_linear",
            {"dtype": "bfloat16", "tokens": tokens},
            measure,
            bar,
            at_least=bar > 1.1,
        )
        for tokens in (4096, 16384)
        for what, measure, bar in (
            ("times faster than PEFT", times_faster("PEFT"), 1.25),
            ("over addmm in one function", over_provider("addmm, one autograd function"), 1.0),
            ("masked over unmasked", over_provider(OURS, "swkernels, rows and columns"), 1.02),
        )
    ),
    Target(
        "`sampled_grad`, times faster than the dense gradient, Llama-3-8B down_proj, 8192 tokens, "
        "k = 4096, bfloat16",
        "H100",
        "sampled_grad",
        {"dtype": "bfloat16", "tokens": 8192, "rows": 4096, "columns": 14336, "k": 4096},
        times_faster(_DENSE),
        20,
        at_least=True,
    ),
    Target(
        "`block_quantize` to NF4, times faster than bitsandbytes, 4096 x 14336, block 64, float32",
        "cpu",
        "block_quantize",
        _PACKED | {"projection": "down_proj, nf4, blocks of 64", "dtype": "float32"},
        times_faster("bitsandbytes"),
        40,
        at_least=True,
    ),
    Target(
        "`block_quantize` to int4, reading the matrix over it, 4096 x 14336, block 64, float32",
        "cpu",
        "block_quantize",
        _PACKED | {"projection": "down_proj, int4, blocks of 64", "dtype": "float32"},
        of_read,
        0.5,
        at_least=True,
    ),
    Target(
        "`block_dequantize` of NF4, times faster than bitsandbytes, 4096 x 14336, block 64, "
        "float32",
        "cpu",
        "block_dequantize",
        _PACKED | {"projection": "down_proj, nf4, blocks of 64", "dtype": "float32"},
        times_faster("bitsandbytes"),
        5,
        at_least=True,
    ),
    *(
        Target(
            f"`quant_linear` int4, 4096 x 14336, block 64, 1 token, {dtype}: times faster than "
            f"{what}",
            "cpu",
            "quant_linear",
            _PACKED | {"tokens": 1, "dtype": dtype},
            times_faster(provider),
            bar,
            at_least=True,
        )
        for dtype, what, provider, bar in (
            ("float32", "`F.linear` in float32", "F.linear float32", 4),
            ("float32", "`F.linear` in bfloat16", "F.linear bfloat16", 2),
            ("bfloat16", "`F.linear` in bfloat16", "F.linear bfloat16", 2),
            ("float32", "bitsandbytes' `matmul_4bit`", _BITSANDBYTES, 15),
        )
    ),
    *(
        Target(
            f"`quant_linear` int4, 4096 x 14336, block 64, {tokens} tokens, bfloat16, over "
            "`F.linear` in bfloat16",
            "cpu",
            "quant_linear",
            _PACKED | {"tokens": tokens, "dtype": "bfloat16"},
            over_provider("F.linear bfloat16"),
            bar,
        )
        for tokens, bar in ((16, 1.0), (256, 1.25))
    ),
    Target(
        "SmolLM2 in int4, greedy generation, times faster than in bfloat16",
        "cpu",
        "quant_generation",
        {},
        times_faster("bfloat16 model"),
        1.5,
        at_least=True,
    ),
    Target(
        "the same model, bytes of its weights over those of the bfloat16 model",
        "cpu",
        "quant_generation",
        {},
        weights_over("bfloat16 model"),
        0.35,
    ),
    *(
        Target(
            f"`{op}`, int4, bytes a second over those of a copy, 8192 x 28672, bfloat16",
            "H100",
            op,
            {
                "projection": "down_proj, int4, blocks of 64",
                "rows": 8192,
                "columns": 28672,
                "dtype": "bfloat16",
            },
            of_copy,
            0.8,
            at_least=True,
        )
        for op in ("block_quantize", "block_dequantize")
    ),
    *(
        Target(
            f"`quant_linear` int4, {name}, block 64, {tokens} tokens, bfloat16: {what}",
            "H100",
            "quant_linear",
            {"tokens": tokens, "rows": rows, "columns": columns, "block": 64, "dtype": "bfloat16"},
            times_faster(*providers),
            bar,
            at_least=True,
        )
        for name, (rows, columns) in _PACKED_ON_GPU.items()
        for tokens in (1, 16, 4096)
        for what, providers, bar in (
            ("times faster than `F.linear`", ("F.linear bfloat16",), 1.8),
            ("times faster than unpacking and `F.linear`", (_UNPACKED,), 1.0),
            ("times faster than bitsandbytes and gemlite", (_BITSANDBYTES, "gemlite"), 1.0),
        )
        if tokens <= 16 or providers == (_UNPACKED,)
    ),
]
