"""Perplexity, against a few lines of PyTorch that share nothing with it."""

from __future__ import annotations

import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from swkernels.detect.perplexity import Perplexity, perplexity, prefix_of, tokens_of, window_of
from swkernels.errors import InvalidInput
from tests.cli.checkpoints import BOS, EOS, TEXT, VOCABULARY, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=0.5)


def stream(size: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (size,), generator=torch.Generator().manual_seed(1))


def window_losses(model, tokens, window, stride):
    """Transformers' own loss of each window, with labels of -100 where a token was seen before."""
    found, seen = [], 0
    for start in range(0, len(tokens), stride):
        ids = tokens[start : start + window][None]
        end = start + ids.shape[1]
        labels = ids.clone()
        labels[:, : ids.shape[1] - (end - seen)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                found.append((float(model(input_ids=ids, labels=labels).loss) * count, count))
        seen = end
        if end == len(tokens):
            break
    return found


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [(2, 16, 16), (16, 16, 16), (17, 16, 16), (18, 16, 16), (100, 16, 16), (100, 16, 5),
     (100, 16, 15), (33, 16, 1), (700, 256, 256)],
)  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_what_pytorch_finds(model, size, window, stride, batch_size):
    tokens = stream(size)
    found = perplexity(model, tokens, window=window, stride=stride, batch_size=batch_size)
    expected = window_losses(model, tokens, window, stride)
    assert found.tokens == tuple(count for _, count in expected)
    assert found.losses == pytest.approx([loss for loss, _ in expected], rel=1e-6)
    mean = sum(loss for loss, _ in expected) / sum(count for _, count in expected)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert (found.window, found.stride) == (window, stride)


def test_every_token_is_predicted_once_where_windows_overlap(model):
    found = perplexity(model, stream(101), window=16, stride=7)
    assert sum(found.tokens) == 100
    assert sum(perplexity(model, stream(96), window=16).tokens) == 96 - 6


def rolled(size: int, window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """The inputs and the targets of lm-eval's rolling windows, as places in [prefix, *tokens]."""
    done = min(window, size)
    windows = [(list(range(done)), list(range(1, done + 1)))]
    while done < size:
        ahead = min(stride, size - done)
        targets = [done + i + 1 for i in range(ahead)]
        windows.append((list(range(targets[-1] - window, targets[-1])), targets))
        done += ahead
    return windows


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [(1, 16, 16), (15, 16, 16), (16, 16, 16), (17, 16, 16), (100, 16, 16), (100, 16, 5),
     (33, 16, 1), (700, 256, 256), (700, 256, 100)],
)  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_windows(model, size, window, stride, batch_size):
    tokens = stream(size)
    found = perplexity(
        model, tokens, window=window, stride=stride, prefix=BOS, batch_size=batch_size
    )
    text = [BOS, *tokens.tolist()]
    expected = []
    for inputs, targets in rolled(size, window, stride):
        with torch.no_grad():
            logits = model(torch.tensor([[text[i] for i in inputs]])).logits[0]
        rows = logits[-len(targets) :].log_softmax(-1)
        expected.append(-float(rows[range(len(targets)), [text[i] for i in targets]].sum()))
    assert found.losses == pytest.approx(expected, rel=1e-6)
    assert sum(found.tokens) == size
    assert (found.window, found.stride, found.prefix) == (window, stride, BOS)


