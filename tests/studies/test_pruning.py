"""``pruning``: sets zeroed by hand, magnitudes by sorting, and its verdicts."""

from __future__ import annotations

import math

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.studies.recipes import consistency
from swkernels.studies.recipes.pruning import RANK, readings, section
from swkernels.studies.sets import CATALOGUE, MAGNITUDE, OTHERS, RANDOM, SUPER_WEIGHTS
from swkernels.train import CatalogueEntry, published
from tests.studies import tiny
from tests.studies.by_hand import Checkpoint, made, reading, verdicts
from tests.studies.made_up import verdict
from tests.studies.tiny import PLAN

RUNS = readings(PLAN)
PLACE = ("layer", "row", "column")


@pytest.fixture(scope="module")
def ran(planted, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("pruning")
    return tiny.run(["pruning"], planted, data, output), (output / "README.md").read_text()


def _places(figures: dict) -> list[tuple]:
    return [tuple(weight[key] for key in PLACE) for weight in figures["weights"]]


@pytest.mark.parametrize("name", [SUPER_WEIGHTS, OTHERS, f"{RANDOM} 42", f"{RANDOM} 43"])
def test_readings_are_of_the_model_without_the_weights(ran, planted, data, name):
    figures, hand = ran[0](RUNS[name]), Checkpoint(planted, data)
    for layer, row, column in _places(figures):
        hand.down(layer)[row, column] = 0
    assert figures["perplexity"]["losses"] == pytest.approx(hand.losses(), rel=1e-5)
    assert figures["choices"]["ARC-Easy"]["predictions"] == hand.predictions()


def test_intact(ran, planted, data):
    figures, hand = ran[0](RUNS["intact"]), Checkpoint(planted, data)
    assert figures["weights"] == []
    assert figures["perplexity"]["losses"] == pytest.approx(hand.losses(), rel=1e-5)
    assert figures["choices"]["ARC-Easy"]["predictions"] == hand.predictions()


def test_sets(ran, planted, data):
    found, hand = ran[0], Checkpoint(planted, data)
    both = torch.stack([hand.down(0), hand.down(1)]).abs()  # [2, D, H]
    first, second = (
        tuple(int(n) for n in torch.unravel_index(place, both.shape))
        for place in both.flatten().topk(2).indices
    )
    assert first == (1, 5, 7)
    assert _places(found(RUNS[SUPER_WEIGHTS])) == _places(found(RUNS[MAGNITUDE])) == [first]
    assert _places(found(RUNS[OTHERS])) == [second]
    random = [_places(found(RUNS[f"{RANDOM} {seed}"])) for seed in (42, 43, 44)]
    assert all(layer == 1 and (1, row, column) != first for ((layer, row, column),) in random)
    assert len({tuple(places) for places in random}) == 3


def test_ranks_by_sorting(ran, planted, data):
    figures, hand = ran[0](RANK), Checkpoint(planted, data)
    kinds: dict[str, list] = {}
    for name, weight in hand.model.named_parameters():
        if "_proj" in name:
            kind = name.split(".")[-2].removesuffix("_proj")
            kinds.setdefault(kind, []).append(weight.detach().abs().flatten())
    sizes = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    every = torch.cat(list(sizes.values()))
    for top, row in zip((10, 100), figures["shares"]):
        least = every.topk(top).values[-1]
        assert row["top"] == top
        assert row["down"] == pytest.approx(int((sizes["down"] >= least).sum()) / top)
    (entry,) = figures["super_weights"]
    assert entry["rank"] == int((every > 10).sum()) + 1 > 1
    assert entry["rank_down"] == int((sizes["down"] > 10).sum()) + 1 == 1


def test_page_without_an_entry_of_the_catalogue(ran):
    found, page = ran
    assert found(RUNS[CATALOGUE]) == {"weights": None}
    assert "The catalogue has no entry" in page and "\n| catalogue |" not in page
    assert "| OLMo-1B | 2 | 13.09 → 47,951 | 60.6 % → 27.0 % | 61.6 % → 49.3 % |" in page
    before, after = (found(RUNS[name])["perplexity"]["perplexity"] for name in RUNS if name in
                     ("intact", SUPER_WEIGHTS))  # fmt: skip
    assert f"| super weights | 1 | {before:.4g} → {after:.4g}, ×{after / before:.4g} [" in page


def _entry(shape: tuple[int, int]) -> CatalogueEntry:
    module = "model.layers.{layer}.mlp.down_proj"
    return CatalogueEntry("someone/Planted", module, shape, ((0, None, 3, 4),), "C", "a test")


def test_catalogue_by_name_and_shapes(planted, data, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_entries", lambda: (_entry((32, 48)),))
    found = tiny.run(["pruning"], planted, data, tmp_path / "out")
    assert _places(found(RUNS[CATALOGUE])) == [(0, 3, 4)]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "\n| catalogue | 1 |" in page and "no entry" not in page
    monkeypatch.setattr(published, "_entries", lambda: (_entry((32, 64)),))
    found = tiny.run(["pruning"], planted, data, tmp_path / "other")
    assert found(RUNS[CATALOGUE]) == {"weights": None}


def test_a_missing_file_is_named_before_anything_is_measured(planted, data, tmp_path):
    folder = tiny.write_data(tmp_path / "data")
    (folder / "winogrande" / "test.jsonl").unlink()
    with pytest.raises(InvalidInput, match="winogrande"):
        tiny.run(["pruning"], planted, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


INTACT = [3.0, 3.1, 2.9, 3.0]
WORSE = [9.0, 9.2, 8.9, 9.1]
NOISY = [3.3, 3.1, 2.7, 3.1]
AT = [{"layer": 1, "module": "m", "expert": None, "row": 5, "column": 7}]
CLAIMS = {
    "orders": "Zeroing the super weights raises perplexity by orders of magnitude.",
    "arc": "Zeroing the super weights lowers the accuracy on ARC-Easy.",
    "magnitude": "Zeroing as many of the largest weights is harmless.",
    "others": "Zeroing the largest weights that are no super weights is harmless.",
    "random": "Zeroing as many random weights of the same matrices is harmless.",
}


def _said(gone: dict, harmless: dict) -> dict:
    figures = {run: harmless for name, run in RUNS.items() if name != CATALOGUE}
    figures |= {RUNS["intact"]: reading(INTACT), RUNS[SUPER_WEIGHTS]: gone | {"weights": AT}}
    said = verdicts(section(made(figures)))
    return {key: said[claim] for key, claim in CLAIMS.items()}


def test_verdicts():
    expected = dict.fromkeys(CLAIMS, True)
    assert _said(reading(WORSE, 0.3), reading(INTACT)) == expected
    assert _said(reading([math.inf] * 4, 0.3), reading(INTACT)) == expected
    assert _said(reading(INTACT), reading(WORSE, 0.3)) == dict.fromkeys(CLAIMS, False)
    assert _said(reading([3.0, 9.0, 3.0, 9.0], 0.58, 40), reading(NOISY)) == dict.fromkeys(CLAIMS)


def test_what_is_at_chance_cannot_fall():
    # 52 % of 400 are above 25 %, the chance of ARC-Easy, and not above the 50 % of Winogrande.
    figures = {RUNS["intact"]: reading(INTACT, 0.52)}
    figures |= {RUNS[SUPER_WEIGHTS]: reading(WORSE, 0.3), RUNS[MAGNITUDE]: reading(INTACT, 0.52)}
    said = section(made(figures))
    assert verdict(said, "accuracy on ARC-Easy").holds is True
    winogrande = verdict(said, "accuracy on Winogrande")
    assert winogrande.holds is None
    assert "The intact model, with 52.0 % [" in winogrande.why
    assert winogrande.why.endswith("is not clearly above chance, 50.0 %: it cannot fall.")
    assert verdict(said, "as many of the largest").holds is True  # by ARC-Easy alone
    assert "the intact model is not clearly above chance is left out." in said.notes[1]


def _at(*places: tuple[int, int, int]) -> list[dict]:
    return [
        {"layer": layer, "module": f"m{layer}", "expert": None, "row": row, "column": column}
        for layer, row, column in places
    ]


ONE, TWO, OTHER = (1, 5, 7), (2, 5, 8), (3, 6, 9)


@pytest.mark.parametrize(
    "places, words",
    [
        ((TWO, ONE), "This set is that of the super weights: it is the first verdict over again"),
        ((ONE, OTHER), "Of these 2, super weights are 1: what those do is in the first verdict"),
        ((OTHER,), "Of these 1, super weights are 0."),
    ],
)
def test_a_set_that_is_that_of_the_super_weights_is_no_new_evidence(places, words):
    same = reading(WORSE, 0.3)
    figures = {RUNS["intact"]: reading(INTACT)}
    figures |= {RUNS[SUPER_WEIGHTS]: same | {"weights": _at(ONE, TWO)}}
    figures |= {RUNS[name]: same | {"weights": _at(*places)} for name in (CATALOGUE, MAGNITUDE)}
    said = section(made(figures))
    assert said.verdicts[0].claim == CLAIMS["orders"]
    for claim in ("catalogue's weights", "as many of the largest"):
        why = verdict(said, claim).why
        assert words in why and ("no new evidence" in why) == (ONE in places)


def _others(after: dict, places: tuple, spikes: dict | None):
    """The verdict of large weights, by the samples of 20 in which positions spike."""
    figures = {RUNS["intact"]: reading(INTACT), RUNS[OTHERS]: after | {"weights": _at(*places)}}
    if spikes is not None:
        positions = [at | {"count": n} for place, n in spikes.items() for at in _at(place)]
        figures[consistency.run_of(PLAN)] = {"samples": 20, "positions": positions}
    return verdict(section(made(figures)), "that are no super weights")


@pytest.mark.parametrize(
    "spikes, worse, same",
    [
        (None, False, True),
        ({}, False, True),
        ({ONE: 19, TWO: 10, OTHER: 20}, False, True),
        ({ONE: 20, TWO: 9}, None, True),  # the loss may be of the first
        ({ONE: 20, TWO: 20}, None, None),
    ],
)
def test_large_weights_that_spike_in_every_text_are_super_weights(spikes, worse, same):
    for after, expected in ((reading(WORSE, 0.3), worse), (reading(INTACT), same)):
        assert _others(after, (ONE, TWO), spikes).holds is expected


def test_large_weights_are_named_with_how_often_they_spike():
    why = _others(reading(WORSE), (ONE, TWO), {ONE: 20, TWO: 10}).why
    assert "They are layer 1 [5, 7]; layer 2 [5, 8]." in why
    assert "Of these 2, 1 spike in all 20 texts of the consistency study and 2 in at least" in why
    assert "the loss may be theirs" in why
    why = _others(reading(WORSE), (ONE, TWO), {ONE: 20, TWO: 20}).why
    assert "this is no test of large weights that are none" in why
    why = _others(reading(WORSE), (ONE, TWO), None).why
    assert "They are layer 1 [5, 7]" in why and "consistency" not in why
    why = _others(reading(WORSE), tuple((n, 0, 0) for n in range(9)), None).why
    assert "layer 5 [0, 0] and 3 more." in why and "layer 6" not in why


def _ranked(ranks: list[tuple], shares: tuple[float, float]) -> dict:
    entry = {"layer": 1, "expert": None, "row": 5, "column": 7, "value": 1.0}
    return {
        "shares": [{"top": top, "down": share} for top, share in zip((10, 100), shares)],
        "sizes": {"down": 10_000},
        "super_weights": [entry | {"rank": rank, "rank_down": down} for rank, down in ranks],
    }


@pytest.mark.parametrize(
    "ranks, shares, expected",
    [
        ([(2, 1), (1, 2)], (0.8, 0.52), (False, False, True)),
        ([(1, 1), (3, 2)], (0.8, 0.5), (False, True, False)),
        ([(1, 1), (2, 3)], (0.4, 0.6), (True, False, False)),
        ([(1, 1), (None, None)], (0.4, 0.6), (True, True, False)),
    ],
)
def test_verdicts_of_ranks(ranks, shares, expected):
    said = section(made({RANK: _ranked(ranks, shares)}))
    assert [verdict.claim for verdict in said.verdicts[:2]] == [
        "Ranking the down projections by magnitude does not find the super weights.",
        "Ranking all projections by magnitude does not find the super weights.",
    ]
    assert tuple(verdict.holds for verdict in said.verdicts) == expected
    found = "are 1 of the 2 super weights" if expected[0] else "are 2 of the 2 super weights"
    assert found in said.verdicts[0].why
    assert said.parts[1].rows[0] == [10, f"{100 * shares[0]:.1f} %", "80 %"]


def test_what_published_perplexities_cannot_be_compared():
    notes = " ".join(section(made({RANK: _ranked([], (0.8, 0.52))})).notes)
    assert "Llama-3.1-8B-Instruct and of Gemma-2-9B-it are under INT8" in notes
    assert "512 tokens: by the paper it is not comparable with the other rows" in notes


def test_nothing_to_say_before_it_ran():
    assert section(made({})) is None
