"""Several processes report what one does, bit for bit, and stop together where one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # a rank
    sys.path.insert(0, str(Path(__file__).parents[2]))

from swkernels.detect.ranks import Ranks
from swkernels.detect.scan import scan
from swkernels.detect.tensor_bytes import packed, unpacked
from swkernels.errors import InvalidInput, SwkernelsError
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


def worker(folder: str) -> None:
    import torch.distributed as dist

    def write_reports(ranks: Ranks) -> None:
        for number, case in enumerate(CASES):
            path = Path(folder, f"{number}-{ranks.rank}-of-{ranks.size}.json")
            path.write_text(report(case, ranks))

    said = {}

    def run(name: str, model, lengths, timeout: float = 60.0) -> None:
        with Ranks.of_group(timeout) as others:
            call = lambda: scan(model, samples(lengths), ranks=others, eval_length=16)  # noqa: E731
            said[name] = said_by(call)
        Path(folder, f"said-{ranks.rank}.json").write_text(json.dumps(said))

    with Ranks.from_environment() as ranks:
        write_reports(ranks)
        pair = dist.new_group([0, 1])
        if ranks.rank < 2:
            write_reports(Ranks(ranks.rank, 2, group=pair))
        last = ranks.rank == ranks.size - 1
        run("texts", planted("llama"), (9, 9 + last))
        run("weights", tiny_model("llama", seed=last), (9, 9))
        run("raises", failing(planted("llama"), 2, raise_ if last else int), (9,) * 9)
        bad = planted("llama")
        bad.model.layers[2].mlp.down_proj.weight.data[3, 20] = float("nan") if last else 1.0
        run("nan", bad, (9,) * 5)
        # Past the first pass, of one sample a rank.
        run("late", failing(planted("llama"), 3, raise_ if last else int), (9, 9, 9))
        asleep = (lambda: time.sleep(2 * TIMEOUT)) if last else int
        run("silent", failing(planted("llama"), 2, asleep), (9,) * 12, TIMEOUT)
        death = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if last else int
        run("killed", failing(planted("llama"), 2, death), (9,) * 12, TIMEOUT)


@pytest.fixture(scope="module")
def alone():
    """What one process reports, with the threads that a rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [report(case) for case in CASES]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder with what three ranks have written, of which the last is killed in the end."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = finish_ranks(start_ranks(__file__, str(folder), world=3), seconds=120)
    assert [code for code, _ in ended] == [0, 0, -signal.SIGKILL], ended
    return folder


@pytest.fixture
def said(ended):
    """By rank, what it said about each failure."""
    return [json.loads((ended / f"said-{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_ranks_report_what_one_process_does(ended, alone, number, world):
    assert json.loads(alone[number])["candidates"], "a case that finds nothing shows nothing"
    for rank in range(world):
        assert (ended / f"{number}-{rank}-of-{world}.json").read_text() == alone[number]


@pytest.mark.parametrize("what", ["texts", "weights"])
def test_ranks_that_scan_different_things_are_refused(said, what):
    for rank in said:
        assert re.match("InvalidInput .* rank 2 and rank 0 differ in what they scan", rank[what])


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ("raises", "RuntimeError", "the GPU fell off"),
        ("nan", "NonFiniteActivation", "nan in the output of model.layers.2.mlp.down_proj"),
        ("late", "RuntimeError", "the GPU fell off"),
    ],
)
def test_an_error_of_one_rank_ends_all(said, failure, kind, message):
    *others, last = (rank[failure] for rank in said)
    assert last.startswith(kind) and message in last
    for other in others:
        found = re.match(r"RankFailed .*: rank 2 stopped while (.*?): (\w+): (.*)", other)
        step = "measuring what zeroing costs" if failure == "late" else "reading peaks"
        assert found and found[1] == step and found[2] == kind and found[3].startswith(message)
        assert "\n" not in other and seconds(other) < 30


def test_a_rank_that_falls_silent_is_waited_for_so_long(said):
    for rank in (0, 1):
        found = said[rank]["silent"]
        assert f"rank {rank} lost the others while reading peaks" in found
        assert "more than 5 s behind" in found and "\n" not in found
        assert seconds(found) < 1.9 * TIMEOUT
    assert said[2]["silent"].startswith("RankFailed")  # it finds that the others have gone


def test_the_others_outlive_a_rank_that_is_killed(said):
    for rank in (0, 1):
        found = said[rank]["killed"]
        assert found.startswith("RankFailed") and "lost the others while reading peaks" in found
        assert "a state file" in found and seconds(found) < 1.9 * TIMEOUT
    assert "killed" not in said[2]


def seconds(found: str) -> float:
    return float(re.search(r"after ([\d.]+) s", found)[1])


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
