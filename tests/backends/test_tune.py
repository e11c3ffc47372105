"""Choosing among candidates: what is tried, what is refused, what wins, what a choice forces."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from swkernels import tuning
from swkernels.backends import tune
from swkernels.backends.triton import column_absmax as column
from swkernels.backends.triton import glu_absmax as glu
from swkernels.backends.triton import interpreted, launch, trials
from swkernels.backends.triton import linear_absmax as linear
from swkernels.backends.triton.candidates import Candidate, candidates
from swkernels.backends.triton.tasks import DTYPES, OPERATIONS, Task, tasks
from swkernels.errors import BackendUnavailable, InvalidInput
from swkernels.timing import Timing

CPU = torch.device("cpu")
LINEAR = Task("linear_absmax", 24, 48, 9, "float32")
ROWS = {op: Task(op, 48, 48, 9, "float32") for op in ("column_absmax", "glu_absmax")}
KERNELS = {"column_absmax": column, "glu_absmax": glu, "linear_absmax": linear}

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="Triton's interpreter is off")


@pytest.fixture(autouse=True)
def user_directory(monkeypatch, tmp_path):
    tuning.clear_cache()
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path))
    yield tmp_path
    tuning.clear_cache()


@pytest.fixture
def clock(monkeypatch):
    """Timings by order: the `ranking` function of a candidate's name says how many seconds."""
    rounds = []

    def install(ranking):
        def interleaved(calls, *, device, seconds, most=200):
            rounds.append(list(calls))
            for call in calls.values():
                call(0)
            return {name: timing(ranking(name)) for name in calls}

        monkeypatch.setattr(tune, "interleaved", interleaved)
        return rounds

    return install


def timing(seconds):
    return Timing(median=seconds, p20=seconds, p80=seconds, runs=3, graph=False)


def measure(*planned, **options):
    return list(tune.measure(planned, CPU, **options))


# --- what is tried ---

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "interpreter")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_lists_are_short_and_hold_what_the_architecture_can(op, architecture):
    for dtype in DTYPES:
        for bucket in (16, 64, 256, 1024, 65536):
            found = candidates(op, architecture, dtype, bucket, 1 << 20)
            assert len(set(found)) == len(found)
            assert 2 <= len(found) <= 24
            for candidate in found:
                assert all(type(value) is int for value in candidate.config.values())
            variants = {candidate.variant for candidate in found}
            if op != "linear_absmax":
                assert variants == {"rows"}
                continue
            with_descriptors = architecture == "interpreter" or (
                architecture in ("sm_90", "sm_100", "sm_103") and dtype != "float32"
            )
            expected = {"two_pass", "pointers"} | ({"descriptors"} if with_descriptors else set())
            assert variants == expected


def test_lists_go_by_tokens_and_dtype():
    assert candidates("linear_absmax", "sm_90", "bfloat16", 16, 1 << 20) != candidates(
        "linear_absmax", "sm_90", "bfloat16", 4096, 1 << 20
    )
    wide, narrow = (
        candidates("column_absmax", "sm_90", dtype, 4096, 1 << 20)[0].config["BLOCK_C"]
        for dtype in ("bfloat16", "float32")
    )
    assert wide == 2 * narrow  # the same bytes


def test_what_cannot_fit_shared_memory_is_not_tried():
    few = candidates("linear_absmax", "sm_90", "bfloat16", 4096, 99 << 10)
    many = candidates("linear_absmax", "sm_90", "bfloat16", 4096, 227 << 10)
    assert set(few) < set(many)
    for candidate in few[1:]:
        config = candidate.config
        tiles = (config["BLOCK_T"] + config["BLOCK_D"]) * config["BLOCK_H"] * 2
        assert (config["num_stages"] - 1) * tiles <= 99 << 10


def test_descriptors_have_four_warps_on_blackwell():
    found = candidates("linear_absmax", "sm_100", "bfloat16", 4096, 227 << 10)
    assert {c.config["num_warps"] for c in found if c.variant == "descriptors"} == {4}


