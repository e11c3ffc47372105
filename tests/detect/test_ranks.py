"""Several processes report what one does, bit for bit, and stop together where one fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # a rank
    sys.path.insert(0, str(Path(__file__).parents[2]))

from swkernels.detect.ranks import Ranks, packed, unpacked
from swkernels.detect.scan import scan
from swkernels.errors import InvalidInput, RankFailed, SwkernelsError
from tests.detect.planting import plant
from tests.models.tiny import VOCABULARY, tiny_model
from tests.processes import finish_ranks, start_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch without distributed"
)
TIMEOUT = 5.0  # of the runs in which a rank falls silent
EVERY_METHOD = ("dominance", "outlier", "threshold")
# (architecture, lengths of the samples, settings)
CASES = {
    "uneven samples": ("llama", (40, 7, 7, 23, 1, 16, 31), {"batch_size": 2}),
    "fewer samples than ranks": ("llama", (48,), {"eval_length": 12}),
    "experts, every method": (
        "mixtral",
        (24, 24, 24, 12, 24),
        {"methods": EVERY_METHOD, "threshold": 0.01, "max_candidates": 6, "batch_size": 2},
    ),
    "experts that are modules": ("jetmoe", (24, 12), {"verify": False}),
}


def planted(name: str):
    model = tiny_model(name)
    plant(model, layer=1, rows=2, columns=2, seed=3)
    return model


def samples(lengths) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def report(case: str, ranks: Ranks | None = None) -> str:
    """A case's report as text; "created" is the one thing that may differ."""
    name, lengths, settings = CASES[case]
    settings = {"eval_length": 16, "null_draws": 3} | settings
    found = scan(planted(name), samples(lengths), ranks=ranks, **settings).to_dict()
    assert found.pop("created")
    return json.dumps(found)


def failing(model, when: int, act):
    """The model, of which one block does ``act`` at its run number ``when``."""
    runs = []

    def hook(module, arguments):
        runs.append(None)
        if len(runs) == when:
            act()

    model.model.layers[1].register_forward_pre_hook(hook)
    return model


def raise_():
    raise RuntimeError("the GPU fell off\nand more")


def said_by(call) -> str:
    """The kind and the text of the error, and how many seconds it took."""
    began = time.monotonic()
    try:
        call()
    except SwkernelsError as error:
        return f"{type(error).__name__} after {time.monotonic() - began:.1f} s: {error}"
    except RuntimeError as error:
        return f"{type(error).__name__} after {time.monotonic() - began:.1f} s: {error}"
    return "no error"


