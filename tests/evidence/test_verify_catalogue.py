"""Published coordinates on a checkpoint: each alone, all together, random ones beside them."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import torch

from swkernels.detect.perplexity import perplexity
from swkernels.errors import InvalidInput
from swkernels.evidence import verify_catalogue as module
from swkernels.evidence.tasks import Item, Task
from swkernels.evidence.verify_catalogue import verify_catalogue
from swkernels.evidence.yardstick import Yardstick
from swkernels.train import published
from tests.cli.checkpoints import BOS, make_model, make_tokenizer, plant
from tests.evidence.bytes import digest


@cache
def speaker(sharpness: float, copies: int = 0):
    """A model, and a text that it finds easy: drawn from its own predictions.

    It has a super weight at layer 1 [5, 7], and ``copies`` of it at [5, 8], [5, 9] and so on, which
    stand in for it.
    """
    model = make_model(initializer_range=0.3)
    plant(model)
    ids, generator = torch.tensor([[BOS]]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight *= sharpness
        mlp = model.model.layers[1].mlp
        for column in range(8, 8 + copies):
            for weight in (mlp.up_proj.weight, mlp.gate_proj.weight):
                weight[column] = weight[7]
            mlp.down_proj.weight[5, column] = mlp.down_proj.weight[5, 7]
        for _ in range(64):
            likely = model(ids).logits[0, -1].softmax(-1)
            ids = torch.cat([ids, likely.multinomial(1, generator=generator)[None]], 1)
    return model, Yardstick(ids[0], window=32)


@pytest.fixture
def spoken():
    """``speaker``, with a model of one's own."""

    def spoken(*args):
        model, yardstick = speaker(*args)
        return copy.deepcopy(model), yardstick

    return spoken


@pytest.fixture
def publish(monkeypatch):
    """The catalogue has one entry, owner/Tiny."""

    def publish(*positions, values=()):
        entry = published.CatalogueEntry(
            "owner/Tiny", "model.layers.{layer}.mlp.down_proj", (32, 48), positions, "C",
            "nobody", "a note", "", values,
        )  # fmt: skip
        monkeypatch.setattr(published, "_entries", lambda: (entry,))

    return publish