@needs_interpreter
def test_what_serves_now_is_tried_first(user_directory):
    config = {"BLOCK_T": 2, "BLOCK_C": 16, "waves": 1}
    with tuning.use({"op": "column_absmax", "variant": "rows", "config": config}):
        tried = tune._tried(ROWS["column_absmax"], CPU)
    assert tried[0].config == config and len(tried) == 3
    variants = [candidate.variant for candidate in tune._tried(LINEAR, CPU)]
    assert variants[:3] == ["two_pass", "descriptors", "pointers"]


# --- tasks ---


def test_tasks_of_a_down_projection():
    planned = tasks(OPERATIONS, [(24, 48)], [16], ["bfloat16"])
    assert planned == [
        Task("column_absmax", 48, 48, 16, "bfloat16"),
        Task("column_absmax", 24, 24, 16, "bfloat16"),
        Task("glu_absmax", 48, 48, 16, "bfloat16"),
        Task("linear_absmax", 24, 48, 16, "bfloat16"),
    ]


def test_tasks_are_planned_once_and_by_bucket():
    planned = tasks(["column_absmax"], [(8, 8), (8, 16), (8, 8)], [20, 60, 16, 64], ["float16"])
    assert [(task.columns, task.tokens, task.bucket) for task in planned] == [
        (8, 16, 16), (8, 64, 64), (16, 16, 16), (16, 64, 64),
    ]  # fmt: skip
    only = tasks(OPERATIONS, [(8, 16)], [16], ["tfloat32"])
    assert [task.op for task in only] == ["linear_absmax"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["conv"], [(8, 8)], [16], ["float32"]), "unknown operation 'conv'.*linear_absmax"),
        ((["glu_absmax"], [(8, 8)], [16], ["int8"]), "unknown dtype 'int8'.*tfloat32"),
        ((["glu_absmax"], [(0, 8)], [16], ["float32"]), "at least 1, got 0"),
        ((["glu_absmax"], [(8, 8)], [0], ["float32"]), "at least 1, got 0"),
    ],
)
def test_tasks_refuse_what_is_unknown(arguments, says):
    with pytest.raises(InvalidInput, match=says):
        tasks(*arguments)


# --- what is refused ---


@needs_interpreter
@pytest.mark.parametrize("op", OPERATIONS)
def test_right_candidates_pass(op):
    """Also where x and the weight have one shape, which must not make a weight of x's rows."""
    for task in (Task(op, 40, 40, 9, "float32"), Task(op, 72, 72, 72, "float16")):
        trial = trials.TRIALS[op](task, CPU)
        for candidate in tune._tried(task, CPU):
            assert trial.wrong(candidate) is None


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 1000, 4096, 16384, 20011])
def test_every_tile_of_64_rows_is_checked(tokens):
    trial = SimpleNamespace(task=SimpleNamespace(tokens=tokens), _device=CPU)
    rows = trials.Trial._rows.func(trial)
    assert rows[0] == 0 and rows[-1] == tokens - 1
    assert tokens < 2 or 1 <= rows.diff().min() and rows.diff().max() <= 64
    assert len(rows) >= min(tokens, 64)


def plant(monkeypatch, op, error):
    """Replace the operation by one that `error` spoils in the last of its candidates."""
    bad = tune._tried(LINEAR if op == "linear_absmax" else ROWS[op], CPU)[-1]
    name = "fused_linear_absmax" if op == "linear_absmax" else op
    right = getattr(KERNELS[op], name)

    def spoilt(*arguments, **options):
        (record, *_) = tuning._used.get()
        if (record["op"], record["variant"], record["config"]) != (op, bad.variant, bad.config):
            return right(*arguments, **options)
        return error(right, *arguments, **options)

    monkeypatch.setattr(KERNELS[op], name, spoilt)
    return bad


def wrong_element(right, *arguments, **options):
    result = right(*arguments, **options)
    result[-1, -1] *= 1.01
    return result


def wrong_peak(place):
    def spoil(right, *arguments, **options):
        result = right(*arguments, **options)
        arguments[place][3] += 1
        return result

    return spoil


