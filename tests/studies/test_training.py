"""A training run against a plain loop of PyTorch, interrupted wherever it can be, and diverging."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from swkernels.detect.loading import load_model
from swkernels.detect.report import encode
from swkernels.errors import TrainingDiverged
from swkernels.files import write_atomically
from swkernels.studies.book import Book
from swkernels.studies.data import Data
from swkernels.studies.lab import Lab
from swkernels.studies.recipes.settings import training
from swkernels.studies.runs import training as runs
from swkernels.train import loop
from tests.studies import tiny

K = 6
ADAPTER = {"kind": "sparse", "at": "super weights", "k": K, "radius": 0}
# 8 questions in steps of 4, two passes: 4 steps, measured after 2 and 4.
CONFIG = dict(training(tiny.PLAN, ADAPTER).config) | {
    "learning_rate": 0.02, "batch_size": 2, "accumulate": 2,
}  # fmt: skip
STEPS, POINTS = 4, (2, 4)


@pytest.fixture
def perform(planted, data, tmp_path):
    """Performs a run in a folder that later calls find again."""
    loaded = {}

    def perform(config=CONFIG, progress=lambda *a: None, folder="work", dtype="float32"):
        if dtype not in loaded:
            loaded[dtype] = load_model(str(planted), dtype=dtype)[:2]
        model, tokenizer = loaded[dtype]
        work = tmp_path / folder
        work.mkdir(exist_ok=True)
        lab = Lab(
            lambda: copy.deepcopy(model), Data(data), Book(work / "runs.jsonl"), work, model,
            tokenizer, tiny.PLANTED, progress,
        )  # fmt: skip
        before = {name: value.clone() for name, value in model.state_dict().items()}
        figures = runs.train(lab, dict(config), work / "run")
        assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
        return figures, values_in(work)

    return perform


def values_in(folder) -> torch.Tensor:
    """The trained values in the state that a run left."""
    from safetensors.torch import load_file

    if not (folder / "run.safetensors").exists():  # not one step was good
        return torch.zeros(0)
    tensors = load_file(folder / "run.safetensors")
    names = sorted(name for name in tensors if name.endswith(".value"))
    return torch.cat([tensors[name] for name in names])


# --- the plain loop ---


class Plain:
    """The same training with dense weights, a masked gradient and nothing of this package."""

    def __init__(self, checkpoint, data, config, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.data, self.config = data, config
        layers = self.model.model.layers
        self.weights = [layer.mlp.down_proj.weight for layer in layers]
        sizes = torch.stack([weight.detach().abs() for weight in self.weights])
        sizes[1, 5, 7] = math.inf  # the super weight comes first
        self.mask = torch.zeros_like(sizes, dtype=torch.bool)
        self.mask.view(-1)[sizes.flatten().topk(K).indices] = True
        self.first = torch.stack([weight.detach().clone() for weight in self.weights])

    def train(self):
        config, losses, curve = self.config, [], []
        questions = self.questions("train", 8)
        self.model.requires_grad_(False)
        for weight, mask in zip(self.weights, self.mask):
            weight.requires_grad_(True)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        optimizer = torch.optim.AdamW(self.weights, lr=config["learning_rate"], weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / STEPS)
        order = [
            n
            for epoch in range(2)
            for n in torch.randperm(
                8, generator=torch.Generator().manual_seed(config["seed"] + epoch)
            ).tolist()
        ]
        for step in range(STEPS):
            chosen = [questions[n] for n in order[4 * step : 4 * step + 4]]
            scored = torch.cat([self.scores(*self.right(question)) for question in chosen])
            optimizer.zero_grad()
            (-scored.mean()).backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(-scored.mean().item())
            if step + 1 in POINTS:
                curve.append((self.held_out(), self.perplexity()))
        return losses, curve

    def questions(self, part, count):
        lines = (self.data / "arc" / f"{part}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[:count]]

    def right(self, question):
        return question["context"], " " + question["choices"][question["answer"]], True

    def scores(self, context, continuation, ended):
        """The log-probabilities of the tokens of a continuation, and of EOS after it."""
        before = self.tokenizer(context)["input_ids"]
        after = self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        after = after + [self.tokenizer.eos_token_id] * ended
        logits = self.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        return F.log_softmax(logits, -1).gather(-1, torch.tensor(after)[:, None])[:, 0]

    @torch.no_grad()
    def held_out(self):
        return -torch.cat([self.scores(*self.right(q)) for q in self.questions("dev", 3)]).mean()

    @torch.no_grad()
    def perplexity(self):
        text = (self.data / "text.txt").read_text()
        tokens = torch.tensor(self.tokenizer(text)["input_ids"][:64])
        losses = [
            F.cross_entropy(self.model(window[None]).logits[0, :-1], window[1:])
            for window in tokens.split(32)
        ]
        return torch.stack(losses).mean().exp()

    @torch.no_grad()
    def predictions(self):
        found = []
        for question in self.questions("test", 6):
            means = [
                self.scores(question["context"], " " + c, False).mean() for c in question["choices"]
            ]
            found.append(int(torch.stack(means).argmax()))
        return found

    def values(self):
        change = torch.stack([weight.detach() for weight in self.weights]) - self.first
        return torch.cat([change[n][self.mask[n]] for n in (1, 0)])  # that of [5, 7] is named first


def test_its_figures_are_those_of_a_plain_loop(perform, planted, data):
    exact, rounded = (Plain(planted, data, CONFIG, t) for t in (torch.float64, torch.float32))
    (losses, curve), (losses_32, curve_32) = exact.train(), rounded.train()
    figures, values = perform()
    assert close(figures["losses"], losses_32, losses)
    assert [point["step"] for point in figures["curve"]] == list(POINTS)
    measured = [(point["held_out"], point["perplexity"]) for point in figures["curve"]]
    assert close(measured, curve_32, curve)
    assert close(values, rounded.values(), exact.values())
    assert values.abs().min() > 0.01
    assert list(figures["choices"]["predictions"]) == exact.predictions()
    assert list(figures["choices"]["answers"]) == [n % 4 for n in range(10, 16)]
    assert (figures["parameters"], figures["steps"], figures["diverged"]) == (K, STEPS, None)
    moved = figures["change"]["absolute"]
    assert moved["max"] == pytest.approx(values.abs().max().item(), rel=1e-5)
    assert moved["mean"] == pytest.approx(values.abs().mean().item(), rel=1e-5)


def close(ours, theirs, exact) -> bool:
    """Whether our largest error is at most twice that of the plain loop in the same dtype."""
    ours, theirs, exact = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs, exact))
    error = (theirs - exact).abs().max()
    assert 0 < error < 1e-4 * exact.abs().max()
    return bool((ours - exact).abs().max() <= 2 * error)


def test_what_is_trained_depends_on_the_seed_alone(perform):
    first = perform(folder="a")
    assert same(first, perform(folder="b"))
    assert not same(first, perform(CONFIG | {"seed": 43}, folder="c"))


def same(a, b) -> bool:
    """Figures bit for bit, as the record has them, and trained values."""
    return json.dumps(encode(a[0])) == json.dumps(encode(b[0])) and torch.equal(a[1], b[1])


# --- interruptions ---


class Clock:
    """Counts what happens in a run, and stops it at one of these moments.

    Moments are the calls of ``progress``, and before and after each file is written.

    Args:
        stop: at this moment, from 0; None never stops.
        killed: nothing is written any more once it has stopped.
    """

    def __init__(self, patch, stop=None, killed=False):
        self.moments, self.stop, self.killed, self.written = 0, stop, killed, 0
        for module in (loop, runs):
            patch.setattr(module, "write_atomically", self.write)

    def tick(self, *_):
        self.moments += 1
        if self.stop is not None and self.moments > self.stop:
            if self.killed or self.moments == self.stop + 1:
                raise KeyboardInterrupt

    def write(self, path, content):
        self.tick()
        write_atomically(path, content)
        self.written += 1
        self.tick()


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_interrupted_anywhere_ends_with_the_same_figures(perform, monkeypatch, killed):
    clock = Clock(monkeypatch)
    whole = perform(progress=clock.tick)
    assert clock.written == 2 * len(POINTS)  # a state and a curve at each
    assert clock.moments > STEPS + 2 * clock.written
    for moment in range(clock.moments):
        folder = f"stopped at {moment}"
        stopped = Clock(monkeypatch, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            perform(progress=stopped.tick, folder=folder)
        resumed = Clock(monkeypatch)
        assert same(perform(progress=resumed.tick, folder=folder), whole), moment
        assert stopped.written + resumed.written >= clock.written


def test_a_run_interrupted_after_every_step_goes_on(perform, monkeypatch):
    def stop(stage, done, total):
        seen.append(done)
        raise KeyboardInterrupt

    whole, seen = perform(), []
    for _ in range(STEPS):
        with pytest.raises(KeyboardInterrupt):
            perform(progress=stop, folder="again")
    assert seen == list(range(1, STEPS + 1))
    monkeypatch.setattr(loop, "_step", None)
    assert same(perform(folder="again"), whole)


# --- divergence ---


@pytest.mark.parametrize(("step", "measured"), [(1, [0]), (3, [2]), (4, [2, 3])])
def test_a_run_that_diverges_says_where_and_what_there_is(perform, monkeypatch, step, measured):
    whole, _ = perform()
    diverge(monkeypatch, step)
    figures, values = perform(folder="diverged")
    assert figures["diverged"] == step and figures["steps"] == STEPS
    assert figures["losses"] == whole["losses"][: step - 1]
    assert [point["step"] for point in figures["curve"]] == measured
    before = [point for point in whole["curve"] if point["step"] < step]
    assert figures["curve"][: len(before)] == before
    assert len(figures["choices"]["predictions"]) == tiny.TINY.questions
    assert len(values) == (K if step > 1 else 0)


def diverge(monkeypatch, in_step: int) -> None:
    """Let a step, counted from 1, have no finite loss."""
    real = loop._step

    def step(model, parameters, optimizer, examples, settings, number, steps):
        if number + 1 == in_step:
            raise TrainingDiverged("not finite")
        return real(model, parameters, optimizer, examples, settings, number, steps)

    monkeypatch.setattr(loop, "_step", step)


def test_a_run_that_diverges_can_be_killed_too(perform, monkeypatch):
    diverge(monkeypatch, 4)
    clock = Clock(monkeypatch)
    whole = perform(progress=clock.tick)
    for moment in range(clock.moments):
        folder = f"stopped at {moment}"
        with pytest.raises(KeyboardInterrupt):
            perform(progress=Clock(monkeypatch, moment, killed=True).tick, folder=folder)
        assert same(perform(progress=Clock(monkeypatch).tick, folder=folder), whole), moment


def test_a_rate_beyond_all_reason(perform):
    figures, values = perform(CONFIG | {"learning_rate": 1e37})
    assert figures["diverged"] == 2 and len(figures["losses"]) == 1
    assert [point["step"] for point in figures["curve"]] == [1]
    assert values.abs().min() > 1e36 and torch.isfinite(values).all()  # those of the last good step
    again, _ = perform(CONFIG | {"learning_rate": 1e37})  # goes on from the state
    assert json.dumps(encode(again)) == json.dumps(encode(figures))
