"""``restore``: the activation put back by a hook of our own, and its verdicts."""

from __future__ import annotations

import pytest

from swkernels.studies.recipes.restore import run_of, section
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, made, reading, verdicts
from tests.studies.tiny import PLAN

RUN = run_of(PLAN)


def test_losses_by_hand(planted, data, tmp_path):
    figures = tiny.run(["restore"], planted, data, tmp_path / "out")(RUN)
    hand = Checkpoint(planted, data)
    module = hand.model.model.layers[1].mlp.down_proj
    peaks = []  # (token, value) of channel 5, of each window

    def note(_, __, y):
        token = int(y[0, :, 5].abs().argmax())
        peaks.append((token, y[0, token, 5].item()))

    handle = module.register_forward_hook(note)
    intact = hand.losses()
    handle.remove()
    hand.down(1)[5, 7] = 0
    gone = hand.losses()
    calls = iter(list(peaks))

    def put_back(_, __, y):
        token, value = next(calls)
        y = y.clone()
        y[0, token, 5] = value
        return y

    module.register_forward_hook(put_back)
    back = hand.losses()
    for kind, losses in (("intact", intact), ("set", gone), ("restored", back)):
        assert figures[kind]["perplexity"]["losses"] == pytest.approx(losses, rel=1e-5), kind
    assert gone != pytest.approx(back, rel=1e-5) and gone != pytest.approx(intact, rel=1e-2)
    (spike,) = figures["activations"]
    assert (spike["layer"], spike["row"]) == (1, 5)
    largest = max((value for _, value in peaks), key=abs)
    assert abs(spike["peak"]) >= abs(largest) * (1 - 1e-6)  # questions may peak higher
    page = (tmp_path / "out" / "README.md").read_text()
    perplexity = figures["restored"]["perplexity"]["perplexity"]
    assert f"| zero, activation put back | {perplexity:.4g} |" in page and "| 50.09 |" in page


INTACT, GONE = [3.0, 3.1, 2.9, 3.0], [9.0, 9.2, 8.9, 9.1]


@pytest.mark.parametrize(
    "back, right, expected",
    [
        ([5.0, 5.2, 4.9, 5.1], 0.45, True),
        ([9.0, 9.2, 8.9, 9.1], 0.3, None),  # as if nothing had been done
        ([9.5, 9.7, 9.4, 9.6], 0.2, False),  # worse
        ([3.001, 3.1, 2.9, 3.0], 0.6, False),  # all of it
    ],
)
def test_verdicts(back, right, expected):
    figures = {"activations": []} | {
        "intact": reading(INTACT, 0.6), "set": reading(GONE, 0.3), "restored": reading(back, right)
    }  # fmt: skip
    said = section(made({RUN: figures}))
    assert list(verdicts(said).values()) == [expected, expected]
    if expected:
        assert "66 % of the loss come back" in said.verdicts[0].why  # (9.05 - 5.05) / 6.05
        assert "50 % of the loss come back" in said.verdicts[1].why


def test_nearly_nothing_put_back_is_said_in_percent_and_chance_in_a_note():
    back = [loss - 1e-4 for loss in GONE]
    figures = {"activations": []} | {
        "intact": reading(INTACT, 0.52), "set": reading(GONE, 0.3), "restored": reading(back, 0.3)
    }  # fmt: skip
    said = section(made({RUN: figures}))
    assert said.verdicts[0].why.startswith("perplexity -0.0100 % [-0.0100, -0.0100] against the")
    assert "not clearly above chance on Winogrande" in said.notes[-1]


def test_nothing_to_say_before_it_ran():
    assert section(made({})) is None
