"""``consistency``: what spikes in each piece of text, counted by hand, and its verdicts."""

from __future__ import annotations

import pytest
import torch

from swkernels.studies.lab import DETECT
from swkernels.studies.recipes.consistency import run_of, section, zeroed
from swkernels.train import Coordinates
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, made, verdicts
from tests.studies.tiny import PLAN, TINY

RUN = run_of(PLAN)
EVERY, SETTLES = (
    "Some positions spike in every text.",
    "The tiers of consistent positions change no more after about 100 texts.",
)


def test_positions_are_those_that_spike(planted, data, tmp_path):
    found = tiny.run(["consistency"], planted, data, tmp_path / "out")
    figures = found(RUN)
    hand = Checkpoint(planted, data)
    ids = hand.tokenizer((data / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    passed: list[tuple] = []
    module = hand.model.model.layers[1].mlp.down_proj
    module.register_forward_hook(lambda _, given, y: passed.append((given[0][0], y[0])))
    seen = []  # of each piece the channel of layer 1 that stands out, and the column that makes it
    for n in range(TINY.samples):
        room = TINY.length - 1  # behind the BOS
        piece = torch.tensor([[0, *ids[n * room : (n + 1) * room]]])
        with torch.no_grad():
            hand.model(piece)
        x, y = passed.pop()  # [S, H], [S, D]
        peaks = y.abs().amax(0)  # [D]
        channel = int(peaks.argmax())
        assert peaks[channel] > 20 * peaks.median()
        token = int(y[:, channel].abs().argmax())
        products = (x[token] * hand.down(1)[channel]).abs()
        seen.append((channel, int(products.argmax())))
    assert set(seen) == {(5, 7)}
    assert figures["samples"] == TINY.samples
    (always,) = [p for p in figures["positions"] if p["count"] == TINY.samples]
    assert (always["layer"], always["row"], always["column"]) == (1, 5, 7)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| 100 % | 1 | 4 to 4 of 4 | 9 | 1000 |" in page
    assert (tmp_path / "out" / "figures" / "consistency.svg").exists()
    assert not list((tmp_path / "out").rglob("*.scan"))


def _figures(counts: list[int], samples: int, settling: list[tuple]) -> dict:
    positions = [
        {"layer": 1, "module": "m", "expert": None, "row": n, "column": 0, "count": count}
        for n, count in enumerate(counts)
    ]
    shares = {"100 %": 1, ">= 50 %": 0.5, ">= 20 %": 0.2, "any": 0}
    tiers = {tier: sum(c >= share * samples for c in counts) for tier, share in shares.items()}
    points = [
        dict(zip(("samples", "all", "half", "fifth", "any"), (n, *sizes))) for n, sizes in settling
    ]
    return {"samples": samples, "positions": positions, "tiers": tiers, "settling": points}


def _said(*arguments) -> tuple:
    section_ = section(made({RUN: _figures(*arguments)}))
    said = verdicts(section_)
    return said[EVERY], said[SETTLES], section_


def test_verdicts_and_coverage():
    sizes = (1, 2, 3, 4)
    steady = [(100, sizes), (200, sizes), (500, sizes)]
    every, settles, said = _said([500, 400, 120, 3], 500, steady)
    assert (every, settles) == (True, True)
    rows = [row[:3] for row in said.parts[0].rows]
    assert rows == [
        ["100 %", 1, "500 to 500 of 500"],
        [">= 50 %", 2, "400 to 400 of 500"],
        [">= 20 %", 3, "120 to 120 of 500"],
        ["any", 4, "3 to 3 of 500"],
    ]
    assert said.parts[0].columns[2] == "texts in which those added here spike"
    assert said.parts[0].columns[4] == "OLMo-1B: texts of 1,000"
    assert said.parts[1].rows == [[1, None, 0, 0]]
    moved = [(100, (1, 4, 5, 6)), (200, (1, 2, 5, 6)), (500, (0, 2, 5, 6))]
    every, settles, said = _said([499, 400, 120, 110, 105, 3], 500, moved)
    assert (every, settles) == (False, False)
    assert ">= 50 %: 4 → 2, >= 20 %: 5 → 5 (a change by 1 counts as none)" in said.verdicts[1].why
    back = [(100, (1, 2, 3, 4)), (200, (1, 4, 4, 4)), (500, sizes)]  # there and back
    assert _said([500, 400, 120, 3], 500, back)[1] is False
    assert _said([200, 150, 50, 3], 200, moved[:2])[1] is False  # that is not too soon
    assert _said([200, 150, 50, 3], 200, steady[:2])[:2] == (True, None)  # too soon to say
    # Those of all and of any move as they must, and a middle one by 1.
    outer = [(100, (3, 2, 2, 1)), (200, (2, 2, 3, 3)), (500, sizes)]
    settles, said = _said([500, 400, 120, 3], 500, outer)[1:]
    assert settles is True
    assert "that of 100 % can only shrink" in said.verdicts[1].why
    assert "100 %: 3 → 1, any: 1 → 4." in said.verdicts[1].why
    assert _said([200, 150, 50, 3], 200, outer[:2])[1] is None
    assert _said([20, 10], 20, [(20, (1, 2, 2, 2))])[:2] == (None, None)


def test_confidence_is_for_all_that_were_selected_from():
    """Each of many that spike a little too seldom has a chance to be seen in every text."""
    many = [60] * 3 + [40] * 37
    every, _, said = _said(many, 60, [(60, (3, 40, 40, 40))])
    assert every is None  # 0.05 ** (1 / 60) is above 95 %
    least = (0.05 / 40) ** (1 / 60)
    why = said.verdicts[0].why
    assert f"at least {100 * least:.1f} % of all texts" in why
    assert "selected among the 40 that spike in any text" in why
    assert _said([60], 60, [(60, (1, 1, 1, 1))])[0] is True


def test_which_of_them_were_detected():
    figures = _figures([4, 4, 1], 4, [(4, (2, 2, 3, 3))])
    place = {"layer": 1, "module": "m", "expert": None, "column": 0, "weight": 2.0}
    listed = [
        place | {"row": 1, "verdict": "super weight"},
        place | {"row": 2, "verdict": "part of a critical set"},
    ]
    table = section(made({RUN: figures, DETECT: {"super_weights": listed}})).parts[1]
    assert table.rows == [[1, None, 0, 0, None], [1, None, 1, 0, "super weight"]]
    assert table.columns[-1] == "detected as"
    assert "Of the 2 detected super weights 1 are among these 2: 1 spike" in table.caption
    given = section(made({RUN: figures, DETECT: {"super_weights": None}})).parts[1]
    assert given.rows == [[1, None, 0, 0], [1, None, 1, 0]] and "detected" not in given.caption


def test_nothing_to_say_before_it_ran():
    assert section(made({})) is None


INERT = "Positions that spike in every text but are no super weights are harmless when zeroed."


def test_spikes_are_zeroed_by_hand(planted, data, tmp_path):
    hand = Checkpoint(planted, data)
    intact = hand.losses()
    none = tiny.run(["consistency"], planted, data, tmp_path / "none")(zeroed(PLAN))
    assert none["positions"] == 0 and none["each"] == [] and none["together"] is None
    assert none["intact"]["losses"] == pytest.approx(intact, rel=1e-5)
    other = Coordinates.of({"model.layers.0.mlp.down_proj": [[1, 2]]}, hand.model)
    figures = tiny.run(
        ["consistency"], planted, data, tmp_path / "out", super_weights=other
    )(zeroed(PLAN))  # fmt: skip
    (one,) = figures["each"]
    weight = one["weight"]
    assert (weight["layer"], weight["row"], weight["column"]) == (1, 5, 7)
    hand.down(1)[5, 7] = 0
    without = hand.losses()
    assert figures["intact"]["losses"] == pytest.approx(intact, rel=1e-5)
    assert one["perplexity"]["losses"] == pytest.approx(without, rel=1e-5) != intact
    assert figures["together"] == one["perplexity"] and figures["positions"] == 1
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"| 1 |  | 5 | 7 | {weight['value']:.4g} | ×" in page


def _zeroed(*more: float, together: float = 0.0, positions: int | None = None) -> dict:
    """Figures where each position costs so many nats a token, over four windows that agree."""

    def perplexity(extra):
        losses = [(3.0 + extra + 0.001 * n) * 100 for n in range(4)]
        return {"losses": losses, "tokens": [100] * 4}

    each = [
        {
            "weight": {"layer": n, "expert": None, "row": 0, "column": 1, "value": 2.0},
            "perplexity": perplexity(extra),
        }
        for n, extra in enumerate(more)
    ]
    return {
        "positions": len(more) if positions is None else positions,
        "intact": perplexity(0.0),
        "each": each,
        "together": perplexity(together) if more else None,
    }


@pytest.mark.parametrize(
    ("without", "holds", "words"),
    [
        (_zeroed(0.0, 0.01, together=0.02), True, "of 2 zeroed alone 2 cost less than 5%"),
        (_zeroed(0.0, 0.3, together=1.0), False, "more cost layer 1 [0, 1] ×1.35"),
        (_zeroed(0.0, positions=3), None, "2 more were not looked at"),
    ],
)
def test_whether_spikes_are_inert(without, holds, words):
    figures = _figures([4], 4, [(4, (1, 1, 1, 1))])
    said = section(made({RUN: figures, zeroed(PLAN): without}))
    (one,) = [verdict for verdict in said.verdicts if verdict.claim == INERT]
    assert one.holds is holds and words in one.why
    assert ("all together" in one.why) is (len(without["each"]) > 1)
    table = said.parts[-1]
    assert len(table.rows) == len(without["each"]) + (len(without["each"]) > 1)


def test_nothing_is_said_of_spikes_where_there_are_none():
    said = section(made({RUN: _figures([4], 4, [(4, (1, 1, 1, 1))]), zeroed(PLAN): _zeroed()}))
    assert INERT not in verdicts(said) and len(said.parts) == 3
