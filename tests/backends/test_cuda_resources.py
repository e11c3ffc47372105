"""csrc/cuda compiled by nvcc for every GPU it is meant for, and what the binaries say.

python -m tests.backends.test_cuda_resources --write-budgets   # take those of now as budget
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from . import aot

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BUDGETS = Path(__file__).with_name("test_cuda_resources.json")
WRITE = "python -m tests.backends.test_cuda_resources --write-budgets"

# Names of instructions begin with a match of these.
GLOBAL_ATOMIC = r"(RED|ATOM)G?\."
# Exact, whatever the order.
INTEGER_64 = r"(RED|ATOM)G?\.E\.(MAX|MIN|ADD)\.[SU]?64\."
# RED returns nothing, so nobody waits for it.
MAX_64, MIN_64, ADD_64 = (rf"REDG?\.E\.{name}\.[SU]?64\." for name in ("MAX", "MIN", "ADD"))
FETCH_ADD_64 = r"ATOMG?\.E\.ADD\.64\."
LOAD_BYTES = {r"LDG\.E\S*\.128": 16, r"LDG\.E\S*\.64": 8, r"LDG\.E(\.(?![US](8|16))|$)": 4}
# By convention a kernel's first number among its template arguments: elements of one load.
VECTOR_KERNEL = r"<[^<>]*?\b(?![01]\b)\d+"

needs_tools = pytest.mark.skipif(
    not (shutil.which("nvcc") and aot.cuobjdump() and shutil.which("c++filt")),
    reason="nvcc, cuobjdump (also in Triton's package) or c++filt is not installed",
)


def output(*command: str | Path, **options) -> str:
    """What a command prints; it must succeed."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def release() -> str:
    return re.search(r"release (\d+\.\d+)", output("nvcc", "--version")).group(1)


def known() -> list[str]:
    """Those of our architectures that this nvcc can compile for."""
    listed = output("nvcc", "--list-gpu-code").split()
    return [architecture for architecture in ARCHITECTURES if architecture in listed]


def compile_source(source: Path, architectures, folder: Path) -> dict[str, aot.Facts]:
    """Facts of every kernel of a source, by "architecture/source/kernel". Warnings are errors."""
    targets = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in architectures]
    output(
        *("nvcc", "-std=c++17", "-O3", "-c", "--threads=2", "-Werror", "all-warnings"),
        *("-Xcompiler", "-Wall,-Wextra,-Werror", *targets, source, "-o", folder / "object.o"),
    )
    output(aot.cuobjdump(), "-xelf", "all", "object.o", cwd=folder)
    found = {}
    for cubin in folder.glob("*.cubin"):
        architecture = re.search(r"sm_\d+", cubin.name).group()
        kernels = aot.disassemble(cubin, aot.cuobjdump())
        names = output("c++filt", input="\n".join(kernels)).splitlines()
        for name, facts in zip(names, kernels.values(), strict=True):
            found[f"{architecture}/{source.stem}/{_short(name)}"] = facts
    return found


def _short(name: str) -> str:
    """ "void swk::(anonymous namespace)::f<swk::T, 1>(swk::P)" without what all have in common."""
    name = re.sub(r"\(anonymous namespace\)::|\bswk::", "", name)
    return re.fullmatch(r"(?:void )?(.*?)(?:\(.*\))?", name).group(1)


def load_bytes(facts: aot.Facts) -> int:
    """Bytes of a thread's widest load from global memory; 2 stands for any below 4."""
    return next((size for name, size in LOAD_BYTES.items() if facts.count(name)), 2)


def complaints(name: str, facts: aot.Facts) -> list[str]:
    """Why a kernel does not pass, whatever its budget; nothing if it does."""
    found = []
    if facts.spills or facts.stack:
        found.append(
            f"{facts.spills} accesses to local memory, {facts.stack} bytes of stack; allowed: 0"
        )
    others = facts.count(GLOBAL_ATOMIC) - facts.count(INTEGER_64)
    if others:
        found.append(f"{others} atomics that are no 64-bit integer maximum, minimum or sum")
    if re.search(VECTOR_KERNEL, name) and load_bytes(facts) < 16:
        found.append(f"its widest load has {load_bytes(facts)} bytes, expected 16")
    return found


def budget_of(facts: aot.Facts) -> dict[str, int]:
    registers = -(-facts.registers // 8) * 8  # they are given out by eights
    return {"registers": registers, "shared": facts.shared}


def about_budget(facts: aot.Facts, budget: dict[str, int] | None) -> list[str]:
    if budget is None:
        return [f"no budget: run `{WRITE}` and commit {BUDGETS.name}"]
    return [
        f"{getattr(facts, name)} {name}, the budget is {most}: mend the kernel, or run `{WRITE}` "
        "and say in the commit why more is right"
        for name, most in budget.items()
        if getattr(facts, name) > most
    ]


def read_budgets() -> dict:
    return json.loads(BUDGETS.read_text())


def compile_all() -> dict[str, aot.Facts]:
    found = {}
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            found |= compile_source(source, known(), Path(folder))
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, aot.Facts]:
    return compile_all()


