"""Ablation: the figures are those of models changed by hand, the controls those of NumPy."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from swkernels.detect.perplexity import perplexity, tokens_of
from swkernels.errors import InvalidInput
from swkernels.evidence.ablate import KINDS, MOST, ablate
from swkernels.evidence.controls import of_equal_magnitude, of_equal_size
from swkernels.evidence.edits import Edits
from swkernels.evidence.tasks import Item, Task
from swkernels.evidence.yardstick import Yardstick
from swkernels.train import Coordinates
from tests.cli.checkpoints import TEXT, WORDS, make_model, make_tokenizer
from tests.evidence.bytes import digest

NAME, FIRST = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
WEIGHTS = {NAME: [[5, 7], [3, 4]], FIRST: [[2, 9]]}
LABELS = ["layer 1 [3, 4]", "layer 1 [5, 7]", "layer 0 [2, 9]"]
TASK = Task(
    "words",
    tuple(Item(f"{i}", ("the weight of",), (" a", " python .", " ."), i % 3) for i in range(6)),
    "by hand",
)


@pytest.fixture
def readings(monkeypatch):
    """One entry for every time that a yardstick was read."""
    calls: list[str] = []
    read = Yardstick.read
    monkeypatch.setattr(
        Yardstick, "read", lambda self, m, **k: calls.append(digest(m)) or read(self, m, **k)
    )
    return calls


def by_hand(model, condition):
    """A copy of the model without the weights of a condition."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for entry in condition.entries:
            changed.get_submodule(entry.site.name).weight[entry.row, entry.column] = 0
    return changed


def test_every_condition_is_a_model_changed_by_hand(model, yardstick):
    before = digest(model)
    result = ablate(model, WEIGHTS, yardstick, controls=2)
    assert digest(model) == before
    labels = [condition.label for condition in result.conditions]
    assert set(labels[:2]) == {"intact", "all together"} and len(set(labels)) == len(labels)
    assert sorted(labels[2:5]) == sorted(LABELS)
    assert sorted(labels[5:8]) == sorted(f"all but {label}" for label in LABELS)
    assert labels[8:] == ["random 1", "random 2", "equal magnitude 1", "equal magnitude 2"]
    intact = perplexity(model, yardstick.tokens, window=32)
    assert result.intact.scores.perplexity == intact
    for condition in result.conditions[1:]:
        expected = perplexity(by_hand(model, condition), yardstick.tokens, window=32)
        assert condition.scores.perplexity == expected
        assert condition.ratio == pytest.approx(expected.value / intact.value, rel=1e-12)
        assert condition.error == expected.ratio(intact)[1]
    assert len(result["all together"].entries) == 3
    for label in LABELS:
        (alone,), others = result[label].entries, result[f"all but {label}"].entries
        assert alone.label == label and {e.label for e in others} == set(LABELS) - {label}
    ratios = {round(condition.ratio, 9) for condition in result.conditions}
    assert len(ratios) == len(labels)  # each is a state of its own


def test_a_condition_is_measured_once(model, yardstick, readings):
    seen = []
    result = ablate(model, {NAME: [[5, 7], [3, 4]]}, yardstick, controls=0,
                    progress=lambda *step: seen.append(step))  # fmt: skip
    assert len(readings) == 4 == len(set(readings)) and seen[-1] == ("ablating", 4, 4)
    assert len(result.conditions) == 6
    for one, other in (LABELS[:2], LABELS[1::-1]):
        assert result[f"all but {one}"].scores is result[other].scores
        assert result[f"all but {one}"].entries == result[other].entries
    readings.clear()
    result = ablate(model, f"{NAME}:5:7", yardstick, controls=1)
    assert [c.kind for c in result.conditions] == ["intact", "set", "random", "magnitude"]
    assert len(readings) == 4
    readings.clear()
    ablate(model, WEIGHTS, yardstick, controls=3, restore_activation=True)
    assert len(readings) == 1 + 1 + 1 + 3 + 3 + 3 + 3
    readings.clear()
    result = ablate(model, WEIGHTS, yardstick, conditions=["all-but-one"], controls=1)
    assert len(readings) == 4 and result.conditions[1].kind == "all-but-one"


