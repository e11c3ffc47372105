"""Cases of ``choices``: SmolLM2-135M on 128 items of multiple choice, shared beginnings run once.

The items are made of Python's own prose and are as long as those of ARC-Easy's test set and of
Winogrande's development set: words are drawn by the deciles of those. Every provider tokenizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.case import Case, Error, Provider, lazily, peer, relative_error
from benchmarks.expected import ITEM, Work
from benchmarks.models import smollm2
from swkernels.detect.text import default_text
from swkernels.evidence.choices import BATCH, score_choices
from swkernels.evidence.pairs import encode
from swkernels.evidence.prefixes import Packed
from swkernels.evidence.tasks import Item, Task

OP = "choices"
ITEMS = 128
JUDGED = 8  # items that are run in float64
KINDS = ("as ARC-Easy", "as Winogrande")
_MEASURE = f"relative error of the log-likelihoods of the first {JUDGED} items"
# Words, the middles of ten equal shares: of a question, of its choices in the mean; of a sentence
# before the gap, behind it.
_STEMS = (7, 9, 11, 13, 15, 17, 21, 25, 31, 46)
_CHOICES = (1, 1, 1, 2, 2, 3, 4, 6, 7, 10)
_BEFORE = (8, 10, 11, 12, 13, 13, 15, 16, 18, 21)
_BEHIND = (2, 2, 3, 3, 4, 4, 5, 6, 7, 9)


def load_smollm2(dtype: str, device: torch.device):
    """The test model in a dtype."""
    path = smollm2.prepare()
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()


def tokenizer_of_smollm2():
    return AutoTokenizer.from_pretrained(smollm2.prepare())


def cases(device: torch.device) -> Iterator[Case]:
    """Both kinds, in float32."""
    for kind in KINDS:
        yield case(kind, device)


def made_task(kind: str, items: int, text: str | None = None) -> Task:
    """The same items for the same Python."""
    draw, words = random.Random(kind), (text or default_text()).split()

    def run(count):
        start = draw.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    def asked(number):
        mean = draw.choice(_CHOICES)
        lengths = [mean + draw.randint(-1, 1) * (mean > 2) for _ in range(4)]
        context = f"Question: {run(draw.choice(_STEMS))}\nAnswer:"
        return Item(str(number), (context,), tuple(f" {run(count)}" for count in lengths), 0)

    def gap(number):
        before, behind = run(draw.choice(_BEFORE)), f" {run(draw.choice(_BEHIND))}"
        contexts = tuple(f"{before} {run(1)}" for _ in range(2))
        return Item(str(number), contexts, (behind, behind), 0)

    make = asked if kind == KINDS[0] else gap
    return Task(kind, tuple(make(number) for number in range(items)), "benchmark")


def case(
    kind: str,
    device: torch.device,
    *,
    load: Callable[[str, torch.device], torch.nn.Module] = load_smollm2,
    load_tokenizer: Callable[[], object] = tokenizer_of_smollm2,
    items: int = ITEMS,
    text: str | None = None,
    dtype: str = "float32",
) -> Case:
    """Scores of all choices, from texts on."""
    model = cache(lambda: load(dtype, device))
    tokenizer = cache(load_tokenizer)
    whole = made_task(kind, items, text)

    def make(seed):
        order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
        return {"order": order}

    def task(inputs, most=None):
        chosen = (whole.items[number] for number in inputs["order"][:most].tolist())
        return Task(kind, tuple(chosen), whole.source)

    def ours(shares):
        def call(inputs):
            found = score_choices(model(), tokenizer(), task(inputs), share_prefixes=shares)
            assert found.shared is shares
            return {"sums": torch.tensor([s for of in found.log_likelihoods for s in of]).double()}

        return call

    def lm_eval():
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model(), tokenizer=tokenizer(), batch_size=BATCH)

        def call(inputs):
            pairs = [pair for item in task(inputs).items for pair in item.pairs]
            requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
            found = lm.loglikelihood(requests, disable_tqdm=True)
            return {"sums": torch.tensor([value for value, _ in found]).double()}

        return call

    def one_by_one(running, pairs):
        sums = []
        for pair in (pair for of_item in pairs for pair in of_item):
            ids = torch.tensor([pair.inputs], device=device)
            logits = running(input_ids=ids, use_cache=False).logits[0, pair.first :]
            targets = torch.tensor(pair.targets, device=device)[:, None]
            sums.append(logits.log_softmax(-1).gather(1, targets).double().sum().cpu())
        return torch.stack(sums)

    def judge(inputs):
        pairs = encode(model(), tokenizer(), task(inputs, JUDGED))
        exact = one_by_one(load("float64", device), pairs)
        limit = 2 * relative_error(one_by_one(model(), pairs), exact)

        def error(outputs):
            return Error(relative_error(outputs["sums"][: len(exact)], exact), limit, _MEASURE)

        return error

    def providers():
        return [
            Provider("swkernels", "ours", ours(True)),
            Provider("each choice in full", "eager", ours(False)),
            peer("lm-eval HFLM", "lm_eval", device, lazily(lm_eval), devices=("cpu", "cuda")),
        ]

    pairs = encode(model(), tokenizer(), whole)
    tokens = sum(len(Packed(of_item).ids) for of_item in pairs)
    matrices = sum(p.numel() for p in model().parameters() if p.dim() == 2)
    work = (Work(2 * matrices * tokens, matrices * ITEM[dtype], 0),)
    config = model().config
    shape = {"tokens": tokens, "columns": config.intermediate_size, "rows": config.hidden_size}
    projection = f"{items} items {kind}"
    return Case(
        OP, ("SmolLM2-135M",), projection, shape, dtype, work, 12, make, judge, providers,
        seconds=200.0,
    )  # fmt: skip