@needs_tools
def test_every_source_has_its_kernels_for_every_architecture(kernels):
    for source in SOURCES:
        counts = [
            sum(name.startswith(f"{architecture}/{source.stem}/") for name in kernels)
            for architecture in known()
        ]
        assert min(counts) == max(counts) > 0
    # dtypes, vector or element loads, with token_index or without
    assert sum("/column_absmax/" in name for name in kernels) == 3 * 2 * 2 * len(known())
    # dtypes, counting and gathering
    assert sum("/topk_abs/" in name for name in kernels) == 5 * 2 * len(known())
    missing = sorted(set(ARCHITECTURES) - set(known()))
    if missing:
        pytest.skip(f"nvcc {release()} does not compile for {', '.join(missing)}")


@needs_tools
def test_machine_code(kernels):
    found = [f"{name}: {reason}" for name in kernels for reason in complaints(name, kernels[name])]
    assert not found, "\n".join(found)


@needs_tools
def test_wide_loads_and_atomics_are_where_they_should_be(kernels):
    for name, facts in kernels.items():
        atomics = facts.count(GLOBAL_ATOMIC)
        if "/column_absmax/" in name:
            assert facts.count(MAX_64) == atomics > 0, name
            assert (load_bytes(facts) == 16) == (", 1, " not in name), name
        else:
            added = facts.count(ADD_64 if "_count_" in name else FETCH_ADD_64)
            assert facts.count(MIN_64) > 0 and added > 0, name
            assert facts.count(MIN_64) + added == atomics, name
            assert load_bytes(facts) == 16, name


@needs_tools
def test_budgets(kernels):
    budgets = read_budgets()
    if release() != budgets["nvcc"]:
        pytest.skip(f"the budgets are of nvcc {budgets['nvcc']}, this is {release()}")
    found = [
        f"{name}: {reason}"
        for name, facts in kernels.items()
        for reason in about_budget(facts, budgets["kernels"].get(name))
    ]
    assert not found, "\n".join(found)
    assert set(budgets["kernels"]) <= set(kernels), f"run `{WRITE}`"


@needs_tools
def test_a_budget_that_is_exceeded_or_missing_is_caught(kernels):
    facts = next(iter(kernels.values()))
    for name, most in budget_of(facts).items():
        [found] = about_budget(facts, budget_of(facts) | {name: most - 8})
        assert f"{name}, the budget is {most - 8}" in found
    assert about_budget(facts, budget_of(facts)) == []
    assert WRITE in about_budget(facts, None)[0]


BAD = r"""
template <int kVector>
__global__ void narrow(const float* x, float* y) { *y = x[threadIdx.x * kVector]; }
template __global__ void narrow<4>(const float*, float*);

__global__ void local(const int* x, int* y) {
  int table[64];
  for (int i = 0; i < 64; ++i) table[x[i] & 63] = i;
  *y = table[x[64] & 63];
}

__global__ void swap(unsigned long long* key, unsigned long long value) {
  unsigned long long seen = *key;
  while (seen < value) seen = atomicCAS(key, seen, value);
}

__global__ void add(float* sum) { atomicAdd(sum, 1.0f); }
"""


@needs_tools
def test_bad_kernels_are_caught(tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text(BAD)
    found = {
        name.split("/")[-1]: complaints(name, facts)
        for name, facts in compile_source(source, ["sm_90"], tmp_path).items()
    }
    wrong = "1 atomics that are no 64-bit integer maximum, minimum or sum"
    assert found["narrow<4>"] == ["its widest load has 4 bytes, expected 16"]
    assert "accesses to local memory" in found["local"][0]
    assert found["swap"] == [wrong]
    assert found["add"] == [wrong]


@needs_tools
def test_a_warning_is_an_error(tmp_path):
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void f(int* y) { int unused = 1; *y = 2; }")
    with pytest.raises(AssertionError, match="unused"):
        compile_source(source, ["sm_90"], tmp_path)


def main(arguments: list[str]) -> str | None:
    if arguments != ["--write-budgets"]:
        return f"expected --write-budgets, got {' '.join(arguments) or 'nothing'}"
    kernels = compile_all()
    found = [f"{name}: {reason}" for name in kernels for reason in complaints(name, kernels[name])]
    if found:
        return "\n".join([*found, "nothing written: a budget allows none of these"])
    lines = (f'    "{name}": {json.dumps(budget_of(kernels[name]))}' for name in sorted(kernels))
    body = ",\n".join(lines)
    BUDGETS.write_text(f'{{\n  "nvcc": "{release()}",\n  "kernels": {{\n{body}\n  }}\n}}\n')
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
