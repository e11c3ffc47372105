"""Evaluations: intervals against NumPy, documents and rows against the scores they come from."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from swkernels.detect.perplexity import Perplexity, perplexity
from swkernels.errors import InvalidInput
from swkernels.evidence.choices import RULES, score_choices
from swkernels.evidence.evaluate import Condition, Evaluation, evaluate, interval
from swkernels.evidence.tasks import Item, Task
from swkernels.evidence.yardstick import Scores, Yardstick
from tests.cli.checkpoints import BOS, TEXT, WORDS, make_model, make_tokenizer

SIZES = [4, 4, 4, 4, 4, 4, 4, 1]


def losses(seed: int, size: int = 8, spread: float = 1.0) -> Perplexity:
    generator = np.random.default_rng(seed)
    means = 2 + spread * generator.standard_normal(size)
    counts = SIZES[-size:]
    return Perplexity(tuple(float(m * n) for m, n in zip(means, counts)), tuple(counts), 5, 5)


def tasks() -> list[Task]:
    generator = np.random.default_rng(5)
    items = tuple(
        Item(
            f"q{number}",
            (" ".join(generator.choice(WORDS, 3)),),
            tuple(f" {word}" for word in generator.choice(WORDS, 3, replace=False)),
            int(generator.integers(3)),
        )
        for number in range(20)
    )
    return [Task("words", items, "made up")]


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(make_tokenizer()(TEXT * 10)["input_ids"])


@pytest.fixture(scope="module")
def yardstick(tokens):
    return Yardstick(
        tokens, window=32, batch_size=2, tasks=tasks(), tokenizer=make_tokenizer(),
        stop_words=("the", "of", ","), source="a text",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(yardstick):
    """Two models by one yardstick, side by side."""
    first = evaluate(make_model(initializer_range=0.4), yardstick, name="first")
    second = evaluate(make_model(initializer_range=0.5), yardstick, which="other")
    return first.beside(second, against="other")


def test_the_interval_is_that_of_drawn_windows():
    """Its ends, found by drawing in another way: how often each window comes, by multinomials."""
    found = losses(1)
    low, high = interval(found)
    times = np.random.default_rng(9).multinomial(8, [1 / 8] * 8, 40_000)  # [draws, windows]
    drawn = (times @ np.array(found.losses)) / (times @ np.array(found.tokens))
    expected = np.exp(np.percentile(drawn, (2.5, 97.5)))
    assert [low, high] == pytest.approx(expected, rel=0.03)
    assert low < found.value < high
    assert interval(found) == (low, high) != interval(found, seed=1)


def test_the_interval_of_a_ratio_is_paired():
    one = losses(1)
    other = replace(one, losses=tuple(loss + 0.1 * n for loss, n in zip(one.losses, one.tokens)))
    assert interval(other, one) == pytest.approx([math.exp(0.1)] * 2)
    wide, narrow = interval(one), interval(losses(2, spread=0.01), losses(3, spread=0.01))
    assert narrow[1] / narrow[0] < wide[1] / wide[0]


def test_intervals_that_there_are_not():
    assert interval(losses(1, size=1)) is None
    broken = replace(losses(1), losses=(math.nan, *losses(1).losses[1:]))
    assert all(map(math.isnan, interval(broken)))
    assert all(map(math.isnan, interval(replace(broken, losses=(math.inf,) * 8))))


def test_the_scores_are_those_of_the_measures(yardstick, tokens):
    model = make_model(initializer_range=0.4).train()
    seen = []
    found = evaluate(model, yardstick, name="tiny", progress=lambda *at: seen.append(at))
    assert model.training
    assert found.scores.perplexity == perplexity(model, tokens, window=32, batch_size=2)
    choices = score_choices(model, make_tokenizer(), tasks()[0])
    assert found.scores.choices == {"words": choices}
    assert found.scores.stop_words.words == ("the", "of", ",")
    assert ("words", 20, 20) in seen and ("perplexity", 5, 5) in seen
    assert found.model == "tiny" and evaluate(model, yardstick).model == "LlamaForCausalLM"
    [condition] = found.conditions
    assert condition.bytes == sum(p.nbytes for p in model.parameters()) + 64  # rotary frequencies


def test_the_document(pair, tokens, tmp_path):
    first, second = (condition.scores for condition in pair.conditions)
    pair.save(tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["schema"] == "swkernels.eval/2" and found["model"] == "first"
    assert (found["text"], found["tokens"], found["window"]) == ("a text", len(tokens), 32)
    assert found["against"] == "other"
    one, other = found["results"]
    assert (one["which"], other["which"]) == ("model", "other")
    assert one["losses"] == list(first.perplexity.losses)
    assert [one["ratio"], one["ratio_error"]] == list(first.perplexity.ratio(second.perplexity))
    assert one["ratio_interval"] == list(interval(first.perplexity, second.perplexity))
    assert (other["ratio"], other["ratio_interval"]) == (1.0, [1.0, 1.0])
    compared = first.choices["words"].compare(second.choices["words"])
    assert one["choices"]["words"]["compared"]["identical"] == compared.identical
    assert one["stop_words"]["mean"] == first.stop_words.mean
    pair.save(tmp_path / "again.json")
    assert (tmp_path / "e.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_rows(pair):
    rows = pair.rows()
    assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"
    measures = [(row["which"], row["measure"], row["rule"]) for row in rows]
    of_one = [("perplexity", None), *(("words", rule) for rule in RULES), ("stop words", None)]
    assert measures == [(which, *m) for which in ("model", "other") for m in of_one]
    first, second = (condition.scores for condition in pair.conditions)
    for row, other in zip(rows[1:4], rows[6:9]):
        scores = replace(first.choices["words"], rule=row["rule"])
        assert row["value"] == first.choices["words"].accuracy_by(row["rule"])
        assert (row["low"], row["high"]) == scores.interval
        assert row["compared"] == pytest.approx(row["value"] - other["value"])
        assert row["compared_low"] <= row["compared"] <= row["compared_high"]
        assert other["compared"] == other["compared_low"] == other["compared_high"] == 0
    assert rows[0]["value"] == first.perplexity.value
    assert rows[0]["compared"] == pytest.approx(first.perplexity.value / second.perplexity.value)
    frame = pytest.importorskip("pandas") and pair.to_dataframe()
    assert list(frame["value"]) == [row["value"] for row in rows]


def test_alone_nothing_is_compared(pair):
    alone = replace(pair, conditions=pair.conditions[:1], against=None)
    assert all(row["compared"] is None for row in alone.rows())
    [entry] = alone.to_dict()["results"]
    assert entry["ratio"] is None and entry["choices"]["words"]["compared"] is None


def test_words_and_bytes_need_a_prefix(tokens):
    model, text = make_model(initializer_range=0.4), TEXT * 10
    rolling = Yardstick(tokens, window=32, prefix=BOS)
    found = evaluate(model, rolling, text=text)
    loss = sum(perplexity(model, tokens, window=32, prefix=BOS).losses)
    [row] = [row for row in found.rows() if row["measure"] == "word_perplexity"]
    assert row["value"] == pytest.approx(math.exp(loss / (len(text.split()) + 1)))
    assert found.to_dict()["results"][0]["bits_per_byte"] == pytest.approx(
        loss / len(text) / math.log(2)
    )
    assert evaluate(model, rolling).conditions[0].by_text is None
    with pytest.raises(InvalidInput, match="measure with a prefix"):
        evaluate(model, Yardstick(tokens, window=32), text=text)


def test_losses_that_are_not_finite(yardstick, tmp_path):
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    found = evaluate(broken, yardstick)
    [entry] = found.to_dict()["results"]
    assert entry["not_finite"] == 5 and math.isnan(entry["perplexity"])
    assert entry["choices"]["words"]["not_finite"] == 20
    found.plot(tmp_path / "broken.svg")
    intact = evaluate(make_model(), yardstick, which="intact")
    [_, row] = [row for row in intact.beside(found).rows() if row["measure"] == "perplexity"]
    assert math.isnan(row["value"]) and math.isnan(row["low"])
    with pytest.raises(InvalidInput, match="not finite"):
        evaluate(broken, yardstick, strict=True)


def test_what_cannot_stand_side_by_side(pair, tokens):
    other = evaluate(make_model(), Yardstick(tokens, window=16), which="third")
    with pytest.raises(InvalidInput, match="different yardsticks"):
        pair.beside(other)
    with pytest.raises(InvalidInput, match="different names.*got model, other, model, other"):
        pair.beside(pair)
    with pytest.raises(InvalidInput, match="'gone' among them"):
        pair.beside(against="gone")


def test_without_a_yardstick_it_has_a_size():
    found = evaluate(make_model(), None)
    assert found.scores == Scores() and found.rows() == []
    [entry] = found.to_dict()["results"]
    assert entry["perplexity"] is None and entry["choices"] == {} and entry["bytes"] > 0


def test_the_figure(pair, tokens, tmp_path):
    for suffix in (".png", ".svg"):
        pair.plot(tmp_path / f"figure{suffix}")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "window" in drawn and (tmp_path / "figure.png").stat().st_size > 10_000
    pair.plot(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn
    apart = evaluate(make_model(initializer_range=0.01), Yardstick(tokens, window=16))
    sure = evaluate(make_model(initializer_range=0.6), Yardstick(tokens, window=16), which="sure")
    sure.beside(apart).plot(tmp_path / "log.svg")
    assert "mathdefault" not in (tmp_path / "log.svg").read_text()
    tall = pair.height
    assert tall > replace(pair, conditions=pair.conditions[:1], against=None).height
    without = Evaluation("x", {}, (Condition("model", Scores(), None, 8),))
    with pytest.raises(InvalidInput, match="nothing to draw"):
        without.plot(tmp_path / "nothing.png")