def test_sets_in_one_run_share_what_is_the_same(model, yardstick, readings):
    sets = {"pair": {NAME: [[5, 7], [3, 4]]}, "other": f"{NAME}:5:7"}
    result = ablate(model, None, yardstick, sets=sets, conditions=("set", "each", "random"),
                    controls=1)  # fmt: skip
    labels = [condition.label for condition in result.conditions]
    assert labels == [
        "intact", "pair", "pair: layer 1 [3, 4]", "pair: layer 1 [5, 7]", "pair: random 1",
        "other", "other: random 1",
    ]  # fmt: skip
    assert len(readings) == 6  # [5, 7] alone is in both
    assert result["other"].scores is result["pair: layer 1 [5, 7]"].scores
    assert [c.label for c in result.of_kind("random", "other")] == ["other: random 1"]
    drawn = {(e.row, e.column) for c in result.of_kind("random") for e in c.entries}
    assert not drawn & {(5, 7), (3, 4)}


def test_many_weights_are_taken_one_by_one_only_if_asked(model, readings):
    yardstick = Yardstick(tokens_of(TEXT, make_tokenizer(), 8))
    many = {NAME: [[row, 0] for row in range(MOST + 1)]}
    result = ablate(model, many, yardstick, controls=1)
    assert len(readings) == 4 and not result.of_kind("each")
    assert "of 17 weights they take 34 measurements" in " ".join(result.notes)
    result = ablate(model, many, yardstick, conditions="each")
    assert len(result.of_kind("each")) == 17 and not result.notes
    few = {NAME: [[row, 0] for row in range(MOST)]}
    assert len(ablate(model, few, yardstick, controls=0).of_kind("each")) == MOST


def test_random_weights_of_equal_size(model):
    with torch.no_grad():
        weight = model.get_submodule(NAME).weight
        weight[6:] = 0  # most of it
        weight[0, :40] = math.nan
    entries = Edits(model, Coordinates.of(WEIGHTS, model)).entries
    drawn = of_equal_size(entries, 40, seed=3)
    assert len(drawn) == 40
    places = set()
    for coordinates in drawn:
        assert {site.name: len(listed) for site, listed in coordinates.weights.items()} == {
            NAME: 2, FIRST: 1,
        }  # fmt: skip
        Edits(model, coordinates)  # none is zero or NaN
        for site, listed in coordinates.weights.items():
            places |= {(site.name, *place) for place in listed.tolist()}
    taken = {(name, *place) for name, listed in WEIGHTS.items() for place in listed}
    assert not places & taken and len(places) > 90
    rows = {row for name, row, _ in places if name == NAME}
    assert rows == set(range(6))
    again = of_equal_size(entries, 40, seed=3)
    assert all(a == b for a, b in zip(drawn, again))
    assert not all(a == b for a, b in zip(drawn, of_equal_size(entries, 40, seed=4)))


