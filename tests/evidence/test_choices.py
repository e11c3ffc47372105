"""Scores of choices against a few lines of PyTorch; what follows from them against NumPy."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swkernels.errors import InvalidInput
from swkernels.evidence import bootstrap
from swkernels.evidence.choices import ChoiceScores, score_choices
from swkernels.evidence.tasks import Item, Task
from tests.cli.checkpoints import BOS, VOCABULARY, WORDS, make_model, make_tokenizer
from tests.models.tiny import tiny_model

ATTENTION = ["llama", "gpt2", "gemma3", "mixtral"]


def made_task(seed: int = 0) -> Task:
    """Items of every kind: alike and unlike choices, one context or one each, none in common."""
    draw = random.Random(seed)

    def words(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    items = [
        Item("same", ("the",), (" one", " one"), 1),
        Item("longer", ("the",), (" one two", " one two three", " one"), 0),
        Item("nothing", ("", "two"), (" one", " of one"), 1),
    ]
    for number in range(12):
        count = draw.randint(2, 5)
        choices = tuple(f" {words(1, 6)}" for _ in range(count))
        items.append(Item(f"shared {number}", (words(1, 9),), choices, draw.randrange(count)))
    for number in range(8):
        begin, rest = words(0, 9), f" {words(1, 6)}"
        contexts = tuple(f"{begin} {words(1, 2)}".strip() for _ in range(2))
        items.append(Item(f"gap {number}", contexts, (rest, rest), draw.randrange(2)))
    return Task("made", tuple(items), "test")


TASK = made_task()


def by_hand(model, tokenizer, context, continuation):
    """One choice, one sequence, float64."""
    before = tokenizer(context)["input_ids"] or [BOS]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(before) - 1 + i, token]) for i, token in enumerate(after))


@torch.no_grad()
def expected(model, tokenizer, task=TASK):
    return [[by_hand(model, tokenizer, *pair) for pair in item.pairs] for item in task.items]


def largest_difference(scores: ChoiceScores, other) -> float:
    mine = [value for sums in scores.log_likelihoods for value in sums]
    assert len(mine) == sum(len(sums) for sums in other)
    return float(np.abs(np.subtract(mine, [v for sums in other for v in sums])).max())


def sharp(model, factor: float = 3.0):
    """Far from uniform, so that a context that is lost shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def llama():
    return sharp(make_model())


@pytest.mark.parametrize("name", ATTENTION)
def test_shared_and_full_scores_are_those_by_hand(name):
    model, tokenizer = sharp(tiny_model(name)), make_tokenizer()
    by_itself, predictions = expected(model, tokenizer), set()
    for shares, size in ((True, 16), (True, 3), (False, 16), (False, 1)):
        scores = score_choices(model, tokenizer, TASK, share_prefixes=shares, batch_size=size)
        assert scores.shared is shares
        assert largest_difference(scores, by_itself) < 2e-5
        predictions.add(scores.predictions)
    assert len(predictions) == 1


# Conv and recurrent states run on from one choice into the next; ALiBi counts places in the row.
@pytest.mark.parametrize("name", ["lfm2", "recurrent_gemma", "bloom", "mpt"])
def test_a_model_that_cannot_share_is_run_in_full(name):
    model, tokenizer = sharp(tiny_model(name)), make_tokenizer()
    scores = score_choices(model, tokenizer, TASK)
    assert scores.shared is False
    assert largest_difference(scores, expected(model, tokenizer)) < 2e-5


def test_items_without_a_fork_do_not_pass_for_a_check():
    draw = random.Random(1)
    long = " ".join(draw.choices(WORDS, k=40))
    items = [Item(f"same {n}", (long,), (" one", " one"), 0) for n in range(4)]
    task = Task("t", (*items, *TASK.items), "test")
    model, tokenizer = sharp(tiny_model("lfm2")), make_tokenizer()
    scores = score_choices(model, tokenizer, task, batch_size=2)
    assert scores.shared is False
    assert largest_difference(scores, expected(model, tokenizer, task)) < 2e-5


def test_what_is_longer_than_a_sliding_window_is_run_in_full():
    model = sharp(tiny_model("mistral", sliding_window=8))
    tokenizer, seen = make_tokenizer(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is not None),
        with_kwargs=True,
    )
    scores = score_choices(model, tokenizer, TASK, batch_size=4)
    assert scores.shared and True in seen and False in seen
    assert largest_difference(scores, expected(model, tokenizer)) < 2e-5