@pytest.fixture
def harness():
    """lm-eval's own HFLM, made as its users make it."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval")
    return lambda model, tokenizer, **options: huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=2, **options
    )


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("window", [16, 33, 256])
def test_rolling_is_what_lm_eval_finds(model, harness, adds_bos, window):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    text = TEXT * 23
    tokens = tokens_of(text, tokenizer)
    found = perplexity(model, tokens, window=window, prefix=prefix_of(tokenizer), batch_size=3)
    lm = harness(model, tokenizer, max_length=window)
    [expected] = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    assert len(found.tokens) > 1
    assert -sum(found.losses) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 1), (16, 9), (40, 33)])
def test_rolling_windows_are_those_of_lm_eval(window, stride):
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm-eval")
    for size in (1, 15, 16, 17, 39, 40, 41, 100):
        theirs = utils.get_rolling_token_windows(
            list(range(1, size + 1)), 0, max_seq_len=window, context_len=window - stride + 1
        )
        assert list(theirs) == rolled(size, window, stride)


def test_words_and_bytes(model):
    text = "the weight of\n a model é is one . "
    tokens = tokens_of(text, make_tokenizer())
    found = perplexity(model, tokens, prefix=BOS).of_text(text)
    wikitext = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    loss = sum(perplexity(model, tokens, prefix=BOS).losses)
    counted = wikitext.process_results({"page": text}, (-loss,))
    words, size = counted["word_perplexity"][1], counted["bits_per_byte"][1]
    assert (words, size) == (len(re.split(r"\s+", text)), len(text) + 1)
    assert found == pytest.approx({
        "word_perplexity": math.exp(loss / words),
        "byte_perplexity": math.exp(loss / size),
        "bits_per_byte": loss / size / math.log(2),
    })  # fmt: skip
    with pytest.raises(InvalidInput, match="measure with a prefix"):
        perplexity(model, tokens).of_text(text)


def test_the_prefix_of_a_tokenizer():
    assert prefix_of(make_tokenizer()) == BOS
    assert prefix_of(make_tokenizer(adds_bos=False, bos=False)) == EOS
    with pytest.raises(InvalidInput, match="neither a BOS nor an EOS"):
        prefix_of(make_tokenizer(adds_bos=False, bos=False, eos=False))


@pytest.mark.parametrize(("stride", "prefix"), [(16, None), (5, None), (16, BOS), (5, BOS)])
def test_what_is_observed_is_what_is_predicted(model, stride, prefix):
    """The logits of every window, from which its loss follows."""
    tokens, seen = stream(70), []
    found = perplexity(
        model, tokens, window=16, stride=stride, prefix=prefix, batch_size=3,
        observe=lambda logits: seen.append(logits.clone()),
    )  # fmt: skip
    assert tuple(len(logits) for logits in seen) == found.tokens
    assert all(logits.shape[1:] == (VOCABULARY,) for logits in seen)
    if (stride, prefix) == (16, None):
        targets = [t[1:] for t in tokens.split(16)]
    else:
        targets = tokens[0 if prefix is not None else 1 :].split(list(found.tokens))
    losses = [
        -float(logits.log_softmax(-1)[range(len(logits)), target].sum())
        for logits, target in zip(seen, targets)
    ]
    assert found.losses == pytest.approx(losses, rel=1e-6)


def test_only_the_logits_that_are_needed(model, monkeypatch):
    """Where windows overlap, the head runs on what is predicted."""
    kept, forward = [], type(model).forward

    def spy(self, *args, logits_to_keep=0, **options):
        kept.append(logits_to_keep)
        return forward(self, *args, logits_to_keep=logits_to_keep, **options)

    spy.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", spy)
    perplexity(model, stream(26), window=16, stride=5)
    perplexity(model, stream(26), window=16, stride=5, prefix=BOS)
    perplexity(model, stream(26), window=16)
    assert kept == [0, 6, 6, 0, 5, 5, 0, 0]


def test_twice_gives_the_same_bits(model):
    assert perplexity(model, stream(99), window=16) == perplexity(model, stream(99), window=16)


def test_the_standard_error():
    losses, n = [2.0, 2.5, 1.5, 3.0], 10
    found = Perplexity(tuple(loss * n for loss in losses), (n,) * 4, 11, 11)
    means = torch.tensor(losses, dtype=torch.float64)
    assert found.loss == pytest.approx(float(means.mean()))
    expected = math.exp(means.mean()) * float(means.std() / math.sqrt(4))
    assert found.error == pytest.approx(expected, rel=1e-12)
    assert Perplexity((2.0,), (1,), 2, 2).error is None


def test_a_short_last_window_counts_by_its_tokens():
    """A window of few tokens moves neither the mean nor the error as a whole one does."""
    whole = Perplexity((20.0, 25.0, 15.0), (10, 10, 10), 11, 11)
    more = Perplexity((20.0, 25.0, 15.0, 9.0), (10, 10, 10, 1), 11, 11)
    assert more.loss == pytest.approx(69 / 31)
    assert more.error / more.value < 2 * whole.error / whole.value


def test_a_ratio_is_paired():
    a = Perplexity((20.0, 40.0, 30.0), (10, 10, 10), 11, 11)
    b = Perplexity((21.0, 41.0, 31.0), (10, 10, 10), 11, 11)
    assert b.ratio(a) == pytest.approx((math.exp(0.1), 0.0))
    value, error = Perplexity((21.0, 42.0, 30.0), (10, 10, 10), 11, 11).ratio(a)
    assert value == pytest.approx(math.exp(0.1))
    assert error == pytest.approx(math.exp(0.1) * 0.1 / math.sqrt(3))
    with pytest.raises(InvalidInput, match="different windows"):
        a.ratio(Perplexity((20.0, 40.0), (10, 10), 11, 11))


def test_what_a_document_holds(model):
    found = perplexity(model, stream(40), window=16)
    assert found.to_dict() == {
        "perplexity": found.value, "error": found.error, "loss": found.loss,
        "losses": found.losses, "tokens": found.tokens, "window": 16, "stride": 16,
        "prefix": None,
    }  # fmt: skip


def test_the_window_is_that_of_the_model_where_it_is_short(model):
    assert window_of(model) == 256
    assert window_of(make_model(max_position_embeddings=4096)) == 2048
    assert window_of(torch.nn.Linear(1, 1)) == 2048
    assert perplexity(model, stream(300)).window == 256
    config = GPT2Config(vocab_size=8, n_positions=24, n_embd=8, n_layer=1, n_head=1)
    assert window_of(GPT2LMHeadModel(config)) == 24


def test_a_model_of_ones_own_keeps_its_modes():
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(VOCABULARY, VOCABULARY)
            self.frozen = torch.nn.Dropout(0.9).eval()
            self.dropout = torch.nn.Dropout(0.9)

        def forward(self, ids):
            return self.dropout(self.embed(ids))

    model = Logits()
    tokens = stream(33)
    found = perplexity(model, tokens, window=16)
    rows = model.embed.weight[tokens[:-1]].log_softmax(-1).gather(1, tokens[1:, None])
    kept = [i for i in range(32) if i % 16 != 15]
    assert found.loss == pytest.approx(-float(rows[kept].detach().mean()), rel=1e-6)
    assert model.training and model.dropout.training and not model.frozen.training


def test_progress(model):
    seen = []
    perplexity(model, stream(100), window=16, batch_size=4, progress=lambda *n: seen.append(n))
    assert seen == [(4, 7), (6, 7), (7, 7)]


def test_tokens_of_a_text():
    tokenizer = make_tokenizer()
    whole = tokens_of(TEXT * 30, tokenizer)
    assert whole.tolist() == tokenizer(TEXT * 30)["input_ids"] and whole[0] == BOS
    assert tokens_of(TEXT * 30, tokenizer, 7).tolist() == whole[:7].tolist()
    for text, most in (("", None), ("the", 1), (" \n", None)):
        with pytest.raises(InvalidInput):
            tokens_of(text, tokenizer, most)
    with pytest.raises(InvalidInput, match="shorter than 2 tokens"):
        tokens_of("the", make_tokenizer(adds_bos=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "at least 2"),
        ({"prefix": VOCABULARY}, "outside the model's vocabulary"),
        ({"prefix": "<s>"}, "prefix must be a token's id, got str"),
        ({"prefix": BOS, "tokens": stream(0)}, r"N >= 1, got torch.int64 \[0\]"),
        ({"window": 257}, "256 positions of LlamaForCausalLM"),
        ({"stride": 0}, "stride must be from 1 to the window of 256, got 0"),
        ({"window": 16, "stride": 17}, "got 17"),
        ({"batch_size": 0}, "batch_size"),
        ({"tokens": torch.zeros(1, dtype=torch.int64)}, r"N >= 2, got torch.int64 \[1\]"),
        ({"tokens": torch.zeros(2, 8, dtype=torch.int64)}, r"\[2, 8\]"),
        ({"tokens": torch.zeros(8)}, "torch.float32"),
        ({"tokens": [1, 2]}, "got list"),
        ({"tokens": torch.tensor([0, VOCABULARY])}, "outside the model's vocabulary"),
    ],
)
def test_bad_arguments(model, change, message):
    arguments = {"tokens": stream(20)} | change
    with pytest.raises(InvalidInput, match=message) as error:
        perplexity(model, **arguments)
    assert "\n" not in str(error.value)


def test_an_encoder_and_a_decoder():
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    with pytest.raises(InvalidInput, match="needs a decoder"):
        perplexity(T5ForConditionalGeneration(config), torch.arange(8))


def spoiled(value: float):
    """A model whose logits are ``value`` wherever a window begins with token 3."""
    model = make_model(initializer_range=0.5)

    def spoil(module, args, kwargs, output):
        output.logits[kwargs["input_ids"][:, 0] == 3] = value

    model.register_forward_hook(spoil, with_kwargs=True)
    return model


def test_logits_that_are_not_finite():
    tokens = stream(64)
    tokens[::16] = torch.tensor([4, 3, 4, 4])
    seen = []
    with pytest.raises(InvalidInput, match="loss of window 1 is nan") as error:
        perplexity(spoiled(math.nan), tokens, window=16, batch_size=4)
    assert "\n" not in str(error.value)
    found = perplexity(
        spoiled(math.nan), tokens, window=16, strict=False, batch_size=2, observe=seen.append
    )
    intact = perplexity(make_model(initializer_range=0.5), tokens, window=16, batch_size=2)
    assert found.not_finite == 1 and intact.not_finite == 0 and len(seen) == 4
    assert math.isnan(found.losses[1]) and math.isnan(found.value) and math.isnan(found.error)
    assert [found.losses[i] for i in (0, 2, 3)] == [intact.losses[i] for i in (0, 2, 3)]
    assert all(map(math.isnan, found.ratio(intact)))


def test_an_infinite_loss_is_infinite():
    losses = Perplexity((20.0, math.inf, 15.0), (10, 10, 10), 11, 11)
    assert losses.value == math.inf and losses.not_finite == 1
    assert losses.error is None or not math.isfinite(losses.error)