def unwritten(right, *arguments, **options):
    result = right(*arguments, **options)
    return torch.empty_like(result)


def nan(right, *arguments, **options):
    return right(*arguments, **options).fill_(float("nan"))


def failing(right, *arguments, **options):
    raise RuntimeError("ptxas died\n with a long story")


def nothing(right, *arguments, **options):
    return None


PLANTED = [
    ("column_absmax", nothing, "wrong: 48 of 48 peaks of x"),
    ("column_absmax", wrong_peak(1), "wrong: 1 of 48 peaks of x"),
    ("column_absmax", failing, "RuntimeError: ptxas died with a long story"),
    ("glu_absmax", wrong_element, "wrong: error of h is"),
    ("glu_absmax", wrong_peak(3), "wrong: 1 of 48 peaks of h"),
    ("linear_absmax", wrong_element, "wrong: error of y is"),
    ("linear_absmax", wrong_peak(3), "wrong: 1 of 48 peaks of x"),
    ("linear_absmax", wrong_peak(4), "wrong: 1 of 24 peaks of y"),
    ("linear_absmax", unwritten, "wrong: error of y is nan"),
    ("linear_absmax", nan, "wrong: error of y is nan"),
    ("linear_absmax", failing, "RuntimeError: ptxas died with a long story"),
]


@needs_interpreter
@pytest.mark.parametrize(("op", "error", "reason"), PLANTED)
def test_a_wrong_candidate_is_refused_however_fast(monkeypatch, clock, op, error, reason):
    bad = plant(monkeypatch, op, error)
    clock(lambda name: 1e-9 if name == str(bad) else 1.0)
    task = LINEAR if op == "linear_absmax" else ROWS[op]
    (result,) = measure(task)
    assert [candidate for candidate, _ in result.refused] == [bad]
    assert result.refused[0][1].startswith(reason)
    assert result.records
    assert all(
        task.record(bad.variant, bad.config)["config"] != r["config"] for r in result.records
    )


@needs_interpreter
def test_without_the_error_the_same_candidate_wins(monkeypatch, clock):
    bad = plant(monkeypatch, "linear_absmax", lambda right, *a, **o: right(*a, **o))
    clock(lambda name: 1e-9 if name == str(bad) else 1.0)
    (result,) = measure(LINEAR)
    assert not result.refused
    assert result.records[0]["config"] == bad.config


@needs_interpreter
def test_a_candidate_that_spills_is_refused(monkeypatch, clock):
    clock(lambda name: 1.0)
    spilling = tune._tried(ROWS["column_absmax"], CPU)[0]
    real = column.column_absmax_kernel.run

    def run(*arguments, **options):
        real(*arguments, **options)
        return SimpleNamespace(n_spills=24 if options["BLOCK_C"] == 32 else 0)

    monkeypatch.setattr(column.column_absmax_kernel, "run", run, raising=False)
    (result,) = measure(ROWS["column_absmax"])
    assert result.refused == [(spilling, "spills registers (24 words a thread)")]
    assert result.records[0]["config"]["BLOCK_C"] != 32


@needs_interpreter
def test_if_all_are_refused_nothing_is_chosen(monkeypatch, clock):
    clock(lambda name: 1.0)
    monkeypatch.setattr(column, "column_absmax", lambda *arguments: None)
    (result,) = measure(ROWS["column_absmax"])
    assert result.records == [] and len(result.refused) == 2
    assert result.skipped == "every candidate was refused"


@needs_interpreter
def test_too_little_memory_skips_the_task_and_not_the_rest(monkeypatch, clock):
    clock(lambda name: 1.0)
    planned = (ROWS["glu_absmax"], ROWS["column_absmax"])

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(glu, "glu_absmax", full)
    first, second = measure(*planned)
    assert first.records == [] and "too little memory" in first.skipped
    assert second.records