def test_a_module_without_a_config_is_run_in_full(llama):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

        def forward(self, ids):
            return self.inner(ids).logits

    scores = score_choices(Bare(), make_tokenizer(), TASK)
    assert scores.shared is False
    assert largest_difference(scores, expected(llama, make_tokenizer())) < 2e-5


def test_sharing_runs_the_common_beginning_once(llama):
    context, choices = " ".join(WORDS[:9]), (" one two three", " two three", " three")
    task = Task("t", tuple(Item(str(n), (context,), choices, 0) for n in range(8)), "test")
    tokens, predicted = [], []
    hooks = [
        llama.model.layers[0].register_forward_pre_hook(
            lambda module, args: tokens.append(args[0].shape[0] * args[0].shape[1])
        ),
        llama.lm_head.register_forward_pre_hook(
            lambda module, args: predicted.append(args[0].shape[0] * args[0].shape[1])
        ),
    ]
    counts = []
    for shares in (True, False):
        score_choices(llama, make_tokenizer(), task, batch_size=4, share_prefixes=shares)
        counts.append((sum(tokens), sum(predicted)))
        tokens.clear(), predicted.clear()
    for hook in hooks:
        hook.remove()
    # BOS, 9 words, and of each choice all but the last token: 2 + 1 + 0.
    shared, checked = 8 * (10 + 3), 3 * 11  # a choice of three items is run in full, as a check
    assert counts[0] == (shared + checked, 8 * 4 + 3 * 2)
    assert counts[1][0] == 8 * (12 + 11 + 10)  # sorted by length: no padding
    assert counts[1][1] == 8 * (3 + 2 + 1)


def test_what_is_too_long_loses_its_beginning():
    model, tokenizer = sharp(make_model(max_position_embeddings=8)), make_tokenizer()
    item = Item("a", ("the of a is and to in weight",), (" one two three", " model python"), 0)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    scores = score_choices(
        model, tokenizer, Task("t", (item,), "test"), share_prefixes=False, batch_size=1
    )
    ids = tokenizer("the of a is and to in weight one two three")["input_ids"]
    assert seen[0] == ids[-9:-1]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[-9:-1]])).logits[0].double().log_softmax(-1)
    by_itself = float(logits[-3:].gather(1, torch.tensor(ids[-3:])[:, None]).sum())
    assert scores.log_likelihoods[0][0] == pytest.approx(by_itself, abs=1e-5)
    shared = score_choices(model, tokenizer, Task("t", (item,), "test"))
    assert largest_difference(shared, scores.log_likelihoods) < 1e-5
    with pytest.raises(InvalidInput, match="item a of t: a continuation of 9 tokens does not fit"):
        item = replace(item, continuations=(" one" * 9, " two"))
        score_choices(model, tokenizer, Task("t", (item,), "test"))


def test_an_empty_context_begins_with_bos_or_eos(llama):
    item = Item("a", ("",), (" one two", " three"), 0)
    task = Task("t", (item,), "test")
    scores = score_choices(llama, make_tokenizer(adds_bos=False, bos=False), task)  # EOS
    with torch.no_grad():
        one, two = make_tokenizer(adds_bos=False)("one two")["input_ids"]
        logits = llama(input_ids=torch.tensor([[1, one]])).logits[0].double().log_softmax(-1)
    by_itself = float(logits[0, one] + logits[1, two])
    assert scores.log_likelihoods[0][0] == pytest.approx(by_itself, abs=1e-5)
    with pytest.raises(InvalidInput, match="item a of t has an empty context"):
        score_choices(llama, make_tokenizer(adds_bos=False, bos=False, eos=False), task)


def test_what_a_tokenizer_appends_is_not_scored(llama):
    from tokenizers.processors import TemplateProcessing

    appending = make_tokenizer()
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert appending("one")["input_ids"][-1] == 1
    scores = score_choices(llama, appending, TASK)
    assert scores == score_choices(llama, make_tokenizer(), TASK)


def test_the_model_comes_back_as_it_was_and_is_run_in_eval_mode(llama):
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    runs = [score_choices(model, make_tokenizer(), TASK) for _ in range(2)]
    assert runs[0] == runs[1]
    assert [module.training for module in model.modules()] == modes


def test_progress_counts_items(llama):
    seen = []
    score_choices(
        llama, make_tokenizer(), TASK, batch_size=10, progress=lambda *pair: seen.append(pair)
    )
    assert seen == [(10, 23), (20, 23), (23, 23)]


