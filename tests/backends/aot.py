"""Triton's kernels compiled ahead of time, without a GPU, and what their binaries say.

`builds_of` turns tuning files into builds, `compile_all` compiles them in processes of their own:
TRITON_INTERPRET (which the test suite sets) makes every jit function an interpreted one at import.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from swkernels.backends.plan import Code

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# What a tuning file's "device" contains, and the architecture that its records are for.
DEVICES = {
    "A100": "sm_80",
    "A800": "sm_80",
    "H100": "sm_90",
    "H200": "sm_90",
    "H800": "sm_90",
    "H20": "sm_90",
    "GH200": "sm_90",
    "B200": "sm_100",
    "MI300": "gfx942",
    "MI325": "gfx942",
}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
FLOATS = ("float32", "bfloat16", "float16")
# The types of each operation's records; "tfloat32" is float32 multiplied as TF32.
DTYPES = {
    "column_absmax": FLOATS,
    "glu_absmax": FLOATS,
    "linear_absmax": (*FLOATS, "tfloat32"),
    "sampled_grad": FLOATS,
    "sparse_linear": FLOATS,
    "masked_grad": FLOATS,
    "lora_linear": FLOATS,
    "topk_low_rank": FLOATS,
    "block_quantize": ("float32", "bfloat16"),
    "block_dequantize": ("float32", "bfloat16"),
    "quant_linear": ("float32", "bfloat16"),
}
# Operations of several kernels: how the one of a variant is called.
KERNELS = {
    "lora_linear": "lora_{}_kernel",
    "block_quantize": "block_{}_kernel",
    "quant_linear": "quant_linear_{}_kernel",
}
PACKED = ("block_quantize", "block_dequantize", "quant_linear")
LIBRARY = ("two_pass", "dequantize")  # variants that are a library's kernel
NO_OPTIONS = ("waves", "tokens", "beyond")  # of a configuration, and no part of the binary
TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tfloat32": "fp32"}


@dataclass(frozen=True)
class Build:
    """One binary: a kernel in one configuration, for one architecture.

    `mode` holds what else makes a binary: the activation, "index" with a token index, "ones" with
    all sizes and strides 1, which the launcher turns into constants, "odd" with sizes and strides
    that 16 does not divide; for packed matrices, which are symmetric int4 in blocks of 64 with
    outliers otherwise, "nf4", "zero points" and "4 tokens".
    """

    architecture: str
    op: str
    dtype: str
    variant: str
    mode: tuple[str, ...]
    config: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """The name that stands in the budgets."""
        config = ",".join(f"{name}={value}" for name, value in self.config)
        parts = (self.architecture, self.op, self.dtype, self.variant, *self.mode, config)
        return "/".join(parts)


@dataclass(frozen=True)
class Facts:
    """What a binary needs and does. Registers are per thread, `stack` (bytes per thread) and
    `shared` (bytes per program); `spills` counts accesses to local memory; `tensor_memory` is in
    columns. Where it does not compile, `error` says why and the rest is empty."""

    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def count(self, pattern: str) -> int:
        """Instructions whose name begins with a match of the regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def builds_of(files: Iterable[Path]) -> list[Build]:
    """Every build that the tuning files name, each once, in their order.

    Raises:
        ValueError: a record is for a device, an architecture or an operation unknown here.
    """
    return list(dict.fromkeys(build for path in files for build in _builds_of(path)))


def _builds_of(path: Path) -> Iterator[Build]:
    content = json.loads(path.read_text(encoding="utf-8"))
    device = content.get("device")
    if device == "cpu":
        return  # choices of the C++ kernels
    candidates = ARCHITECTURES if device is None else [_architecture(device, path)]
    for record in content["records"]:
        patterns = record.get("architectures") or ["*"]
        if record["variant"] in LIBRARY or patterns == ["interpreter"]:
            continue  # no binary of ours
        if record["op"] not in DTYPES:
            raise ValueError(
                f"{path}: {record['op']!r} is unknown: add it to tests/backends/aot.py"
            )
        chosen = [name for name in candidates if any(fnmatchcase(name, p) for p in patterns)]
        if not chosen:
            raise ValueError(
                f"{path}: a record for {', '.join(patterns)} is for none of "
                f"{', '.join(candidates)}: add the architecture to tests/backends/aot.py"
            )
        config = record["config"].items()
        config = tuple(sorted((k, v) for k, v in config if k not in NO_OPTIONS))
        for architecture in chosen:
            for dtype in record.get("dtypes") or DTYPES[record["op"]]:
                kernel = (architecture, record["op"], dtype, record["variant"])
                for mode in _modes(*kernel, shipped_for_all=device is None):
                    yield Build(*kernel, mode, config)