def by_hand(model, yardstick, *places) -> float:
    """The perplexity ratio with these weights zero."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, row, column in places:
            changed.model.layers[layer].mlp.down_proj.weight[row, column] = 0
    intact, zeroed = (perplexity(m, yardstick.tokens, window=32).value for m in (model, changed))
    return zeroed / intact


def test_one_super_weight_and_one_that_is_inert(publish, spoken, tmp_path):
    publish((1, None, 5, 7), (0, None, 1, 1), values=(10.0, 0.5))
    model, yardstick = spoken(3)
    before = digest(model)
    result = verify_catalogue(model, "TINY", yardstick)
    assert digest(model) == before
    expected = {
        "layer 1 [5, 7]": ("super weight", by_hand(model, yardstick, (1, 5, 7)), 10.0, True),
        "layer 0 [1, 1]": ("inert", by_hand(model, yardstick, (0, 1, 1)), 0.5, False),
    }
    assert expected["layer 1 [5, 7]"][1] > 4 and expected["layer 0 [1, 1]"][1] < 1.05
    assert len(result.entries) == 2
    for checked in result.entries:
        verdict, ratio, value, as_published = expected[checked.entry.label]
        assert (checked.verdict, checked.published) == (verdict, value)
        assert checked.as_published is as_published
        assert checked.condition.ratio == pytest.approx(ratio, rel=1e-9)
    both = by_hand(model, yardstick, (1, 5, 7), (0, 1, 1))
    assert result.together.ratio == pytest.approx(both, rel=1e-9)
    assert result.verdict == "critical set" and len(result.controls) == 6
    said = str(result)
    assert "Of the 2 published coordinates 1 is a super weight, 1 is inert when zeroed" in said
    assert "critical set" in said and "the set is what matters" not in said
    assert "Other values than published: layer 0 [1, 1]" in said

    rows = result.rows()
    assert [row["zeroed"] for row in rows[2:]] == [
        "all together",
        *(f"{kind} {number}" for kind in ("random", "equal magnitude") for number in (1, 2, 3)),
    ]
    assert result.to_dataframe()["verdict"].tolist()[2] == "critical set"
    result.save(tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["schema"] == "swkernels.catalogue-check/1" and found["summary"] == said
    assert found["published"]["note"] == "a note" and found["together"]["ratio"] == rows[2]["ratio"]
    assert {e["verdict"] for e in found["entries"]} == {"super weight", "inert"}
    assert found["ablation"]["schema"] == "swkernels.ablate/1"
    result.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_a_set_whose_weights_are_inert_alone(publish, spoken):
    publish((1, None, 5, 7), (1, None, 5, 8), (1, None, 5, 9))
    model, yardstick = spoken(3, 2)
    assert by_hand(model, yardstick, (1, 5, 7), (1, 5, 8), (1, 5, 9)) > 4
    result = verify_catalogue(model, "owner/tiny", yardstick, controls=1)
    assert [e.verdict for e in result.entries] == ["inert"] * 3
    assert [e.published for e in result.entries] == [None] * 3
    assert [e.as_published for e in result.entries] == [None] * 3
    assert result.verdict == "critical set"
    assert str(result).startswith(
        "All 3 published coordinates are inert when zeroed alone; together they are a critical "
        f"set: perplexity x{result.together.ratio:.4g}; the set is what matters."
    )


def test_one_coordinate(publish, spoken):
    publish((1, None, 5, 7))
    for (model, yardstick), verdict in (
        (spoken(3), "super weight"),
        (spoken(0.7), "mild"),
        ((make_model(initializer_range=0.3), spoken(3)[1]), "inert"),
    ):
        result = verify_catalogue(model, "tiny", yardstick, controls=1)
        [checked] = result.entries
        assert checked.verdict == result.verdict == verdict
        assert checked.condition.ratio == pytest.approx(by_hand(model, yardstick, (1, 5, 7)))
        assert f"The published coordinate layer 1 [5, 7] is {'a ' * (verdict[0] == 's')}" + (
            f"{verdict} here"
        ) in str(result)
        assert len(result.rows()) == 1 + 2


def test_a_loss_below_that_of_a_control_is_none(publish, spoken, monkeypatch):
    publish((1, None, 5, 7))
    model, yardstick = spoken(0.7)
    found = verify_catalogue(model, "tiny", yardstick, controls=1)
    assert found.verdict == "mild"
    ablate = module.ablate

    def with_a_strong_control(*args, **kwargs):
        result = ablate(*args, **kwargs)
        [at] = [i for i, c in enumerate(result.conditions) if c.kind == "random"]
        object.__setattr__(result.conditions[at], "scores", result.conditions[1].scores)
        return result

    monkeypatch.setattr(module, "ablate", with_a_strong_control)
    assert verify_catalogue(model, "tiny", yardstick, controls=1).verdict == "inert"
    found = verify_catalogue(model, "tiny", yardstick, controls=1)
    assert found.controls[0].ratio == found.together.ratio


def test_without_controls(publish, spoken):
    publish((1, None, 5, 7))
    model, yardstick = spoken(0.7)
    result = verify_catalogue(model, "tiny", yardstick, controls=0)
    assert result.verdict == "mild" and "No random weights were zeroed" in str(result)


def test_a_loss_that_is_not_finite_is_said(publish, spoken, monkeypatch):
    """Without this weight something is divided by zero."""
    publish((1, None, 5, 7), (1, None, 3, 4))
    model, yardstick = spoken(3)
    before, weight = digest(model), model.model.layers[1].mlp.down_proj.weight

    def breaks(_, __, output):
        return output / (weight[5, 7] != 0)

    model.model.layers[1].mlp.register_forward_hook(breaks)
    result = verify_catalogue(model, "tiny", yardstick, controls=1)
    assert digest(model) == before
    verdicts = {e.entry.label: e.verdict for e in result.entries}
    assert verdicts == {"layer 1 [5, 7]": "super weight", "layer 1 [3, 4]": "inert"}
    assert result.verdict == "critical set"
    assert "Losses are not finite: all together, layer 1 [5, 7]." in str(result)


def test_what_is_refused(publish, monkeypatch):
    model = make_model()
    yardstick = Yardstick(torch.arange(10), window=8)
    before = digest(model)
    publish((1, None, 5, 7))
    task = Task("t", (Item("0", ("of",), (" a", " is"), 0),), "by hand")
    for name, given, words in (
        ("else", yardstick, "the catalogue has no 'else'"),
        ("tiny", Yardstick(tasks=[task], tokenizer=make_tokenizer()), "needs a text"),
    ):
        with pytest.raises(InvalidInput, match=words):
            verify_catalogue(model, name, given)
    with pytest.raises(InvalidInput, match="controls"):
        verify_catalogue(model, "tiny", yardstick, controls=-1)
    with pytest.raises(InvalidInput, match=r"\[32, 64\].*owner/Tiny.*\[32, 48\]"):
        verify_catalogue(make_model(intermediate_size=64), "tiny", yardstick)
    publish((9, None, 5, 7))
    with pytest.raises(InvalidInput, match="layer 9"):
        verify_catalogue(model, "tiny", yardstick)
    publish((1, None, 5, 7))
    monkeypatch.setattr(Yardstick, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        verify_catalogue(model, "tiny", yardstick)
    assert digest(model) == before


def test_ctrl_c_while_weights_are_zero(publish, spoken, monkeypatch):
    publish((1, None, 5, 7))
    model, yardstick = spoken(3)
    before, seen = digest(model), []
    read = Yardstick.read

    def second_fails(self, loaded, **kwargs):
        seen.append(digest(loaded))
        return read(self, loaded, **kwargs) if len(seen) < 2 else interrupt()

    monkeypatch.setattr(Yardstick, "read", second_fails)
    with pytest.raises(KeyboardInterrupt):
        verify_catalogue(model, "tiny", yardstick)
    assert seen[0] == before != seen[1] and digest(model) == before


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt
