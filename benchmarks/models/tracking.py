"""Cases of ``tracked_model``: SmolLM2-135M on 8 x 512 tokens, plain, tracked, with hooks."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import swkernels
from benchmarks import expected
from benchmarks.case import Case, Error, Provider, relative_error
from benchmarks.models import smollm2
from benchmarks.models.mlp import tracked_peaks

OP = "tracked_model"
BATCH, LENGTH = 8, 512
_MEASURE = "relative error of the last hidden states of the first sample and of the peaks"


def case(dtype: str, device: torch.device) -> Case:
    """The base model with and without tracking; and with its head, which a scan leaves out.

    The head's logits are not judged: they are PyTorch's own in every variant.
    """
    loaded: dict[str, torch.nn.Module] = {}

    def model(cast=None):
        name = cast or dtype
        if name not in loaded:
            full = AutoModelForCausalLM.from_pretrained(
                smollm2.prepare(), dtype=getattr(torch, name)
            )
            loaded[name] = full.to(device).eval()
        return loaded[name]

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, model().config.vocab_size, (BATCH, LENGTH), generator=generator)
        return {"ids": ids.to(device)}

    def base(inputs):
        return {"y": model().model(input_ids=inputs["ids"], use_cache=False).last_hidden_state}

    def with_head(inputs):
        model()(input_ids=inputs["ids"], use_cache=False)
        return {}

    def tracked(**options):
        def call(inputs):
            with swkernels.track(model(), **options) as handle:
                return base(inputs) | {"handle": handle}

        return call

    def hooked(inputs):
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module, arguments, output):
            of_input, of_output = (t.flatten(0, -2).abs().max(0)[0] for t in (arguments[0], output))
            found.append((of_input, of_output))

        hooks = [layer.mlp.down_proj.register_forward_hook(keep) for layer in model().model.layers]
        outputs = base(inputs)
        for hook in hooks:
            hook.remove()
        peaks = [of_input for of_input, _ in found] + [of_output for _, of_output in found]
        return outputs | {"peaks": torch.cat(peaks)[None]}

    def judge(inputs):
        first = {"ids": inputs["ids"][:1]}
        exact = model("float64").model(input_ids=first["ids"], use_cache=False).last_hidden_state
        del loaded["float64"]
        limit = 2 * relative_error(base(inputs)["y"][0], exact[0])
        peaks = hooked(inputs)["peaks"]

        def error(outputs):
            outputs = dict(outputs)
            if "handle" in outputs:
                outputs["peaks"] = tracked_peaks(outputs.pop("handle"))
            value = relative_error(outputs["y"][0], exact[0]) if "y" in outputs else 0.0
            if "peaks" in outputs:
                value = max(value, relative_error(outputs["peaks"], peaks))
            return Error(value, limit, _MEASURE)

        return error

    def providers():
        return [
            Provider("base model", "bare", base),
            Provider("base model and head", "bare", with_head),
            Provider("swkernels", "ours", tracked()),
            Provider("swkernels (fused)", "ours", tracked(fused=True)),
            Provider("hooks with abs().max(0)", "eager", hooked),
        ]

    config = model().config
    tokens = BATCH * LENGTH
    shape = {"tokens": tokens, "columns": config.intermediate_size, "rows": config.hidden_size}
    mlp = expected.swiglu_mlp(tokens, config.hidden_size, config.intermediate_size, dtype)
    work = config.num_hidden_layers * mlp
    return Case(
        OP, ("SmolLM2-135M",), "base model, 8 x 512", shape, dtype, work, 8, make, judge,
        providers, seconds=100.0,
    )  # fmt: skip