def _architecture(device: str, path: Path) -> str:
    for name, architecture in DEVICES.items():
        if re.search(rf"{name}(?!\d)", device):
            return architecture
    raise ValueError(f"{path}: {device!r} is unknown: add it to DEVICES in tests/backends/aot.py")


def _modes(architecture, op, dtype, variant, *, shipped_for_all) -> Iterator[tuple[str, ...]]:
    activations = ACTIVATIONS if op == "glu_absmax" else ()
    yield from [(name,) for name in activations] or [()]
    if op == "lora_linear":
        yield ("mask and dropout",)
    if op in PACKED and dtype == "bfloat16" and architecture in ("sm_90", "gfx942"):
        if variant not in ("ranges", "sums"):
            yield from (("nf4",), ("zero points",))
        if variant == "vector":
            yield ("4 tokens",)
    if dtype == "bfloat16" and op.endswith("absmax"):
        yield (*activations[:1], "index")
        if shipped_for_all and architecture == "sm_90" and variant != "descriptors":
            yield (*activations[:1], "ones")
        if (op, variant) == ("linear_absmax", "pointers"):
            yield ("odd",)


def compile_all(builds: Iterable[Build]) -> dict[Build, Facts]:
    """The facts of every build, compiled in as many processes as there are cores."""
    builds = list(dict.fromkeys(builds))
    with ProcessPoolExecutor(
        max_workers=os.cpu_count(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_compile_instead_of_interpreting,
    ) as pool:
        return dict(zip(builds, pool.map(facts, builds)))


def _compile_instead_of_interpreting() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def facts(build: Build) -> Facts:
    """Compile one build and read its binary; for a process without TRITON_INTERPRET."""
    try:
        compiled = _compile(build)
    except Exception as error:  # whatever Triton, LLVM or ptxas raise
        return Facts(error=f"{type(error).__name__}: {str(error).strip()[:500]}")
    return (_amd_facts if build.architecture.startswith("gfx") else _nvidia_facts)(compiled)


def _compile(build: Build):
    """Compile as the launcher would for aligned tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    module = importlib.import_module(f"swkernels.backends.triton.{build.op}")
    pattern = KERNELS.get(build.op, f"{build.op}_kernel")
    kernel = getattr(module, pattern.format(build.variant))
    if build.architecture.startswith("gfx"):
        target = GPUTarget("hip", build.architecture, 64)
    else:
        target = GPUTarget("cuda", int(build.architecture.removeprefix("sm_")), 32)
    constants, options = _split(build)
    unknown = options.keys() - make_backend(target).parse_options({}).__dict__.keys()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no option of Triton for this target")
    if "ones" in build.mode:
        constants |= {name: 1 for name in kernel.arg_names if name in "CDH" or "stride" in name}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else _argument_type(name, build, constants)
        for name in kernel.arg_names
    }
    odd = "odd" in build.mode
    free = (
        "T",
        "R",
        "k",
        "tiles",
        "token_offset",
        "threshold",
        "first",
        "last",
        "capacity",
        "share",
    )  # sizes that the launcher does not specialise on
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in free
        and (signature[name].startswith("*") or (signature[name] == "i32" and not odd))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=options)


def _split(build: Build) -> tuple[dict, dict]:
    """The kernel's constants, and the compiler's options."""
    config = dict(build.config)
    constants = {name: value for name, value in config.items() if name.isupper()}
    options = {name: value for name, value in config.items() if name not in constants}
    constants |= dict.fromkeys(("stride_c", "stride_gc", "stride_uc", "stride_xh", "stride_wh"), 1)
    constants["ACTIVATION"] = build.mode[0] if build.op == "glu_absmax" else None
    constants["PRECISION"] = "tf32" if build.dtype == "tfloat32" else "ieee"
    constants["DESCRIPTORS"] = build.variant == "descriptors"
    constants |= {"RANK": 16, "ADD": True}
    constants |= {name: bool(build.mode) for name in ("MASKED", "DROPPED")}
    if "index" not in build.mode:
        constants["token_index"] = None
    if build.op in PACKED:
        constants |= _packed(build, config)
        if build.op != "quant_linear":
            options["enable_fp_fusion"] = False
    return constants, options


def _packed(build: Build, config: dict) -> dict:
    """What the kernels on packed matrices are compiled for."""
    code = Code("nf4") if "nf4" in build.mode else Code("int4", "zero points" not in build.mode)
    block = 64
    if config.get("BLOCK", 0) > 2048:  # one block fills a program
        block = config["BLOCK"]
    constants = {"BITS": code.bits, "STEPS": code.steps, "ZERO": code.zero, "ORDER": 0}
    constants |= {"TABLE": code.table is not None, "LISTED": True, "COLUMNS": False, "RUN": 0}
    constants |= {"WIDTH": block, "BLOCKS": config.get("BLOCK", 0) // block, "GROUP": 64, "PER": 8}
    constants |= {"TILES": build.op == "quant_linear", "LEAST": 2.0**-20, "SIGNED": False}
    constants["BLOCK_T"] = config.get("BLOCK_T", 4 if "4 tokens" in build.mode else 1)
    if code.symmetric:
        constants["zero_points"] = None
    return constants


def _argument_type(name: str, build: Build, constants: dict) -> str:
    matrices = {"x": ("T", "H"), "weight": ("D", "H"), "y": ("T", "D")}
    short = TRITON_TYPES[build.dtype]
    if name in ("keys", "in_keys", "out_keys", "token_index", "places", "seed"):
        return "*i64"
    if name in matrices and constants.get("DESCRIPTORS"):
        block = ",".join(str(constants[f"BLOCK_{side}"]) for side in matrices[name])
        return f"tensordesc<{short}[{block}]>"
    if name in ("words", "zero_points", "exponents", "codes"):
        return "*u8" if name == "codes" else "*i32"
    if name in ("scales", "table", "middles", "low", "high"):
        return "*fp32"
    if build.op in PACKED and name in ("positions", "values", "sums"):
        return {"positions": "*i32", "values": f"*{short}", "sums": "*i64"}[name]
    if name in ("bias", "gate", "up", "h", "dy", "grad", "S", "w", "out", *matrices):
        return f"*{short}"
    if name in ("A", "B"):  # topk_low_rank: factors in the dtype of the record
        return f"*{short}"
    if name in ("rows", "cols", "row_starts", "counter"):
        return "*i32"
    if name in ("values", "partial", "P", "channel_scale", "bound"):
        return "*fp32"
    if name == "threshold":
        return "i64"  # above 2^31 for a dropout of a half and more
    return "fp32" if name == "scale" else "i32"


def _amd_facts(compiled) -> Facts:
    assembly = compiled.asm["amdgcn"]

    def entry(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return Facts(
        registers=entry("vgpr_count"),  # on gfx942 the accumulation registers are among them
        spills=entry("vgpr_spill_count") + entry("sgpr_spill_count"),
        stack=entry("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        instructions=dict(Counter(re.findall(r"^\t([a-z]\w+)", assembly, re.M))),
    )


def _nvidia_facts(compiled) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        [found] = disassemble(cubin, cuobjdump()).values()
    # Shared memory is asked for at the launch, so the binary does not know it.
    memory = {"shared": compiled.metadata.shared, "tensor_memory": compiled.metadata.tmem_size}
    return Facts(**{**found.__dict__, **memory})


def cuobjdump() -> str | None:
    """The disassembler that Triton's package carries, else the one on PATH."""
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.exists():
            return str(carried)
    return shutil.which("cuobjdump")


def disassemble(cubin: Path, tool: str) -> dict[str, Facts]:
    """What `tool` (cuobjdump) says of each kernel, by its name in the binary."""

    def parts(option, heading):  # each kernel's lines, by its name
        command = [tool, option, str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        pieces = re.split(heading, text, flags=re.M)[1:]
        return dict(zip(pieces[::2], pieces[1::2]))

    usage = parts("--dump-resource-usage", r"^ Function (\S+):$")
    sass = parts("-sass", r"^\s+Function : (\S+)$")
    return {name: _read(usage[name], sass[name]) for name in sass}


def _read(usage: str, sass: str) -> Facts:
    def entry(name):
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))

    instructions = Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*)", sass, re.M)
    )
    local = sum(n for name, n in instructions.items() if re.match("LDL|STL", name))
    stack = entry("STACK") + entry("LOCAL")
    return Facts(entry("REG"), local, stack, entry("SHARED"), 0, dict(instructions))
