"""The Triton kernels compiled ahead of time, without a GPU, in the configurations that ship.

Run as a script, this file compiles everything and prints one JSON line per build; the tests run
it once in a process of its own, because TRITON_INTERPRET (which the test suite sets) turns every
jit function into an interpreted one at import.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_DESCRIPTORS = ("sm_90", "sm_100")
KIB = 1024
# Shared memory that one program may use, from the vendors' tuning guides.
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
BUDGETS = Path(__file__).with_name("test_triton_registers.json")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tfloat32": "fp32"}

# (operation, dtype, variant or activation, mode): with a token index, or with all sizes and
# strides 1, which the launcher turns into constants.
CASES = [
    ("column_absmax", "bfloat16", "rows", ""),
    ("column_absmax", "bfloat16", "rows", "index"),
    ("column_absmax", "bfloat16", "rows", "ones"),
    ("column_absmax", "float16", "rows", ""),
    ("column_absmax", "float32", "rows", ""),
    ("glu_absmax", "bfloat16", "silu", ""),
    ("glu_absmax", "bfloat16", "relu", "index"),
    ("glu_absmax", "bfloat16", "silu", "ones"),
    ("glu_absmax", "float16", "gelu", ""),
    ("glu_absmax", "float32", "gelu_tanh", ""),
    ("linear_absmax", "bfloat16", "pointers", "ones"),
    ("linear_absmax", "float32", "pointers", ""),
]
for variant in ("pointers", "descriptors"):
    CASES += [
        ("linear_absmax", "bfloat16", variant, ""),
        ("linear_absmax", "bfloat16", variant, "index"),
        ("linear_absmax", "float16", variant, ""),
        ("linear_absmax", "tfloat32", variant, ""),
    ]
BUILDS = {
    "-".join(part for part in (architecture, *case) if part): (architecture, *case)
    for architecture in ARCHITECTURES
    for case in CASES
    if (case[2] != "descriptors" or architecture in WITH_DESCRIPTORS)
    and (case[3] != "ones" or architecture == "sm_90")
}


def main() -> None:
    """Compile every build and print its facts; arguments are the names of those to compile."""
    for name, build in BUILDS.items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            print(json.dumps({"name": name, **facts(*build)}), flush=True)


def facts(architecture, op, dtype, variant, mode) -> dict:
    from swkernels import tuning

    chosen = tuning.lookup(
        op,
        "any",
        4096,
        4096,
        4096,
        dtype,
        architecture=architecture,
        variant=variant if op == "linear_absmax" else None,
    )
    options = dict(chosen.config)
    options.pop("waves", None)
    compiled = compile_kernel(architecture, op, dtype, variant, mode, options)
    if architecture.startswith("gfx"):
        return amd_facts(compiled)
    return nvidia_facts(compiled)


def compile_kernel(architecture, op, dtype, variant, mode, options):
    """Compile `op` as the launcher would for aligned tensors whose sizes divide by 16."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"swkernels.backends.triton.{op}")
    kernel = getattr(module, f"{op}_kernel")
    vendor, number = re.fullmatch(r"(sm_|gfx)(\d+)", architecture).groups()
    target = (
        GPUTarget("cuda", int(number), 32) if vendor == "sm_" else GPUTarget("hip", "gfx942", 64)
    )
    short, precision = SHORT[dtype], "tf32" if dtype == "tfloat32" else "ieee"
    constants = {name: 1 for name in ("stride_c", "stride_gc", "stride_uc", "stride_xh")}
    constants |= {"stride_wh": 1, "ACTIVATION": variant, "PRECISION": precision}
    constants |= {"DESCRIPTORS": variant == "descriptors", "token_index": None}
    if mode == "ones":
        constants |= {name: 1 for name in kernel.arg_names if name in "CDH" or "stride" in name}
    constants |= {name: options.pop(name) for name in list(options) if name.isupper()}
    matrices = {"x": ("T", "H"), "weight": ("D", "H"), "y": ("T", "D")}

    def argument_type(name):
        if name in ("keys", "in_keys", "out_keys", "token_index"):
            return "*i64"
        if name in ("bias", "gate", "up", "h"):
            return f"*{short}"
        if name in matrices:
            if variant != "descriptors":
                return f"*{short}"
            block = ",".join(str(constants[f"BLOCK_{side}"]) for side in matrices[name])
            return f"tensordesc<{short}[{block}]>"
        return "i32"

    if mode == "index":
        del constants["token_index"]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else argument_type(name) for name in kernel.arg_names
    }
    free = ("T", "tiles", "token_offset", "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in free and name not in constants and "desc" not in signature[name]
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=target, options=options
    )


def amd_facts(compiled) -> dict:
    assembly = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "stack": field("private_segment_fixed_size"),
        "shared": compiled.metadata.shared,
        "instructions": dict(Counter(re.findall(r"^\t([a-z]\w+)", assembly, re.M))),
    }


def nvidia_facts(compiled) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def dump(option):
            command = [str(tool), option, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    instructions = Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*)", sass, re.M)
    )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL"))),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "instructions": dict(instructions),
    }


@pytest.fixture(scope="module")
def builds() -> dict:
    import swkernels

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(swkernels.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}


def count(build: dict, *beginnings: str) -> int:
    return sum(n for name, n in build["instructions"].items() if name.startswith(beginnings))


@pytest.mark.parametrize("name", BUILDS)
def test_no_spills_and_shared_memory_within_the_limit(builds, name):
    build = builds[name]
    assert build["spills"] == 0
    assert build["stack"] == 0
    assert build["shared"] <= SHARED_LIMIT[name.split("-")[0]]


@pytest.mark.parametrize("name", BUILDS)
def test_registers_within_budget(builds, name):
    assert builds[name]["registers"] <= json.loads(BUDGETS.read_text())[name]


def test_budgets_name_every_build():
    assert set(json.loads(BUDGETS.read_text())) == set(BUILDS)


@pytest.mark.parametrize("name", BUILDS)
def test_peaks_merge_with_64_bit_atomics(builds, name):
    """One instruction per merge, never a compare-and-swap loop."""
    build = builds[name]
    merges = count(build, "global_atomic_smax_x2")
    merges += sum(n for op, n in build["instructions"].items() if "MAX.S64" in op)
    assert merges > 0
    assert not any("CAS" in op or "cmpswap" in op for op in build["instructions"])


@pytest.mark.parametrize("name", [name for name in BUILDS if "linear_absmax" in name])
def test_gemm_runs_on_the_matrix_units(builds, name):
    architecture, _, dtype, variant = name.split("-")[:4]
    instruction = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    if dtype == "float32" and architecture != "gfx942":
        assert count(builds[name], "FFMA") > 0
    else:
        assert count(builds[name], instruction[architecture]) > 0
    through_descriptors = variant == "descriptors"
    assert (count(builds[name], "UTMALDG") > 0) == through_descriptors
    assert (count(builds[name], "UTMASTG") > 0) == through_descriptors


@pytest.mark.parametrize(
    "name", [n for n in BUILDS if "linear" not in n and "gfx" not in n and "ones" not in n]
)
def test_passes_read_16_bytes_per_thread(builds, name):
    narrow = ("LDG.E.U16", "LDG.E.U8", "LDG.E.S")
    assert count(builds[name], "LDG.E.128") > 0
    assert count(builds[name], *narrow) == 0


if __name__ == "__main__":
    main()
