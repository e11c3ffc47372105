"""The runner: the gate in front of every speed, the record, what is skipped."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.util import find_spec

import pytest
import torch

from benchmarks import expected, machine, records, run
from benchmarks.case import Error, Provider
from benchmarks.expected import Ceilings
from benchmarks.measure import cold_copies, measure, peak_memory, poisoned, skipped
from benchmarks.ops import (
    block_dequantize,
    block_quantize,
    column_absmax,
    glu_absmax,
    linear_absmax,
    quant_linear,
)
from benchmarks.ops.packed import packed
from benchmarks.suites import OPERATIONS, cases
from swkernels import backends, ops
from swkernels.errors import InvalidInput

WHOLE_MODELS = {
    "tracked_model", "sparse_training", "quant_generation", "perplexity", "choices", "ablation",
    "streamed_scan", "shared_scan", "guard_verify",
}  # fmt: skip
SECONDS_LONG = {"lora_linear", "topk_low_rank"}  # on a CPU they are in the suite "models"
CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e10, {"float32": 1e11, "bfloat16": 1e11, "float16": 1e11})
TINY = ("tiny",), "down_proj"
PACKED = (block_quantize, block_dequantize, quant_linear)
SIZES = 64, 128  # of a packed weight


def tiny(op, *providers, dtype="float32", code="int4"):
    """A tiny case with more providers than its own, and without torch.compile."""
    if op in PACKED:
        tokens = (5,) if op is quant_linear else ()
        case = op.case(*TINY, *tokens, *SIZES, code, 32, dtype, CPU, dry=True)
    elif op is linear_absmax:
        case = op.case(*TINY, 37, 24, 48, dtype, CPU, dry=True)
    else:
        case = op.case(*TINY, 37, 48, dtype, CPU, dry=True)
    own = case.providers
    return dataclasses.replace(case, providers=lambda: [*own(), *providers])


def by_provider(case):
    results = measure(case, CPU, CEILINGS, 1 << 10, seconds=0.005)
    return {result["provider"]: result for result in results}


@pytest.mark.parametrize("op", [column_absmax, glu_absmax, linear_absmax, *PACKED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_right_gets_a_speed_and_an_error(op, dtype):
    results = by_provider(tiny(op, dtype=dtype))
    ok = {name: result for name, result in results.items() if result["status"] == "ok"}
    roles = {result["role"] for result in ok.values()}
    assert roles - {"peer"} == {"ours", "bare", "eager"}
    for result in ok.values():
        assert 0 < result["p20"] <= result["median"] <= result["p80"]
        assert result["error"]["value"] <= result["error"]["limit"]
        least, binding = expected.floor(tiny(op, dtype=dtype).work, CEILINGS, dtype)
        assert result["share"] == pytest.approx(least / result["median"])
        assert result["ceiling"] == binding
    for name, result in results.items():
        if name not in ok:
            assert result["status"] == "unavailable" and result["reason"]


def _wrong_keys(inputs):
    keys = ops.column_absmax(inputs["x"])
    keys[7] += 1  # one channel, one token later
    return {"keys": keys}


def _wrong_value(inputs):
    values = inputs["x"].abs().amax(0)
    values[-1] = math.nan
    return {"values": values}


def _wrong_h(inputs):
    h, keys = ops.glu_absmax(inputs["gate"], inputs["up"])
    h[5, 3] += 1e-3
    return {"h": h, "keys": keys}


def _rounded_twice(inputs):
    h, _ = ops.glu_absmax(inputs["gate"], inputs["up"])
    h = h.to(torch.bfloat16).float()
    return {"h": h, "keys": ops.column_absmax(h)}


def _unwritten(inputs):
    x, weight = inputs["x"], inputs["weight"]
    y = torch.empty(len(x), len(weight))
    y[:-1] = x[:-1] @ weight.T
    return {"y": y}


def _wrong_out_keys(inputs):
    y, in_keys, out_keys = ops.linear_absmax(inputs["x"], inputs["weight"])
    return {"y": y, "in_keys": in_keys, "out_keys": out_keys.roll(1)}


@pytest.mark.parametrize("code", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("op", PACKED)
def test_every_code_is_measured_and_bitsandbytes_beside_its_own(op, code):
    results = by_provider(tiny(op, code=code))
    assert {r["status"] for r in results.values()} <= {"ok", "unavailable"}
    has_nf4 = find_spec("bitsandbytes") is not None and (code == "nf4" or op is quant_linear)
    peer = "bitsandbytes matmul_4bit, nf4" if op is quant_linear else "bitsandbytes"
    assert (results[peer]["status"] == "ok") == has_nf4


def _wrong_code(inputs):
    q = ops.block_quantize(inputs["w"], block_size=32)
    q.codes[3] ^= 1
    return {"codes": q.codes, "scales": q.scales}


def _wrong_scale(inputs):
    q = ops.block_quantize(inputs["w"], block_size=32)
    return {"codes": q.codes, "scales": q.scales.nextafter(torch.tensor(1.0))}


def _one_value_off(inputs):
    w = packed(inputs, *SIZES, "int4", 32, "float32").dequantize()
    w[7, 11] += 1e-6
    return {"w": w}


def _without_outliers(inputs):
    q = packed(inputs, *SIZES, "int4", 32, "float32")
    none = {name: inputs[name][:0] for name in ("positions", "values")}
    return {"y": ops.quant_linear(inputs["x float32"], q.with_tensors(q.tensors() | none))}


def _another_weight(inputs):
    return {"y of nf4": ops.quant_linear(
        inputs["x float32"], packed(inputs, *SIZES, "int4", 32, "float32")
    )}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "call"),
    [
        (block_quantize, _wrong_code),
        (block_quantize, _wrong_scale),
        (block_dequantize, _one_value_off),
        (quant_linear, _without_outliers),
        (column_absmax, _wrong_keys),
        (column_absmax, _wrong_value),
        (glu_absmax, _wrong_h),
        (glu_absmax, _rounded_twice),
        (linear_absmax, _unwritten),
        (linear_absmax, _wrong_out_keys),
    ],
)
def test_a_wrong_kernel_gets_no_speed(op, call):
    result = by_provider(tiny(op, Provider("wrong", "ours", call)))["wrong"]
    assert result["status"] == "wrong"
    assert "limit" in result["reason"]
    assert all(result[name] is None for name in records.SPEED)
    assert result["peak_memory"] is None


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_peer_is_judged_by_its_own_weight():
    results = by_provider(tiny(quant_linear, Provider("wrong", "peer", _another_weight)))
    assert results["wrong"]["status"] == "wrong"


def test_the_cache_is_cold_for_the_provider_that_reads_least():
    inputs = {"small": torch.zeros(1024, dtype=torch.uint8), "large": torch.zeros(1 << 20)}
    assert len(cold_copies(inputs, 1024, CPU)) == 2
    assert len(cold_copies(inputs, 1024, CPU, ("small",))) == 4


def test_one_that_fails_is_named_and_the_rest_still_run():
    def fails(inputs):
        raise RuntimeError("illegal memory access\nand more")

    results = by_provider(tiny(column_absmax, Provider("failing", "ours", fails)))
    assert results["failing"]["status"] == "failed"
    assert results["failing"]["reason"] == "RuntimeError: illegal memory access"
    assert results["swkernels"]["status"] == "ok"


def break_column_absmax(monkeypatch):
    """A deliberately wrong kernel in the place of the C++ one: it forgets the last row."""
    module = backends._module("cpu", "column_absmax")
    right = module.column_absmax

    def wrong(x, keys, token_index, token_offset):
        right(x[:-1], keys, token_index, token_offset)

    monkeypatch.setattr(module, "column_absmax", wrong)


def test_a_broken_kernel_of_the_package_is_caught_by_the_run(monkeypatch, tmp_path, capsys):
    path = tmp_path / "record.jsonl"
    command = ["--suite", "cpu", "--dry", "--op", "column_absmax", "-o", str(path)]
    assert run.main(command) == 0
    break_column_absmax(monkeypatch)
    capsys.readouterr()
    assert run.main(command) == 1
    printed = capsys.readouterr().err
    good, broken = records.read(tmp_path)
    of_ours = [r for r in broken.results if r["provider"] == "swkernels"]
    assert [r["status"] for r in of_ours] == ["wrong", "wrong"]
    assert all(r["median"] is None for r in of_ours)
    assert all(r["status"] == "ok" for r in good.results if r["provider"] == "swkernels")
    lines = [line for line in printed.splitlines() if line.startswith("    swkernels  ")]
    assert len(lines) == 2  # not the lines of "swkernels (triton)", whose kernel is right
    assert all("wrong" in line and " ms" not in line for line in lines)


def test_the_dry_run_of_the_gpu_suite_passes_over_every_operation(monkeypatch, tmp_path):
    path = tmp_path / "record.jsonl"
    assert run.main(["--suite", "gpu", "--dry", "-o", str(path)]) == 0
    (found,) = records.read(tmp_path)
    assert found.header["dry"] and found.header["suite"] == "gpu"
    assert found.header["ceilings"]["copy"] > 0
    measured = {r["op"] for r in found.results if r["provider"] == "swkernels"}
    assert measured == set(OPERATIONS) - WHOLE_MODELS
    assert {r["status"] for r in found.results if r["role"] == "ours"} == {"ok"}
    fused = [r for r in found.results if r["provider"] == "swkernels (triton, fused)"]
    assert len(fused) == 2


def test_a_second_run_is_added_to_the_file_and_time_that_is_over_is_said(tmp_path):
    path = tmp_path / "record.jsonl"
    command = ["--suite", "cpu", "--dry", "--op", "glu_absmax", "-o", str(path)]
    assert run.main(command) == 0
    assert run.main([*command, "--minutes", "0"]) == 0
    first, second = records.read(tmp_path)
    assert any(r["status"] == "ok" for r in first.results)
    assert {(r["status"], r["reason"]) for r in second.results} == {
        ("skipped", "the time of the run was over")
    }


def test_interrupted_keeps_what_was_measured(monkeypatch, tmp_path):
    path = tmp_path / "record.jsonl"
    real, calls = run.measure, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(run, "measure", interrupted)
    assert run.main(["--suite", "cpu", "--dry", "--op", "glu_absmax", "-o", str(path)]) == 0
    (kept,) = records.read(tmp_path)
    assert {r["case"] for r in kept.results} == {"tiny down_proj input, 5 tokens, float32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there(monkeypatch, capsys, tmp_path):
    assert run.main(["--suite", "gpu", "-o", str(tmp_path / "record.jsonl")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert run.main(["--suite", "gpu", "--dry", "-o", str(tmp_path / "record.jsonl")]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_dry_run_needs_a_file(capsys):
    with pytest.raises(SystemExit):
        run.main(["--dry"])
    assert "needs -o" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_distinct_and_quick_ones_come_first(suite, quick):
    labels = [(case.op, case.label) for case in cases(suite, CPU, quick=quick)]
    assert len(set(labels)) == len(labels)
    elsewhere = WHOLE_MODELS | (SECONDS_LONG if suite == "cpu" else set())
    assert {op for op, _ in labels} == set(OPERATIONS) - elsewhere
    first = [(case.op, case.label) for case in cases(suite, CPU, quick=True)]
    assert labels[: len(first)] == first


def test_the_full_suite_has_every_model_projection_and_token_count():
    found = list(cases("gpu", CPU, ops=("linear_absmax",)))
    models = {model for case in found for model in case.models}
    assert len(models) == 7
    assert {case.projection.split(",")[0] for case in found} == {
        "down_proj", "gate_proj", "q_proj", "k_proj"
    }  # fmt: skip
    assert {case.shape["tokens"] for case in found} == {1, 16, 512, 4096, 16384}
    assert {case.dtype for case in found} == {"float32", "bfloat16", "float16"}


def test_unknown_operation():
    with pytest.raises(InvalidInput, match="got nonsense"):
        list(cases("cpu", CPU, ops=("nonsense",)))


def test_what_is_too_large_for_the_cpu_suite_is_skipped_with_its_size():
    case = column_absmax.case(*TINY, 16384, 28672, "float32", CPU)
    reason = run._too_large(case, CEILINGS, "cpu")
    assert reason.startswith("1880 MB")
    assert run._too_large(case, CEILINGS, "gpu") is None
    slow = linear_absmax.case(*TINY, 512, 4096, 14336, "float32", CPU)
    assert "s a round" in run._too_large(slow, CEILINGS, "cpu")
    assert run._too_large(tiny(column_absmax), CEILINGS, "cpu") is None
    assert skipped(case, reason)["median"] is None


def test_poisoned_fills_what_is_allocated():
    with poisoned():
        assert torch.empty(1000).isnan().all()
        assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_peak_memory_counts_what_a_call_needs_at_once():
    x = torch.ones(8 << 20)  # 32 MiB
    measured = peak_memory(lambda: x.abs(), CPU)
    if measured is None:
        pytest.skip("this system does not tell peak memory")
    assert 30 << 20 <= measured <= 40 << 20
    assert peak_memory(lambda: x.abs_(), CPU) <= 4 << 20


def test_error_of_nan_does_not_pass():
    assert not Error(math.nan, 1.0, "anything").passed
    assert Error(0.0, 0, "anything").passed


def test_header(monkeypatch, tmp_path):
    header = machine.header("cpu", CPU, quick=False, dry=False)
    assert header["device"]["type"] == "cpu" and header["device"]["cache_bytes"] >= 1 << 20
    assert header["versions"]["torch"] == torch.__version__
    assert header["commit"] is None or len(header["commit"]) == 40
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setenv("SWKERNELS_COMMIT", "f" * 40)
    assert machine.header("cpu", CPU, quick=True, dry=True)["commit"] == "f" * 40
    json.dumps(header)
