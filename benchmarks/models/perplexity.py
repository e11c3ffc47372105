"""Cases of ``perplexity``: SmolLM2-135M on 4,096 tokens in windows of 1,024, over the bare forward.

The bare forward makes the logits of the same windows in the same batches and no loss. The strided
case has windows that overlap by half: the bare forward makes all logits of each, ours those that
predict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.case import Case, Error, Provider, relative_error
from benchmarks.expected import ITEM, Work
from benchmarks.models import smollm2
from swkernels.detect.perplexity import perplexity

OP = "perplexity"
TOKENS, WINDOW, BATCH = 4096, 1024, 2
_MEASURE = "relative error of the losses of the first batch's windows"


def load_smollm2(dtype: str, device: torch.device):
    """The test model in a dtype."""
    path = smollm2.prepare()
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()


def cases(dtype: str, device: torch.device) -> Iterator[Case]:
    """Windows that do not overlap, and, in float32, windows that do."""
    yield case(dtype, device)
    if dtype == "float32":
        yield case(dtype, device, stride=WINDOW // 2)


def case(
    dtype: str,
    device: torch.device,
    *,
    load: Callable[[str, torch.device], torch.nn.Module] = load_smollm2,
    tokens: int = TOKENS,
    window: int = WINDOW,
    stride: int | None = None,
) -> Case:
    """Perplexity of ``tokens`` random ones; the windows fit into them without a rest."""
    loaded: dict[str, torch.nn.Module] = {}
    step = stride or window

    def model(cast=dtype):
        if cast not in loaded:
            loaded[cast] = load(cast, device)
        return loaded[cast]

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"ids": torch.randint(0, model().config.vocab_size, (tokens,), generator=generator)}

    def batches(ids):
        """[B, window] each."""
        return ids.unfold(0, window, step).split(BATCH)

    def forward(inputs):
        for batch in batches(inputs["ids"]):
            model()(input_ids=batch.to(device), use_cache=False)
        return {}

    def ours(inputs):
        found = perplexity(model(), inputs["ids"], window=window, stride=stride, batch_size=BATCH)
        return {"losses": torch.tensor(found.losses, dtype=torch.float64)}

    def losses(batch, running):
        """Summed loss of each window, of the tokens that none before it holds; [B]."""
        logits = running(input_ids=batch.to(device), use_cache=False).logits
        found = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten().to(device),
            reduction="none",
        )  # fmt: skip
        return found.view(len(batch), -1)

    def summed(ids, running, first=None):
        rows = torch.cat([losses(batch, running) for batch in batches(ids)[:first]])
        new = rows[:, -step:].sum(1)
        new[0] = rows[0].sum()  # nothing stands before the first window
        return new

    def eager(inputs):
        return {"losses": summed(inputs["ids"], model())}

    def judge(inputs):
        exact = summed(inputs["ids"], load("float64", device), first=1).double()
        limit = 2 * relative_error(summed(inputs["ids"], model(), first=1).double(), exact)

        def error(outputs):
            if "losses" not in outputs:
                return Error(0.0, limit, _MEASURE)
            found = outputs["losses"][: len(exact)].to(exact)
            return Error(relative_error(found, exact), limit, _MEASURE)

        return error

    def providers():
        return [
            Provider("forward", "bare", forward),
            Provider("swkernels", "ours", ours),
            Provider("forward, cross_entropy of a batch", "eager", eager),
        ]

    config = model().config
    matrices = sum(p.numel() for p in model().parameters() if p.dim() == 2)
    windows = 1 + (tokens - window) // step
    work = (Work(2 * matrices * windows * window, matrices * ITEM[dtype], 0),)
    shape = {"tokens": tokens, "columns": config.intermediate_size, "rows": config.hidden_size}
    overlap = f", stride {stride}" if stride else ""
    projection = f"windows of {window}{overlap}, {BATCH} together"
    return Case(
        OP, ("SmolLM2-135M",), projection, shape, dtype, work, 4, make, judge, providers,
        seconds=120.0,
    )  # fmt: skip