def test_scores_that_are_not_finite(llama):
    model = make_model()
    tokenizer = make_tokenizer()
    token = tokenizer("python", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan  # whatever reads it is lost
    items = (
        Item("fine", ("the of",), (" one", " two"), 0),
        Item("lost", ("the python",), (" one", " two"), 0),
        Item("half", ("the",), (" python is", " one"), 1),
    )
    task = Task("t", items, "test")
    for shares in (True, False):
        with pytest.raises(InvalidInput, match="item (lost|half) of t has the scores .*nan"):
            score_choices(model, tokenizer, task, share_prefixes=shares)
        scores = score_choices(model, tokenizer, task, share_prefixes=shares, strict=False)
        assert scores.shared is shares
        assert scores.not_finite == 2 and scores.predictions[1:] == (-1, -1)
        assert scores.correct[1:] == (False, False)
        assert scores.accuracy == scores.correct[0] / 3
        assert [math.isfinite(v) for v in scores.log_likelihoods[2]] == [False, True]


def test_bad_arguments(llama):
    tokenizer = make_tokenizer()
    with pytest.raises(InvalidInput, match="unknown rule 'best'.*perplexity, sum, characters"):
        score_choices(llama, tokenizer, TASK, rule="best")
    with pytest.raises(InvalidInput, match="batch_size must be at least 1, got 0"):
        score_choices(llama, tokenizer, TASK, batch_size=0)
    with pytest.raises(InvalidInput, match="the task t holds no item"):
        score_choices(llama, tokenizer, Task("t", (), "test"))
    with pytest.raises(InvalidInput, match="T5.* multiple choice needs a decoder"):
        score_choices(tiny_model("t5"), tokenizer, TASK)
    with pytest.raises(InvalidInput, match="outside the model's vocabulary of 4"):
        score_choices(make_model(vocab_size=4), tokenizer, TASK)
    with pytest.raises(InvalidInput, match="LlamaModel gives no logits"):
        score_choices(llama.model, tokenizer, TASK)
    item = Item("a", ("the",), (" ", " one"), 0)
    with pytest.raises(InvalidInput, match="item a of t: the continuation ' ' has no token"):
        score_choices(llama, tokenizer, Task("t", (item,), "test"))
    assert VOCABULARY == llama.config.vocab_size


def scores_of(sums, tokens, characters, answers, **more) -> ChoiceScores:
    ids = tuple(f"item {n}" for n in range(len(answers)))
    return ChoiceScores("t", "test", ids, answers, sums, tokens, characters, **more)


HAND = scores_of(
    ((-4.0, -6.0, -9.0), (-2.0, -2.0)), ((1, 2, 2), (1, 1)), ((4, 8, 18), (2, 2)), (1, 0)
)


def test_the_rules():
    assert HAND.predictions == (1, 0)  # -4, -3, -4.5; of equals the first
    assert replace(HAND, rule="sum").predictions == (0, 0)
    assert replace(HAND, rule="characters").predictions == (2, 0)  # -1, -0.75, -0.5
    assert (HAND.accuracy, HAND.accuracy_by("sum"), HAND.accuracy_by("characters")) == (1, 0.5, 0.5)
    with pytest.raises(InvalidInput, match="unknown rule"):
        HAND.accuracy_by("best")


def resampled(values, draws=4000):
    """The percentile bootstrap as it is usually written."""
    generator = np.random.default_rng(1)
    values = np.asarray(values, dtype=float)
    means = values[generator.integers(0, len(values), (draws, len(values)))].mean(1)
    return np.percentile(means, [2.5, 97.5])


def test_the_intervals_are_those_of_resampled_items():
    right = [1] * 130 + [0] * 70
    assert bootstrap.interval(130, 200) == pytest.approx(resampled(right), abs=0.011)
    assert bootstrap.interval(130, 200) == bootstrap.interval(130, 200)
    assert len({bootstrap.interval(1300, 2000, seed) for seed in range(4)}) > 1
    assert bootstrap.interval(0, 5) == (0, 0) and bootstrap.interval(5, 5) == (1, 1)


def likeliest(gained, lost, items, difference):
    """The share that the second alone has right: of the largest likelihood, by a fine grid."""
    shares = np.linspace(max(0, -difference), (1 - difference) / 2, 400_001)[1:-1]
    parts = zip((gained, lost, items - gained - lost),
                (shares + difference, shares, 1 - 2 * shares - difference))  # fmt: skip
    return shares[np.argmax(sum(count * np.log(np.clip(p, 1e-300, 1)) for count, p in parts))]


@pytest.mark.parametrize(
    ("gained", "lost", "items"), [(25, 10, 200), (1, 0, 200), (0, 3, 50), (40, 2, 60), (3, 3, 10)]
)
def test_the_interval_of_a_difference_ends_where_the_score_is_significant(gained, lost, items):
    for end in bootstrap.paired_interval(gained, lost, items):
        share = likeliest(gained, lost, items, end)
        deviation = math.sqrt(items * (2 * share + end - end**2))
        assert abs((gained - lost - items * end) / deviation) == pytest.approx(1.96, abs=2e-3)


def test_the_interval_of_a_difference():
    changes = [1] * 25 + [-1] * 10 + [0] * 165
    low, high = bootstrap.paired_interval(25, 10, 200)
    assert (low, high) == pytest.approx(resampled(changes), abs=0.011)
    assert bootstrap.paired_interval(10, 25, 200) == pytest.approx((-high, -low))
    for items in (1, 20, 188, 200):  # where none differs: z^2 / (n + z^2), not 0
        reach = 1.96**2 / (items + 1.96**2)
        found = bootstrap.paired_interval(0, 0, items)
        assert found == pytest.approx((-reach, reach), rel=1e-4)
    low, high = bootstrap.paired_interval(14, 0, 14)
    assert 0.5 < low < 0.6 and high == 1
    assert bootstrap.paired_interval(0, 14, 14) == pytest.approx((-1, -low))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_the_interval_of_any_difference_holds_it(gained, lost, alike):
    items = gained + lost + alike
    if items:
        low, high = bootstrap.paired_interval(gained, lost, items)
        assert -1 <= low <= (gained - lost) / items <= high <= 1


def test_the_sign_test():
    assert bootstrap.sign_test(8, 2) == pytest.approx(0.109375)  # 2 * (1 + 10 + 45) / 1024
    assert bootstrap.sign_test(2, 8) == bootstrap.sign_test(8, 2)
    assert bootstrap.sign_test(0, 0) == bootstrap.sign_test(3, 3) == 1
    assert bootstrap.sign_test(0, 1200) < 1e-300


def test_two_models_are_compared_on_the_same_items():
    one, other = (
        scores_of(
            tuple((-1.0, -2.0) if first else (-2.0, -1.0) for first in right),
            ((1, 1),) * 8,
            ((1, 1),) * 8,
            (0,) * 8,
        )
        for right in ([1, 1, 1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0, 1, 1])
    )
    found = one.compare(other)
    assert (found.gained, found.lost) == (3, 1)
    assert found.difference == 0.25 == one.accuracy - other.accuracy
    assert found.identical == 0.5
    assert found.interval == bootstrap.paired_interval(3, 1, 8)
    assert found.p_value == pytest.approx(0.625)  # 2 * (1 + 4) / 16
    back = other.compare(one)
    assert (back.difference, back.gained, back.lost) == (-0.25, 1, 3)
    assert one.compare(one).interval == (0, 0)
    alike = replace(one, log_likelihoods=tuple((a - 1, b) for a, b in one.log_likelihoods))
    assert alike.compare(one).difference == 0 < alike.compare(one).interval[1]
    lost = replace(one, log_likelihoods=((math.nan, -1.0),) * 8)
    assert lost.compare(lost).identical == 0  # no prediction is like no other
    assert json.loads(json.dumps(found.to_dict()))["interval"] == list(found.interval)
    with pytest.raises(InvalidInput, match="do not hold the same items"):
        one.compare(HAND)


def test_the_document_the_rows_and_the_figure(tmp_path):
    scores = replace(HAND, log_likelihoods=((-4.0, -6.0, -math.inf), (-2.0, -2.0)))
    scores.save(tmp_path / "scores.json")
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document["schema"] == "swkernels.choices/1"
    assert document["log_likelihoods"] == [[-4, -6, "-Infinity"], [-2, -2]]
    assert document["accuracy"] == 0.5 and document["not_finite"] == 1
    assert document["accuracies"] == {"perplexity": 0.5, "sum": 0.5, "characters": 0.5}
    assert document["predictions"] == [-1, 0] and document["ids"] == ["item 0", "item 1"]
    first, second = HAND.rows()
    assert first["margin"] == 1.0 and first["correct"] and second["margin"] == 0.0
    frame = scores.to_dataframe()
    assert list(frame["correct"]) == [False, True]
    for shown in (HAND, scores):
        shown.plot(tmp_path / "scores.png")
        assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
