"""The gate without a GPU: the Triton kernels in every configuration that a tuning file names.

Each is compiled for the architectures of `aot.ARCHITECTURES`; its registers, local and shared
memory must keep to the committed budget, and its machine code must hold what fast code needs.

    python -m tests.backends.test_triton_aot --write-budgets   # take the binaries of now as budget
    python -m tests.backends.test_triton_aot NAME ...          # the facts of single builds
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from swkernels import tuning

from . import aot

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

BUDGETS = Path(__file__).with_name("test_triton_budgets.json")
WRITE = "python -m tests.backends.test_triton_aot --write-budgets"
REGISTER_UNIT = 8  # registers of a thread are given out by eights
KIB = 1024
# Shared memory that one program may use, from the vendors' tuning guides.
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TENSOR_MEMORY_COLUMNS = 512

# Names of instructions begin with a match of these.
ANY_MATRIX_UNIT = r"HMMA|HGMMA|UTC\w*MMA|v_mfma"
MATRIX_UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
MERGE = r"(RED|REDG|ATOM|ATOMG)\.E\.MAX\.S64|global_atomic_smax_x2"
COMPARE_AND_SWAP = r"\w+\.(\w+\.)*CAS|\w+_cmpswap"
WIDE_LOAD = r"LDG\.E\S*\.128|(global|buffer)_load_dwordx4"
WIDE_STORE = r"STG\.E\S*\.128|(global|buffer)_store_dwordx4"
WIDE_ASYNC_LOAD = r"LDGSTS\.E\S*\.128"
# 64 bits are left for the token index.
NARROW_LOAD = r"LDG\.(?!\S*(64|128))|(global|buffer)_load_(dword$|[us]?(byte|short))"
NARROW_ASYNC_LOAD = r"LDGSTS\.(?!\S*(64|128))"

FILES = sorted(Path(tuning.__file__).parent.glob("*.json"))
BUILDS = aot.builds_of(FILES)


def complaints(build: aot.Build, facts: aot.Facts, budget: dict | None) -> list[str]:
    """Why the build does not pass; nothing if it does."""
    if facts.error:
        return [f"does not compile: {facts.error}"]
    return [*_about_limits(build, facts), *_about_code(build, facts), *_about(budget, facts)]


def _about_limits(build, facts):
    # Where nothing is aligned the budget allows what there is: correct, but not meant to be fast.
    if (facts.spills or facts.stack) and "odd" not in build.mode:
        yield f"{facts.spills} accesses to local memory, {facts.stack} bytes of stack; allowed: 0"
    if facts.shared > SHARED_LIMIT[build.architecture]:
        yield f"{facts.shared} bytes of shared memory, over {SHARED_LIMIT[build.architecture]}"
    if facts.tensor_memory > TENSOR_MEMORY_COLUMNS:
        yield f"{facts.tensor_memory} columns of tensor memory, over {TENSOR_MEMORY_COLUMNS}"


def _about_code(build, facts):
    if build.op == "lora_linear" and build.dtype != "float32" and not facts.count(ANY_MATRIX_UNIT):
        yield f"no instruction {ANY_MATRIX_UNIT}"
    if build.op in aot.PACKED:
        yield from (f"no instruction {name}" for name in _packed(build) if not facts.count(name))
    if not build.op.endswith("absmax"):  # no peaks
        return
    wanted, unwanted = [MERGE], [COMPARE_AND_SWAP]
    through_descriptors = build.variant == "descriptors"
    if build.op == "linear_absmax":
        registers = build.dtype == "float32" and build.architecture != "gfx942"
        wanted.append("FFMA" if registers else MATRIX_UNITS[build.architecture])
        (wanted if through_descriptors else unwanted).extend(["UTMALDG", "UTMASTG"])
    if not through_descriptors and not {"ones", "odd"} & set(build.mode):
        if build.op == "linear_absmax":
            wanted += [
                WIDE_ASYNC_LOAD
                if build.architecture == "sm_80"
                else "|".join((WIDE_ASYNC_LOAD, WIDE_LOAD)),
                WIDE_STORE,
            ]
            unwanted.append(NARROW_ASYNC_LOAD)
        else:
            wanted += [WIDE_LOAD, *([WIDE_STORE] if build.op == "glu_absmax" else [])]
            unwanted.append(NARROW_LOAD)
    yield from (f"no instruction {name}" for name in wanted if not facts.count(name))
    for name in unwanted:
        if facts.count(name):
            yield f"{facts.count(name)} instructions {name}; allowed: none"


def _packed(build):
    if build.variant in ("fused", "encode", "ranges"):
        return [WIDE_LOAD]
    return {"runs": [WIDE_STORE], "dot": [ANY_MATRIX_UNIT]}.get(build.variant, [])


def _about(budget, facts):
    if budget is None:
        yield f"no budget: run `{WRITE}` and commit {BUDGETS.name}"
        return
    for name, most in budget.items():
        if getattr(facts, name) > most:
            yield (
                f"{getattr(facts, name)} {name}, the budget is {most}: mend the kernel, or run "
                f"`{WRITE}` and say in the commit why more is right"
            )


def budget_of(facts: aot.Facts) -> dict[str, int]:
    units = -(-facts.registers // REGISTER_UNIT)
    registers = units * REGISTER_UNIT
    return {"registers": registers, "spills": facts.spills, "shared": facts.shared}


def read_budgets() -> dict[str, dict[str, int]]:
    return json.loads(BUDGETS.read_text())


BAD = {
    "spills": {"BLOCK_T": 256, "BLOCK_D": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3},
    "shared": {"BLOCK_T": 128, "BLOCK_D": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 8},
    "option": {"BLOCK_T": 128, "BLOCK_D": 128, "BLOCK_H": 64, "matrix_instr_nonkdim": 16},
}


def tuning_file(path: Path, *records: dict, device: str | None = "NVIDIA H100 80GB HBM3") -> Path:
    content = {"schema": tuning.SCHEMA, "device": device, "measured": True, "records": records}
    path.write_text(json.dumps(content))
    return path


def record(config: dict, **fields) -> dict:
    record = {"op": "linear_absmax", "variant": "pointers", "dtypes": ["float16"], **fields}
    return record | {"config": config | {"GROUP_T": 8}}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> dict[str, aot.Build]:
    path = tuning_file(tmp_path_factory.mktemp("tuning") / "bad.json", *map(record, BAD.values()))
    return dict(zip(BAD, aot.builds_of([path]), strict=True))


@pytest.fixture(scope="module")
def compiled(bad) -> dict[aot.Build, aot.Facts]:
    return aot.compile_all([*BUILDS, *bad.values()])


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_build(compiled, build):
    found = complaints(build, compiled[build], read_budgets().get(str(build)))
    assert not found, "; ".join(found)


def test_no_budget_is_left_over():
    assert set(read_budgets()) <= set(map(str, BUILDS)), f"run `{WRITE}`"


def test_every_operation_is_built_for_every_architecture():
    combinations = {(build.architecture, build.op, build.dtype) for build in BUILDS}
    for architecture in aot.ARCHITECTURES:
        for op, dtypes in aot.DTYPES.items():
            assert combinations >= {(architecture, op, dtype) for dtype in dtypes}


def test_activations_are_those_of_the_kernel():
    from swkernels.backends.triton.glu_absmax import ACTIVATIONS

    assert set(aot.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("spills", r"accesses to local memory, \d+ bytes of stack"),
        ("shared", "bytes of shared memory, over 232448"),
        ("option", "does not compile: .*matrix_instr_nonkdim: no option of Triton"),
    ],
)
def test_a_bad_configuration_is_caught(compiled, bad, name, says):
    facts = compiled[bad[name]]
    found = complaints(bad[name], facts, budget_of(facts))
    assert len(found) == 1
    assert re.search(says, found[0])


def test_what_the_tensor_cores_do_not_multiply_is_caught(compiled):
    """float32 is multiplied in registers: held to what other types need, it fails."""
    for build in BUILDS:
        if (build.op, build.dtype) == ("linear_absmax", "float32") and "gfx" not in str(build):
            other = replace(build, dtype="tfloat32")
            expected = [f"no instruction {MATRIX_UNITS[build.architecture]}"]
            assert complaints(other, compiled[build], budget_of(compiled[build])) == expected


# Element by element, as listed; narrow by nature, as factors of a few columns; or, where the sizes
# are 1, blocks of one element.
GATHERING = {"sampled_grad", "sparse_linear", "masked_grad", "lora_linear", "topk_low_rank"}
GATHERING.update(aot.PACKED)


def test_narrow_loads_are_caught(compiled):
    """With strides of 1 everywhere nothing can be loaded widely: held to that, it fails."""
    scalar = [build for build in BUILDS if "ones" in build.mode]
    assert {build.op for build in scalar} == set(aot.DTYPES) - GATHERING
    for build in scalar:
        other = replace(build, mode=tuple(mode for mode in build.mode if mode != "ones"))
        found = complaints(other, compiled[build], budget_of(compiled[build]))
        assert any(complaint.startswith("no instruction LDG") for complaint in found)


@pytest.mark.parametrize("name", ["registers", "shared"])
def test_a_budget_that_is_exceeded_or_missing_is_caught(compiled, name):
    build = BUILDS[0]
    facts = compiled[build]
    small = budget_of(facts)
    small[name] -= 8
    [found] = complaints(build, facts, small)
    assert f"{name}, the budget is {small[name]}" in found
    [found] = complaints(build, facts, None)
    assert WRITE in found


def test_a_measured_file_counts_for_its_device(tmp_path):
    path = tmp_path / "measured.json"
    config = BAD["spills"]

    def architectures(device, **fields):
        builds = aot.builds_of([tuning_file(path, record(config, **fields), device=device)])
        return [build.architecture for build in builds]

    assert architectures("NVIDIA H100 80GB HBM3") == ["sm_90"]
    assert architectures("NVIDIA H200") == ["sm_90"]
    assert architectures("NVIDIA B200") == ["sm_100"]
    assert architectures("cpu") == []
    assert architectures(None) == list(aot.ARCHITECTURES)
    assert architectures(None, architectures=["sm_8*", "gfx*"]) == ["sm_80", "gfx942"]
    with pytest.raises(ValueError, match="add it to DEVICES"):
        architectures("NVIDIA L20")
    with pytest.raises(ValueError, match="for none of sm_90"):
        architectures("NVIDIA H100 PCIe", architectures=["sm_80"])
    with pytest.raises(ValueError, match="'matmul' is unknown"):
        architectures(None, op="matmul")


def test_what_makes_no_other_binary_is_built_once(tmp_path):
    config = BAD["shared"]
    records = [record(config | {"waves": waves}, rows=rows) for waves, rows in ((1, 8), (2, 16))]
    files = [tuning_file(tmp_path / name, *records) for name in ("a.json", "b.json")]
    assert len(aot.builds_of(files)) == 1


def main(arguments: list[str]) -> int:
    if arguments != ["--write-budgets"]:
        chosen = [build for build in BUILDS if str(build) in arguments]
        for build, facts in aot.compile_all(chosen).items():
            print(json.dumps({"name": str(build), **asdict(facts)}))
        return 0 if chosen else f"expected --write-budgets or names of {BUDGETS.name}"
    compiled = aot.compile_all(BUILDS)
    failed = 0
    for build, facts in compiled.items():
        for complaint in complaints(build, facts, budget_of(facts)):
            failed += 1
            print(f"{build}: {complaint}")
    if failed:
        return "nothing written: a budget allows none of these"
    lines = (f'  "{build}": {json.dumps(budget_of(facts))}' for build, facts in compiled.items())
    BUDGETS.write_text("{\n" + ",\n".join(sorted(lines)) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
