"""A rank is killed, the others stop; started again, all go on from their states to one report."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # a rank
    sys.path.insert(0, str(Path(__file__).parents[2]))

from swkernels.detect.ranks import Ranks
from swkernels.detect.scan import scan
from swkernels.detect.state import ScanState
from swkernels.errors import RankFailed
from tests.detect.planting import plant
from tests.models.tiny import tiny_model, token_ids
from tests.processes import finish_ranks, run_ranks, start_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch without distributed"
)
SAMPLES, DIES_AFTER = 8, 3  # forwards that the second rank runs before it dies


def planted():
    model = tiny_model("mixtral")
    plant(model, layer=1, rows=2, columns=2, seed=3)
    return model


def report(model, **options) -> dict:
    found = scan(
        model, token_ids(SAMPLES, 24), methods=("dominance", "outlier"), eval_length=24,
        null_draws=2, **options,
    ).to_dict()  # fmt: skip
    del found["created"]
    return json.loads(json.dumps(found))


def rank(folder: str, dies: str) -> None:
    folder = Path(folder)
    with Ranks.from_environment(timeout=20) as ranks:
        forwards: list[None] = []

        def count(module, arguments):
            forwards.append(None)
            if dies == "dies" and ranks.rank == 1 and len(forwards) == DIES_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

        model = planted()
        handle = model.model.layers[0].register_forward_pre_hook(count)
        notices: list[str] = []
        state = ScanState(folder / "state", 0, notice=notices.append)
        try:
            found = report(model, ranks=ranks, state=state)
        except RankFailed as error:
            (folder / f"failed-{ranks.rank}").write_text(str(error))
            raise SystemExit(3) from error
        handle.remove()
        said = {"report": found, "notices": notices}
        (folder / f"{ranks.rank}.json").write_text(json.dumps(said))


def test_a_killed_rank_and_the_way_on(tmp_path):
    ended = finish_ranks(start_ranks(__file__, str(tmp_path), "dies"), 120)
    assert [code for code, _ in ended] == [3, -signal.SIGKILL], ended
    assert "a rank has died" in (tmp_path / "failed-0").read_text()
    states = sorted(path.name for path in tmp_path.glob("state*"))
    assert states == ["state.0-of-2", "state.1-of-2"]
    run_ranks(__file__, str(tmp_path), "lives")
    said = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert all(len(found["notices"]) == 1 for found in said)
    assert "continuing at sample" in said[1]["notices"][0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    try:
        expected = report(planted())
    finally:
        torch.set_num_threads(threads)
    assert said[0]["report"] == said[1]["report"] == expected


if __name__ == "__main__":
    rank(*sys.argv[1:])
