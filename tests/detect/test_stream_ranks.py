"""Ranks that share samples, or layers, report what one process reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from swkernels.detect.loading import quiet
from swkernels.detect.ranks import Ranks
from swkernels.detect.stream_peaks import split_by_size
from swkernels.detect.streamed import scan_stream
from swkernels.errors import InvalidInput
from tests.detect.planting import plant
from tests.models.tiny import tiny_model, token_ids
from tests.processes import run_ranks

MODELS = ("llama", "mixtral", "t5")
LOOSE = dict(
    prominence=1.5, share=0.01, max_candidates=4, methods=("dominance", "outlier"),
    outlier_gamma=2.0, eval_tokens=60, eval_length=24,
)  # fmt: skip
# samples, batch size: uneven shares, more ranks than batches
SPLITS = ((5, 1), (5, 2), (1, 1))


def report(folder: Path, samples: int, batch_size: int, ranks=None, **options) -> dict:
    found = scan_stream(
        folder, token_ids(samples, 24), device="cpu", ranks=ranks, batch_size=batch_size,
        **options, **LOOSE,
    ).to_dict()  # fmt: skip
    del found["created"], found["model"]
    return json.loads(json.dumps(found))


def rank(folder: str) -> None:
    folder = Path(folder)
    with Ranks.from_environment(timeout=60) as ranks:
        found = {}
        for name in MODELS:
            for samples, batch_size in SPLITS:
                for by_layers in (False, True):
                    key = f"{name} {samples} {batch_size} {by_layers}"
                    found[key] = report(
                        folder / name, samples, batch_size, ranks, by_layers=by_layers, budget=0
                    )
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


def test_ranks_report_what_one_process_does(tmp_path):
    for name in MODELS:
        model = tiny_model(name)
        plant(model, layer=1, rows=2, seed=3)
        with quiet():
            model.save_pretrained(tmp_path / name)
    run_ranks(__file__, str(tmp_path))
    every = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert every[0] == every[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: how sums are split shows in the last bit
    try:
        for name in MODELS:
            for samples, batch_size in SPLITS:
                expected = report(tmp_path / name, samples, batch_size)
                assert expected["candidates"]
                for by_layers in (False, True):
                    found = every[0][f"{name} {samples} {batch_size} {by_layers}"]
                    assert found == expected, (name, samples, batch_size, by_layers)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("sizes", "count", "starts"),
    [
        ([1, 1, 1, 1], 2, [0, 2]),
        ([1] * 5, 1, [0]),
        ([1] * 3, 3, [0, 1, 2]),
        ([8, 1, 1, 1, 1], 2, [0, 1]),
        ([1, 1, 1, 1, 8], 2, [0, 4]),
        ([0, 0, 5], 3, [0, 1, 2]),
    ],
)
def test_layers_are_split_by_size(sizes, count, starts):
    assert split_by_size(sizes, count) == starts


def test_more_ranks_than_layers():
    with pytest.raises(InvalidInput, match="3 ranks cannot share 2 blocks"):
        split_by_size([1, 1], 3)


if __name__ == "__main__":
    rank(*sys.argv[1:])
