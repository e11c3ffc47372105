"""Stop words: which tokens they are, and their probability against lines of float64."""

import math

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.evidence.stop_words import STOP_WORDS, StopWordMeter, StopWords
from tests.cli.checkpoints import VOCABULARY, WORDS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class Bytes:
    """Every character is a token, spaces too."""

    unk_token_id = None

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        ids = [ord(c) for c in text]
        return {"input_ids": [1000 if i == ord(".") else i for i in ids]}


def test_words_are_tokens_of_the_tokenizer(tokenizer):
    meter = StopWordMeter(tokenizer)
    assert meter.tokens == {w: 3 + WORDS.index(w) for w in STOP_WORDS if w in WORDS}
    assert set(meter.left_out) == {w for w in STOP_WORDS if w not in WORDS}  # unknown here
    assert {"the", ".", ","} <= set(meter.tokens) and meter.left_out


def test_words_of_several_tokens_are_left_out():
    meter = StopWordMeter(Bytes(), ["the", ".", "a"])  # " a" is two tokens
    assert meter.tokens == {".": 1000} and meter.left_out == ("the", "a")
    with pytest.raises(InvalidInput, match="no stop word is one token of Bytes, of 'the a'"):
        StopWordMeter(Bytes(), ["the", "a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_means_over_all_predictions(tokenizer, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(700, VOCABULARY) * 5).to(dtype)
    meter = StopWordMeter(tokenizer, ["the", ",", "the"])
    for part in logits.split([3, 500, 197]):
        meter(part)
    found = meter.result()
    expected = logits.double().softmax(-1).mean(0)[[3 + WORDS.index("the"), 3 + WORDS.index(",")]]
    assert found.words == ("the", ",") and found.predictions == 700
    assert found.probabilities == pytest.approx(expected.tolist(), rel=1e-6)
    assert found.mean == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found.to_dict()["probabilities"]["the"] == found.probabilities[0]
    the = logits.double().softmax(-1)[:, 3 + WORDS.index("the")]
    sums = [float(part.sum()) for part in the.split([3, 500, 197])]
    assert [window[0] for window in found.windows] == pytest.approx(sums, rel=1e-6)
    assert found.to_dict()["windows"] == [list(window) for window in found.windows]


def test_nan_is_kept_and_minus_infinity_is_impossible(tokenizer):
    meter = StopWordMeter(tokenizer, ["the", ","])
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 3 + WORDS.index("the")] = -math.inf
    meter(logits)
    assert meter.result().probabilities == (0.0, pytest.approx(1 / (VOCABULARY - 1)))
    logits[1, 0] = math.nan
    meter(logits)
    assert all(map(math.isnan, meter.result().probabilities)) and math.isnan(meter.result().mean)


def test_ratios():
    intact = StopWords(("the", ",", "."), (0.1, 0.02, 0.0), 10)
    changed = StopWords(("the", ",", "."), (0.2, 0.2, 0.1), 10)
    ratios = changed.ratios(intact)
    assert ratios["the"] == 2 and ratios[","] == pytest.approx(10) and math.isnan(ratios["."])
    with pytest.raises(InvalidInput, match="different tokenizers"):
        changed.ratios(StopWords(("the",), (0.1,), 10))


def test_errors(tokenizer):
    meter = StopWordMeter(tokenizer, ["."])
    with pytest.raises(InvalidInput, match="no prediction was measured"):
        meter.result()
    with pytest.raises(InvalidInput, match=r"token id \d+ is outside the model's vocabulary of 4"):
        meter(torch.zeros(2, 4))
