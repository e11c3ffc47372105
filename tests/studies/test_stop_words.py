"""``stop-words``: softmax by hand with the weight zero, and the verdict."""

from __future__ import annotations

import pytest
import torch

from swkernels.studies.recipes.stop_words import runs, section
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, made, reading, verdicts
from tests.studies.tiny import PLAN

BEFORE, AFTER = runs(PLAN)
CLAIM = "Stop words become likelier without the super weights."


def test_probabilities_by_hand(planted, data, tmp_path):
    found = tiny.run(["stop-words"], planted, data, tmp_path / "out")
    hand = Checkpoint(planted, data)
    comma = hand.tokenizer(",", add_special_tokens=False)["input_ids"][0]
    means = []
    for run, value in ((BEFORE, 10.0), (AFTER, 0.0)):
        hand.down(1)[5, 7] = value
        each = [hand.logits(ids)[:-1].softmax(-1)[:, comma] for ids in hand.windows]
        means.append(float(torch.cat(each).mean()))
        words = found(run)["stop_words"]
        assert words["probabilities"][","] == pytest.approx(means[-1], rel=1e-5)
        place = list(words["probabilities"]).index(",")
        sums = [window[place] for window in words["windows"]]
        assert sums == pytest.approx([float(part.sum()) for part in each], rel=1e-5)
    page = (tmp_path / "out" / "README.md").read_text()
    ratio = means[1] / means[0]
    assert f"| `,` | {means[0]:.4g} | {means[1]:.4g} | ×{ratio:.4g} [" in page and "| ×10 |" in page
    assert "left out: `was`" in page
    assert (tmp_path / "out" / "figures" / "stop-words.svg").exists()


def _words(windows: list[list[float]]) -> dict:
    names = ["the", ","]
    means = [sum(column) / 400 for column in zip(*windows)]
    return {
        "probabilities": dict(zip(names, means)),
        "mean": sum(means) / 2,
        "predictions": 400,
        "left_out": [],
        "windows": windows,
    }


@pytest.mark.parametrize(
    "after, expected",
    [
        ([[8.0, 4.0], [10.0, 5.0], [9.0, 4.0], [9.0, 5.0]], True),
        ([[2.0, 1.0], [2.5, 1.0], [2.0, 1.2], [2.2, 1.0]], False),
        ([[8.0, 1.0], [2.0, 1.0], [4.0, 3.0], [4.0, 2.0]], None),
        ([[0.0, 0.0]] * 4, None),
    ],
)
def test_verdict(after, expected):
    before = [[4.0, 2.0], [5.0, 2.0], [4.0, 2.4], [4.4, 2.0]]
    losses = [3.0, 3.1, 2.9, 3.0]
    said = section(
        made(
            {
                BEFORE: reading(losses, stop_words=_words(before)),
                AFTER: reading(losses, stop_words=_words(after)),
            }
        )
    )
    assert verdicts(said) == {CLAIM: expected}
    if expected:
        table = said.parts[0]
        assert table.rows[0][3].startswith(f"×{36 / 17.4:.4g} [")
        assert table.rows[0][4] == "×2" and "`the`, `,`" in said.verdicts[0].why


def test_nothing_to_say_before_both_ran():
    one = reading([3.0, 3.1], stop_words=_words([[4.0, 2.0], [5.0, 2.0]]))
    assert section(made({BEFORE: one})) is None