def test_the_last_entries_of_a_matrix_are_found(model):
    """Four are nonzero beside the set: blind draws hardly find them, and no fifth can be drawn."""
    with torch.no_grad():
        weight = model.get_submodule(NAME).weight
        kept = weight[5, 7].clone(), weight[3, 4].clone()
        weight.zero_()
        weight[5, 7], weight[3, 4] = kept
        weight[8, :4] = 1.0
    edits = Edits(model, Coordinates.of({NAME: WEIGHTS[NAME]}, model))
    for coordinates in of_equal_size(edits.entries, 20, seed=0):
        listed = next(iter(coordinates.weights.values())).tolist()
        assert len(listed) == 2 and all(row == 8 and column < 4 for row, column in listed)
    with torch.no_grad():
        weight[8, 1:4] = 0
    with pytest.raises(InvalidInput, match=f"{NAME} has 1 nonzero entries beside the set"):
        of_equal_size(edits.entries, 1, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_of_equal_magnitude(model, dtype, monkeypatch):
    """The pool of each is what a sort of all magnitudes gives; blocks do not matter."""
    monkeypatch.setattr("swkernels.evidence.controls._BLOCK", 48 * 5)
    model = model.to(dtype)
    coordinates = Coordinates.of({**WEIGHTS, FIRST: [[2, 9], [4, 4]]}, model)
    entries = Edits(model, coordinates).entries
    sizes, places = [], []
    for name in (FIRST, NAME):
        matrix = model.get_submodule(name).weight.detach().float().abs().numpy()
        sizes.append(matrix.flatten())
        places += [(name, *map(int, place)) for place in np.ndindex(matrix.shape)]
    sizes = np.concatenate(sizes)
    taken = {(e.site.name, e.row, e.column) for e in entries}
    free = np.array([place not in taken for place in places]) & (sizes > 0)
    near = {}
    for entry in entries:
        distance = np.where(free, np.abs(sizes - np.float32(abs(entry.value))), np.inf)
        near[entry] = distance, np.sort(distance)[99 + len(entries)]
    drawn = of_equal_magnitude(model, entries, 60, seed=1)
    seen = set()
    for found, matched in drawn:
        listed = [
            (site.name, *place)
            for site, of_site in found.weights.items()
            for place in of_site.tolist()
        ]
        assert len(listed) == len(entries) and not set(listed) & taken
        seen |= set(listed)
        magnitudes = np.array([sizes[places.index(place)] for place in listed])
        for distance, limit in near.values():
            assert any(distance[places.index(place)] <= limit for place in listed)
        ours = np.sort([abs(e.value) for e in entries])
        theirs = np.sort(magnitudes)  # nearest in magnitude: in the same order, or nearly so
        pairs = np.minimum(ours, theirs) / np.maximum(ours, theirs)
        assert matched == pytest.approx(np.median(pairs), abs=0.1)
    assert len(seen) > 100
    # The planted weight is the largest: nothing is near, and that is said.
    largest = [e for e in entries if abs(e.value) == 10]
    [(found, matched)] = of_equal_magnitude(model, largest, 1, seed=0, exclude=entries)
    [(row, column)] = next(iter(found.weights.values())).tolist()
    name = next(iter(found.weights)).name
    size = abs(model.get_submodule(name).weight[row, column].item())
    assert matched == pytest.approx(size / 10) and matched < 0.2
    assert (sizes[free] > size).sum() < 100


def test_ties_in_magnitude_go_to_the_first(model):
    with torch.no_grad():
        for name in (FIRST, NAME):
            model.get_submodule(name).weight.fill_(0.5)
    [entry] = Edits(model, Coordinates.of({FIRST: [[0, 3]]}, model)).entries
    drawn = of_equal_magnitude(model, [entry], 300, seed=0)
    flat = {48 * row + column for found, _ in drawn for (row, column) in
            next(iter(found.weights.values())).tolist()}  # fmt: skip
    assert all(next(iter(found.weights)).name == FIRST for found, _ in drawn)
    assert max(flat) == 100 and 3 not in flat and {matched for _, matched in drawn} == {1.0}


def test_too_few_to_match(model):
    with torch.no_grad():
        for name in (FIRST, NAME):
            model.get_submodule(name).weight.zero_()
        model.get_submodule(NAME).weight[5, 7] = 1.0
    entries = Edits(model, Coordinates.of({NAME: [[5, 7]]}, model)).entries
    with pytest.raises(InvalidInput, match=r"too few .* to match layer 1 \[5, 7\]"):
        of_equal_magnitude(model, entries, 1, seed=0)


def test_restored_is_the_activation_written_back_by_hand(model, yardstick):
    before = digest(model)
    result = ablate(model, f"{NAME}:5:7", yardstick, conditions=("set",), restore_activation=True)
    assert digest(model) == before
    assert [c.kind for c in result.conditions] == ["intact", "set", "restored"]
    module, peaks = model.get_submodule(NAME), []

    def keep(module, args, output):
        token = int(output[0, :, 5].abs().argmax())
        peaks.append((token, float(output[0, token, 5])))

    def write(module, args, output):
        token, value = next(following)
        if abs(value) >= 0.1 * max(abs(peak) for _, peak in peaks):
            output[0, token, 5] = value

    hook = module.register_forward_hook(keep)
    intact = perplexity(model, yardstick.tokens, window=32)
    hook.remove()
    following = iter(peaks)
    module.register_forward_hook(write)
    with torch.no_grad():
        module.weight[5, 7] = 0
    expected = perplexity(model, yardstick.tokens, window=32)
    restored, gone = result.conditions[2], result.conditions[1]
    assert restored.scores.perplexity == expected and result.intact.scores.perplexity == intact
    assert gone.scores.perplexity != expected
    assert result.activations[0]["peak"] == max((v for _, v in peaks), key=abs)
    assert result.activations[0]["sequences"] == len(peaks) == len(expected.losses)
    losses = [c.scores.perplexity.loss for c in result.conditions]
    share = (losses[1] - losses[2]) / (losses[1] - losses[0])
    assert result.recovered("all together") == {"perplexity": pytest.approx(share)}
    assert result.to_dict()["recovered"]["all together"]["perplexity"] == pytest.approx(share)
    assert f"recovers {share:.0%} of the loss" in str(result)


def test_tasks_and_stop_words(model):
    tokenizer = make_tokenizer()
    tokens = tokens_of(TEXT * 6, tokenizer)
    yardstick = Yardstick(tokens, window=32, tasks=[TASK], tokenizer=tokenizer,
                          stop_words=["the", ".", "nowhere"])  # fmt: skip
    result = ablate(model, f"{NAME}:5:7", yardstick, controls=1, restore_activation=True)
    gone = result["all together"]
    change = gone.changes()["words"]
    mine = gone.scores.choices["words"].accuracy - result.intact.scores.choices["words"].accuracy
    assert change.difference == pytest.approx(mine)
    assert gone.row()["words change"] == change.difference
    assert not result.intact.scores.choices["words"].shared  # each sequence holds its own peak

    def mean(model):
        found = []
        with torch.no_grad():
            for window in tokens.split(32):
                found.append(model(window[None]).logits[0, :-1].double().softmax(-1))
        return torch.cat(found).mean(0)

    ids = [3 + WORDS.index("the"), 3 + WORDS.index(".")]
    ratios = (mean(by_hand(model, gone)) / mean(model))[ids].tolist()
    assert list(gone.stop_words.values()) == pytest.approx(ratios, rel=1e-5)
    assert list(gone.stop_words) == ["the", "."] and abs(ratios[0] - 1) > 1e-3
    alone = ablate(model, WEIGHTS, Yardstick(tasks=[TASK], tokenizer=tokenizer), controls=1)
    assert alone.intact.ratio is None and "perplexity" not in alone.rows()[0]


def test_losses_that_are_not_finite_are_said(model, yardstick, tmp_path):
    """Without [5, 7] the layer gives NaN in windows that begin with "<s>": one of three."""
    module = model.get_submodule(NAME)

    def breaks(module, args, output):
        if module.weight[5, 7] == 0 and first[0]:
            output[:, 3] = math.nan

    def begin(module, args, kwargs):
        first[0] = int(kwargs["input_ids"][0, 0]) == 0

    first = [True]
    module.register_forward_hook(breaks)
    model.register_forward_pre_hook(begin, with_kwargs=True)
    before = digest(model)
    result = ablate(model, WEIGHTS, yardstick, controls=1, restore_activation=True)
    assert digest(model) == before
    gone, other = result["layer 1 [5, 7]"], result["layer 1 [3, 4]"]
    assert math.isnan(gone.ratio) and gone.error is None and gone.not_finite == 1
    assert math.isfinite(other.ratio) and other.not_finite == 0
    assert gone.row()["not finite"] == 1 and "not finite" not in other.row()
    assert "all together: 1 scores are not finite" in str(result)
    assert result.recovered("all together") == {}
    result.save(tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())["conditions"]
    assert [c["ratio"] for c in found if c["label"] == "layer 1 [5, 7]"] == ["NaN"]
    result.plot(tmp_path / "a.png")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_it_the_model_is_as_it_was(model, yardstick, monkeypatch, error):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, hooks = digest(model), [len(m._forward_hooks) for m in model.modules()]
    for last in range(1, 14, 2):
        forwards = []

        def fails(module, args, forwards=forwards, last=last):
            forwards.append(1)
            if len(forwards) == 2 * last:  # of three windows: in the middle of some condition
                raise error

        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fails)
        with pytest.raises(error):
            ablate(model, WEIGHTS, yardstick, controls=1, restore_activation=True)
        handle.remove()
        assert digest(model) == before
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_document_rows_and_figure(model, yardstick, tmp_path):
    result = ablate(model, WEIGHTS, yardstick, controls=2, restore_activation=True, name="a/b")
    found = result.to_dict()
    assert found["schema"] == "swkernels.ablate/1" and found["model"] == "a/b"
    assert found["seed"] == 42 and found["measures"]["tokens"] == len(yardstick.tokens)
    assert {(w["row"], w["column"]) for w in found["sets"]["all together"]} == {
        (5, 7), (3, 4), (2, 9),
    }  # fmt: skip
    assert {c["kind"] for c in found["conditions"]} == set(KINDS)
    matched = [c["matched"] for c in found["conditions"] if c["kind"] == "magnitude"]
    assert len(matched) == 2 and all(0 < match <= 1 for match in matched)
    assert len(found["activations"]) == 3  # channels
    json.dumps(found)
    frame = result.to_dataframe()
    assert len(frame) == len(result.conditions) and frame["ratio"].iloc[0] == 1
    assert "Random weights of the same matrices: x" in found["summary"]
    gone = result["all together"]
    assert f"perplexity x{gone.ratio:.4g} ± {gone.error:.2g}." in found["summary"]
    kinds = [c.kind for c, row in zip(result.conditions, result.rows()) if "matched" in row]
    assert kinds == ["magnitude"] * 2
    for suffix in ("png", "svg"):
        result.plot(tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").stat().st_size > 10_000
    drawn = (tmp_path / "a.svg").read_text()
    assert "all together, activation restored" in drawn and drawn.count("-- random --") == 1


def test_the_same_seed_gives_the_same(model):
    yardstick = Yardstick(tokens_of(TEXT, make_tokenizer(), 8))
    first, second, third = (
        ablate(model, WEIGHTS, yardstick, conditions=("random", "magnitude"), controls=1, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.rows() == second.rows() != third.rows()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": None}, "no weights are named"),
        ({"conditions": ["set", "nosuch"]}, "unknown condition 'nosuch': expected some of intact"),
        ({"controls": -1}, "controls must be a number of draws from 0, got -1"),
        ({"controls": 1.5}, "got 1.5"),
        ({"sets": {"all together": WEIGHTS}}, "a set cannot be called 'all together'"),
        ({"weights": "7:0:0"}, "no down projection in layer 7"),
        ({"weights": f"{NAME}:0:99"}, "lies outside"),
    ],
)
def test_bad_arguments_measure_nothing(model, yardstick, readings, options, words):
    before = digest(model)
    with pytest.raises(InvalidInput, match=words) as error:
        ablate(model, **({"weights": WEIGHTS, "yardstick": yardstick} | options))
    assert "\n" not in str(error.value) and not readings and digest(model) == before


def test_tied_weights_are_noted(yardstick):
    model = make_model(tie_word_embeddings=True)
    result = ablate(model, "lm_head:4:4", yardstick, conditions=["set"])
    assert len(result.notes) == 1 and "change together" in result.notes[0]


def test_a_broken_model_is_an_error(model, yardstick):
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(InvalidInput, match="not finite"):
        ablate(model, WEIGHTS, yardstick)