def test_a_gpu_that_does_not_answer_ends_the_run(monkeypatch):
    def dead(device):
        raise RuntimeError("an illegal memory access was encountered")

    def wrong(candidate):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    trial = SimpleNamespace(wrong=wrong, task=LINEAR)
    with pytest.raises(
        BackendUnavailable, match="does not answer after linear_absmax with two_pass"
    ):
        tune._refusal(trial, Candidate("two_pass", ()), torch.device("cuda", 0))


# --- what wins ---


@needs_interpreter
def test_the_fastest_comes_first_then_the_best_of_each_other_variant(clock):
    seconds = {"library": 0.5, "two_pass": 0.4}
    tried = [str(candidate) for candidate in tune._tried(LINEAR, CPU)]
    fused = [name for name in tried if name != "two_pass"]
    seconds |= {name: 1 + place for place, name in enumerate(reversed(fused))}
    rounds = clock(seconds.get)
    (result,) = measure(LINEAR)
    best = {name.split()[0]: name for name in sorted(fused, key=seconds.get, reverse=True)}
    assert [str(Candidate.of(r["variant"], r["config"])) for r in result.records] == sorted(
        ["two_pass", *best.values()], key=seconds.get
    )
    assert [record["seconds"] for record in result.records] == sorted(
        seconds[name] for name in ("two_pass", *best.values())
    )
    assert {record["library_seconds"] for record in result.records} == {0.5}
    assert rounds[0] == tried
    fastest = sorted(tried, key=seconds.get)[:3]
    assert set(rounds[1]) == {"library", *fastest, *best.values()}
    assert len(rounds[1]) < len(tried)


@needs_interpreter
def test_the_last_round_decides(monkeypatch):
    def interleaved(calls, *, device, seconds, most=200):
        order = sorted(calls) if "library" in calls else sorted(calls, reverse=True)
        return {name: timing(1.0 + order.index(name)) for name in calls}

    monkeypatch.setattr(tune, "interleaved", interleaved)
    (result,) = measure(ROWS["glu_absmax"])
    names = sorted(str(candidate) for candidate in tune._tried(ROWS["glu_absmax"], CPU))
    assert str(Candidate.of("rows", result.records[0]["config"])) == names[0]


@needs_interpreter
def test_the_passes_of_this_run_serve_the_two_pass_variant(monkeypatch, clock):
    """Chosen for x and y before, though no file holds them."""
    best = {"column_absmax": str(tune._tried(ROWS["column_absmax"], CPU)[-1])}
    clock(lambda name: 0.1 if name in best.values() else 1.0)
    seen = []
    real = launch.choose

    def choose(op, tensor, *shape, **options):
        choice = real(op, tensor, *shape, **options)
        seen.append((shape[0], str(Candidate.of(choice.variant, choice.config))))
        return choice

    planned = tasks(["column_absmax", "linear_absmax"], [(24, 48)], [9], ["float32"])
    for result in tune.measure(planned, CPU):
        if result.task.op == "column_absmax":
            monkeypatch.setattr(column, "choose", choose if result.task.columns == 24 else real)
    assert set(seen) == {(24, best["column_absmax"]), (48, best["column_absmax"])}