def worker(mode: str, folder: str) -> None:
    with Ranks.from_environment() as ranks:
        for number, case in enumerate(CASES):
            Path(folder, f"{number}-{ranks.rank}.json").write_text(report(case, ranks))
        here = ranks.rank == ranks.size - 1
        said = {}

        def run(name: str, model, ids, timeout: float = 60.0) -> None:
            with Ranks.of_group(timeout) as others:
                said[name] = said_by(lambda: scan(model, ids, ranks=others, eval_length=16))

        if mode == "errors":
            model = planted("llama")
            run("texts", model, samples((9, 9 + here)))
            unlike = tiny_model("llama", seed=here)
            run("weights", unlike, samples((9, 9)))
            run("raises", failing(model, 2, raise_ if here else int), samples((9,) * 8))
            bad = planted("llama")
            bad.model.layers[2].mlp.down_proj.weight.data[3, 20] = float("nan") if here else 1.0
            run("nan", bad, samples((9,) * 4))
            # The second look, and the measuring.
            run("late", failing(planted("llama"), 3, raise_ if here else int), samples((9, 9)))
            asleep = (lambda: time.sleep(2 * TIMEOUT)) if here else int
            run("silent", failing(planted("llama"), 2, asleep), samples((9,) * 9), TIMEOUT)
        else:
            death = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if here else int
            run("killed", failing(planted("llama"), 2, death), samples((9,) * 9), TIMEOUT)
        Path(folder, f"said-{ranks.rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def alone():
    """What one process reports, with the threads that a rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [report(case) for case in CASES]
    finally:
        torch.set_num_threads(threads)


def ended(tmp_path, mode: str, world: int) -> tuple[list[int], list[dict]]:
    """Exit codes, and what the ranks that lived said about each failure."""
    ended = finish_ranks(start_ranks(__file__, mode, str(tmp_path), world=world), seconds=120)
    files = [tmp_path / f"said-{rank}.json" for rank in range(world)]
    said = [json.loads(path.read_text()) if path.exists() else {} for path in files]
    codes = [code for code, _ in ended]
    assert all(said) or codes[-1] == -signal.SIGKILL, ended
    return codes, said


def check_reports(tmp_path, alone, world: int) -> None:
    for number, expected in enumerate(alone):
        found = json.loads(expected)
        assert found["candidates"], "a case that finds nothing shows nothing"
        for rank in range(world):
            assert (tmp_path / f"{number}-{rank}.json").read_text() == expected, (number, rank)


def test_two_ranks_report_what_one_does_and_stop_together(tmp_path, alone):
    codes, (first, last) = ended(tmp_path, "errors", 2)
    assert codes == [0, 0]
    check_reports(tmp_path, alone, 2)
    for said in (first, last):
        assert said["texts"].startswith("InvalidInput") and "rank 1 and rank 0" in said["texts"]
        assert said["weights"].startswith("InvalidInput"), said["weights"]
    assert last["raises"].startswith("RuntimeError") and "fell off" in last["raises"]
    assert first["raises"].startswith("RankFailed")
    assert first["raises"].endswith(
        ": rank 1 stopped while reading peaks: RuntimeError: the GPU fell off"
    )
    assert last["nan"].startswith("NonFiniteActivation")
    assert "rank 1 stopped while reading peaks: NonFiniteActivation: nan in the" in first["nan"]
    assert "RuntimeError: the GPU fell off" in first["late"]
    assert first["silent"].startswith("RankFailed")
    assert "rank 0 lost the others while reading peaks" in first["silent"]
    assert "more than 5 s behind" in first["silent"] and "\n" not in first["silent"]
    assert float(first["silent"].split(" s:")[0].split()[-1]) < 2 * TIMEOUT
    assert last["silent"].startswith("RankFailed")


def test_three_ranks_report_what_one_does_and_outlive_one_that_is_killed(tmp_path, alone):
    codes, said = ended(tmp_path, "killed", 3)
    assert codes == [0, 0, -signal.SIGKILL]
    check_reports(tmp_path, alone, 3)
    for rank in (0, 1):
        found = said[rank]["killed"]
        assert found.startswith("RankFailed") and "lost the others while reading peaks" in found
        assert float(found.split(" s:")[0].split()[-1]) < 2 * TIMEOUT


def test_one_process_needs_no_group():
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert list(ranks.share([3, 4, 5], "testing")) == [3, 4, 5]
    assert ranks.gather({"a": 1}, "testing") == [{"a": 1}]
    assert ranks.device("cuda") == "cuda"
    with pytest.raises(InvalidInput, match="not initialised"):
        Ranks.of_group()
    for timeout in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="timeout"):
            Ranks.from_environment(timeout)
    with pytest.raises(ValueError, match="own"), ranks.together("testing"):
        raise ValueError("own")


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_work_is_given_out_once_and_evenly(monkeypatch, count, size):
    monkeypatch.setattr(Ranks, "_beat", lambda ranks, step: beats.append(ranks.rank))
    beats: list[int] = []
    every = [Ranks(rank, size) for rank in range(size)]
    shared = [list(ranks.share(list(range(count)), "testing")) for ranks in every]
    stretches = [ranks.stretch(list(range(count))) for ranks in every]
    for ranks, mine in zip(every, stretches):
        assert list(ranks.in_rounds(mine, count, "testing")) == mine
    assert sorted(sum(shared, [])) == sum(stretches, []) == list(range(count))
    for given in (shared, stretches):
        assert max(map(len, given)) - min(map(len, given)) <= 1
    assert len({beats.count(rank) for rank in range(size)}) == 1  # or they would not meet


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_tensors_survive_exactly(dtype):
    values = torch.tensor([[0.1, -0.0, 1e-310], [3.0, 1e30, 7.0]], dtype=torch.float64)
    if dtype.is_floating_point:
        values[1, 0] = float("nan")
    else:
        values = values.nan_to_num().clamp(-1e6, 1e6)
    values = values.to(dtype)
    for tensor in (values, values.T, values[:, :0], values[0, 1]):
        back = unpacked(json.loads(json.dumps(packed(tensor))))
        assert back.dtype == dtype and back.shape == tensor.shape
        assert torch.equal(back.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


if __name__ == "__main__":
    worker(*sys.argv[1:])
