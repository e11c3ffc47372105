"""The same items by EleutherAI's lm-eval: its prompts, its log-likelihoods, its accuracies."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.winogrande import preprocess_winogrande
from lm_eval.utils import apply_template
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from swkernels.evidence.choices import score_choices
from swkernels.evidence.tasks import read_task
from tests.cli.checkpoints import TEXT, WORDS, make_model, make_tokenizer

# As the Hub's allenai/ai2_arc has them; what arc_easy.yaml makes of a row.
ARC_TEXT = "Question: {{question}}\nAnswer:"
PLAIN = [
    ("one two ", ["three ,", "python"], 1),  # spaces at the end of a context
    ("", ["the weight", "of python"], 0),
    ("<s>", ["the weight", "of"], 0),  # BOS as text
    ("", ["<s> the weight", "of"], 0),  # and where a prefix would stand
    (" ".join(WORDS * 4), ["is in", "the weight of a model"], 0),  # longer than the model
]


def made_rows():
    draw = random.Random(0)

    def words(least, most):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    arc = [
        {
            "id": f"arc {number}",
            "question": f"{words(2, 12)} ?",
            "choices": {"text": [words(1, 5) for _ in labels], "label": list(labels)},
            "answerKey": draw.choice(labels),
        }
        for number, labels in enumerate(["ABCD", "ABC", "1234", "ABCDE"] * 4)
    ]
    winogrande = [
        {
            "qID": f"gap {number}",
            "sentence": f"{words(0, 6)} _ {words(1, 6)} .".strip(),
            "option1": words(1, 2),
            "option2": words(1, 2),
            "answer": draw.choice("12"),
        }
        for number in range(12)
    ]
    return arc, winogrande


ARC, GAPS = made_rows()


def word_level():
    return make_model(max_position_embeddings=48), make_tokenizer()


def byte_level():
    """GPT-2 with a byte-level BPE, where a space is a part of the word behind it."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("t", "h"), ("Ġt", "h"), ("Ġth", "e"), ("o", "n"), ("Ġ", "w"), ("w", "o")]
    names = ["</s>", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert wrapped.decode(wrapped(TEXT)["input_ids"]) == TEXT
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_embd=32, n_layer=2, n_head=2, n_positions=96,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval(), wrapped


@pytest.fixture(scope="module", params=[word_level, byte_level])
def both(request):
    model, tokenizer = request.param()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # far from uniform
    return model, tokenizer, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def theirs(lm, pairs):
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def write(folder, rows):
    path = folder / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def compared(both, task, pairs):
    """Our scores and theirs, of each item."""
    model, tokenizer, lm = both
    sums = iter(theirs(lm, [pair for of_item in pairs for pair in of_item]))
    found = [[next(sums) for _ in of_item] for of_item in pairs]
    for shares in (True, False):
        scores = score_choices(model, tokenizer, task, share_prefixes=shares)
        assert scores.shared is shares
        for ours, other in zip(scores.log_likelihoods, found, strict=True):
            np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4)
    return scores, found


def test_arc(both, tmp_path):
    task = read_task(write(tmp_path, ARC))
    pairs = [
        [(apply_template(ARC_TEXT, row), f" {text}") for text in row["choices"]["text"]]
        for row in ARC
    ]
    assert [item.pairs for item in task.items] == pairs
    scores, found = compared(both, task, pairs)
    right = [row["choices"]["label"].index(row["answerKey"]) for row in ARC]
    acc = np.mean([np.argmax(sums) == gold for sums, gold in zip(found, right)])
    lengths = [[len(text) for text in row["choices"]["text"]] for row in ARC]
    norm = [np.argmax(np.divide(sums, size)) for sums, size in zip(found, lengths)]
    assert scores.accuracy_by("sum") == acc
    assert scores.accuracy_by("characters") == np.mean(np.equal(norm, right))
    assert 0 < acc < 1


def test_winogrande(both, tmp_path):
    task = read_task(write(tmp_path, GAPS))
    pairs = [
        [
            (context, f" {preprocess_winogrande.doc_to_target(row)}")
            for context in preprocess_winogrande.doc_to_choice(row)
        ]
        for row in GAPS
    ]
    assert [item.pairs for item in task.items] == pairs
    assert [item.answer for item in task.items] == [
        preprocess_winogrande.doc_to_text(row) for row in GAPS
    ]
    scores, found = compared(both, task, pairs)
    right = [np.argmax(sums) == item.answer for sums, item in zip(found, task.items)]
    assert scores.accuracy_by("sum") == np.mean(right)


def test_contexts_that_are_empty_end_in_spaces_or_are_too_long(both, tmp_path):
    rows = [dict(zip(("context", "choices", "answer"), row)) for row in PLAIN]
    task = read_task(write(tmp_path, rows))
    pairs = [[(context, f" {choice}") for choice in choices] for context, choices, _ in PLAIN]
    compared(both, task, pairs)