@needs_interpreter
def test_time_that_is_over_ends_before_the_next_task(monkeypatch, clock):
    clock(lambda name: 1.0)
    planned = [ROWS["column_absmax"], ROWS["glu_absmax"]]
    assert measure(*planned, deadline=time.monotonic()) == []
    now = iter([0.0, 2.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert [result.task for result in measure(*planned, deadline=1.0)] == planned[:1]


# --- forcing a choice ---


def look(**options):
    shape = dict(rows=4096, columns=14336, tokens=1000, dtype="bfloat16")
    return tuning.lookup("linear_absmax", "a GPU", **shape, architecture="sm_90", **options)


def record(variant="pointers", **fields):
    return {"op": "linear_absmax", "variant": variant, "config": {"BLOCK_T": 1}, **fields}


def test_use_comes_before_the_users_files_and_ends(user_directory):
    (user_directory / "a.json").write_text(
        '{"schema": "swkernels.tuning/1", "device": "a GPU", "measured": true, "records": '
        '[{"op": "linear_absmax", "variant": "descriptors", "config": {}}]}'
    )
    assert look().variant == "descriptors"
    with pytest.raises(KeyError), tuning.use(record()):
        assert look().variant == "pointers" and look().config == {"BLOCK_T": 1}
        assert look().measured is False and look().source == "tuning.use"
        assert look(variant="two_pass").source.endswith("default.json")
        with tuning.use(record("two_pass"), record("descriptors")):
            assert look().variant == "two_pass"
            assert look(variant="pointers").config == {"BLOCK_T": 1}
        raise KeyError
    assert look().variant == "descriptors"


@pytest.mark.parametrize(
    "field", [{"rows": 1}, {"columns": 1}, {"tokens": 16}, {"dtypes": ["float16"]}]
)
def test_use_matches_by_the_rules_of_a_file(field):
    with tuning.use(record(**field)):
        assert look().variant == "two_pass"
    with tuning.use(record(rows=4096, columns=14336, tokens=1024, dtypes=["bfloat16"])):
        assert look().variant == "pointers"


def test_use_stays_in_its_thread():
    seen = []
    with tuning.use(record()):
        thread = threading.Thread(target=lambda: seen.append(look().variant))
        thread.start()
        thread.join()
    assert seen == ["two_pass"]


def test_use_refuses_half_a_record():
    with pytest.raises(InvalidInput, match="lacks config, variant"), tuning.use({"op": "x"}):
        pass


def test_precision_is_that_of_pytorch_afterwards():
    before = linear._multiplied(torch.float32)
    for dtype in ("float32", "tfloat32"):
        with pytest.raises(KeyError), trials.precision(dtype):
            assert linear._multiplied(torch.float32) == dtype
            raise KeyError
        assert linear._multiplied(torch.float32) == before


def test_poison_ends_with_its_block():
    with pytest.raises(KeyError), trials.poisoned():
        assert torch.empty(5).isnan().all()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@needs_interpreter
def test_watching_leaves_the_kernels_as_they_were():
    x, keys = torch.ones(3, 4), torch.zeros(4, dtype=torch.int64)
    with tune._watched(start=False) as compiled:
        column.column_absmax(x, keys, None, 0)
    assert len(compiled) == 1 and not keys.any()  # not launched
    assert "run" not in vars(column.column_absmax_kernel)
    column.column_absmax(x, keys, None, 0)
    assert keys.all()


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # enough to compile for a GPU that is not here
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
from swkernels.backends import tune
from swkernels.backends.triton import column_absmax, launch, tasks
launch.names = lambda device: ("none", "sm_90")
launch.multiprocessors = lambda device: 132
tune.candidates = lambda *a: [tune.Candidate.of("rows", dict(
    BLOCK_T=8, BLOCK_C=c, waves=w, num_warps=4)) for c in (128, 256) for w in (2, 4)]
calls, done = [], []
triton.knobs.compilation.listener = lambda **told: calls.append(told["src"].constants)
planned = tasks.tasks(["column_absmax"], [(256, 512)], [16, 4096], ["float16"])
def compile(**options):
    tune.compile_ahead(planned, torch.device("cpu"), progress=lambda *p: done.append(p), **options)

compile()
assert len(calls) == 3, calls  # the record that serves (16 x 256), 8 x 128 and 8 x 256
assert done == [(1, 3), (2, 3), (3, 3)], done
compile()
assert len(calls) == 3, calls
tune.os.cpu_count = lambda: 1
tune.candidates = lambda *a: [tune.Candidate.of("rows", dict(
    BLOCK_T=t, BLOCK_C=256, waves=2, num_warps=w)) for t in (2, 4) for w in (1, 2, 4, 8)]
compile(deadline=0.0)
assert len(calls) < 6, calls  # 8 are new, time is over
print("compiled")
"""


def test_binaries_are_compiled_ahead_and_each_once(tmp_path):
    keep = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=keep | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "compiled" in result.stdout
