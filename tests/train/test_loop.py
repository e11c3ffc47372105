"""The training loop: what it computes, and that an interrupted run loses nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch

from swkernels.errors import InvalidInput, TrainingDiverged
from swkernels.train import Coordinates, loop, sparse
from swkernels.train.data import Example, collate, predictions, read_examples
from swkernels.train.plot import loss_png, running_mean
from tests.models.tiny import ARCHITECTURES, MORE_ARCHITECTURES, VOCABULARY, tiny_model


class Tokenizer:
    """One token a character, BOS 1, EOS 2."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + ord(c) % (VOCABULARY - 3) for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(0, VOCABULARY, (4 + number,), generator=generator)
        made.append(Example(ids, torch.where(torch.arange(len(ids)) < 2, -100, ids)))
    return made


def run(settings=None, *, state=None, on_step=None, model=None, data=None, until=None):
    model = model or tiny_model("llama")
    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    settings = settings or loop.Settings(steps=6, batch_size=2, learning_rate=0.01)
    extra = {"on_step": on_step} if on_step else {}
    losses = loop.fit(handle, data or examples(), settings, state=state, until=until, **extra)
    return losses, [value.detach().clone() for value in handle.parameters()], handle


def equal(a, b) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1]))


# --- data ---


def test_texts_are_joined_and_cut_into_blocks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n\n{"text": "defg"}\n')
    found = read_examples(path, Tokenizer(), 4)
    assert [len(example.ids) for example in found] == [4, 4, 3]
    stream = torch.cat([example.ids for example in found]).tolist()
    assert stream[0] == stream[5] == 1 and stream[4] == stream[10] == 2
    assert all(torch.equal(*example) for example in found)


def test_of_a_pair_the_completion_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "ab", "completion": "cde"}))
    (example,) = read_examples(path, Tokenizer(), 64)
    assert example.ids.tolist()[0] == 1 and example.ids.tolist()[-1] == 2
    assert example.labels.tolist() == [-100] * 3 + example.ids.tolist()[3:]
    assert predictions([example]) == 4


@pytest.mark.parametrize(
    ("lines", "length", "message"),
    [
        (['{"prompt": "ab", "completion": "c"}', '{"prompt": "ab"}'], 9, "line 2: expected an obj"),
        (['{"prompt": "ab", "completion": ""}'], 9, "line 1: expected an object"),
        (['{"prompt": "abcdef", "completion": "g"}'], 5, "line 1: no token of the completion"),
        (['{"words": "ab"}'], 9, 'a string "text"'),
        (['{"text": ""}'], 9, "holds no text"),
        (['{"text": "ab"}'], 1, "length must be at least 2"),
    ],
)
def test_wrong_data(lines, length, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InvalidInput, match=message):
        read_examples(path, Tokenizer(), length)


def test_a_batch_is_padded_at_the_right_and_padding_counts_for_nothing():
    batch = collate(examples(3), torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 6]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


# --- the loop ---


def test_it_learns_and_changes_only_the_values():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses, values, _ = run(loop.Settings(steps=20, batch_size=7, learning_rate=0.05), model=model)
    assert losses[-1] < losses[0] - 0.01
    assert all(value.abs().sum() > 0 for value in values)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_step_is_pytorchs_own_whatever_the_split(optimizer):
    data = examples()
    settings = loop.Settings(
        steps=1, batch_size=7, learning_rate=0.01, warmup=0, optimizer=optimizer, clip=0.001
    )
    model = tiny_model("llama").double()
    losses, values, _ = run(settings, model=model, data=data)

    model = tiny_model("llama").double()
    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    loss = model(**collate(data, torch.device("cpu"))).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(handle.parameters(), 0.001)
    made = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[optimizer]
    made(handle.parameters(), lr=0.01, weight_decay=0).step()
    assert losses[0] == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(values, handle.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)

    split = loop.Settings(
        steps=1, batch_size=1, accumulate=7, learning_rate=0.01, warmup=0, optimizer=optimizer,
        clip=0.001,
    )  # fmt: skip
    again = run(split, model=tiny_model("llama").double(), data=data)
    assert again[0][0] == pytest.approx(losses[0], rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(again[1], values))


def of_two_last_tokens() -> list[Example]:
    return [
        Example(e.ids, torch.where(torch.arange(len(e.ids)) < len(e.ids) - 2, -100, e.ids))
        for e in examples()
    ]


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen2", "bloom"])
def test_the_head_is_left_out_where_nothing_is_predicted(architecture):
    def made():
        model = tiny_model(architecture)
        model.config.output_router_logits = architecture == "mixtral"  # a loss beside the tokens'
        return model

    data, rows = of_two_last_tokens(), []
    model = made()
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, made: rows.append(made.shape[:2].numel())
    )
    settings = loop.Settings(
        steps=1, batch_size=3, accumulate=1, learning_rate=0.01, warmup=0, clip=0.001, seed=4
    )
    losses, values, _ = run(settings, model=model, data=data)
    chosen = sorted((data[n] for n in loop._order(7, 0, 3, 4)), key=lambda e: len(e.ids))
    least, most = len(chosen[0].ids), len(chosen[-1].ids)
    # From the place before the first of the two last tokens of the shortest.
    assert rows == [3 * (most - (least - 3))]

    model = made().train()
    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    loss = model(**collate(chosen, torch.device("cpu"))).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(handle.parameters(), 0.001)
    torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0).step()
    assert losses[0] == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(values, handle.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES | MORE_ARCHITECTURES)
def test_the_loss_is_the_models_own_whatever_is_left_out(architecture):
    model, data = tiny_model(architecture), of_two_last_tokens()
    with torch.no_grad():
        whole = model(**collate(data, torch.device("cpu")), use_cache=False).loss
        assert loop._loss(model, data, "cpu").item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_model_without_a_choice_of_logits_trains_alike(monkeypatch):
    whole = run(data=examples())
    real = loop.inspect.signature
    monkeypatch.setattr(loop.inspect, "signature", lambda f: real(lambda input_ids: None))
    again = run(data=examples())
    assert again[0] == pytest.approx(whole[0], rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(again[1], whole[1]))


def test_every_pass_goes_through_all_the_data_in_another_order():
    orders = [loop._order(7, first, 7, seed=0) for first in (0, 7)]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2 and orders[0] != orders[1]
    pieces = [loop._order(7, first, 2, seed=0) for first in range(0, 14, 2)]
    assert sum(pieces, []) == sum(orders, [])


def test_the_rate_rises_and_falls():
    settings = loop.Settings(learning_rate=1.0, warmup=0.2)
    assert [settings.rate(step, 10) for step in range(4)] == [0.5, 1.0, 1.0, 7 / 8]
    assert settings.rate(9, 10) == 1 / 8
    assert loop.Settings(epochs=2, batch_size=2, accumulate=2).count(10) == 5


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, error, optimizer):
    settings = loop.Settings(steps=6, batch_size=2, optimizer=optimizer, learning_rate=0.01)
    whole = run(settings)
    state = tmp_path / "state.safetensors"

    def stop(done, steps, loss):
        if done == 3:
            raise error

    with pytest.raises(error):
        run(settings, state=state, on_step=stop)
    seen = []
    resumed = run(settings, state=state, on_step=lambda done, *_: seen.append(done))
    assert seen == [4, 5, 6] and equal(resumed, whole)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_a_step_that_is_cut_in_two_is_undone(tmp_path, monkeypatch, optimizer):
    settings = loop.Settings(
        steps=5, batch_size=2, learning_rate=0.01, optimizer=optimizer.lower()
    )  # fmt: skip
    whole = run(settings)
    state, model = tmp_path / "state.safetensors", tiny_model("llama")
    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    kept, real = [], getattr(torch.optim, optimizer).step

    def cut(self, *args):
        if len(kept) == 3:
            real(self, *args)
            raise KeyboardInterrupt
        real(self, *args)
        kept.append([value.detach().clone() for value in handle.parameters()])

    with monkeypatch.context() as patch:
        patch.setattr(getattr(torch.optim, optimizer), "step", cut)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(handle, examples(), settings, state=state)
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], handle.parameters()))
    assert equal(run(settings, state=state), whole)


def test_it_stops_where_it_is_told_and_goes_on(tmp_path):
    settings = loop.Settings(steps=6, batch_size=2, learning_rate=0.01)
    whole = run(settings)
    state, model = tmp_path / "state.safetensors", tiny_model("llama")
    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    for until, made in ((1, 1), (2, 1), (5, 3), (2, 0), (5, 0)):
        seen = []
        losses = loop.fit(
            handle, examples(), settings, state=state, until=until,
            on_step=lambda done, total, _, seen=seen: seen.append((done, total)),
        )  # fmt: skip
        reached = until if made else 5  # what lies behind it already is given back
        assert losses == whole[0][:reached]
        assert seen == [(n, 6) for n in range(reached - made + 1, reached + 1)]
    assert equal(run(settings, state=state, until=None), whole)
    assert run(settings, until=2)[0] == whole[0][:2]
    assert equal(run(settings, until=99), whole)


def test_like_lengths_go_together_and_nothing_else_changes(monkeypatch):
    data = [examples()[n] for n in (6, 0, 5, 1, 4, 2, 3, 3)]  # 4 to 10 tokens
    settings = loop.Settings(
        steps=4, batch_size=2, accumulate=2, learning_rate=0.01, warmup=0, clip=0.1
    )
    widths, real = [], loop.collate
    spy = lambda part, device: widths.append([len(e.ids) for e in part]) or real(part, device)  # noqa: E731
    monkeypatch.setattr(loop, "collate", spy)
    losses, values, _ = run(settings, model=tiny_model("llama").double(), data=data)
    steps = [sum(widths[n : n + 2], []) for n in range(0, len(widths), 2)]
    assert steps == [sorted(step) for step in steps]
    order = loop._order(len(data), 0, 16, seed=0)
    drawn = [[len(data[n].ids) for n in order[k : k + 4]] for k in range(0, 16, 4)]
    assert steps == [sorted(step) for step in drawn] != drawn

    model = tiny_model("llama").double()
    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0)
    for step in range(4):  # each in one forward, in the order that was drawn
        optimizer.zero_grad()
        part = [data[n] for n in order[4 * step : 4 * step + 4]]
        loss = model(**real(part, torch.device("cpu"))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = settings.rate(step, 4)
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-6)  # it is float32
    for ours, theirs in zip(values, handle.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def test_the_optimizer_gets_the_rate_of_each_step(monkeypatch):
    rates, real = [], torch.optim.AdamW.step

    def step(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = loop.Settings(steps=5, batch_size=2, learning_rate=0.01, warmup=0.4)
    run(settings)
    assert rates == [settings.rate(n, 5) for n in range(5)] and len(set(rates)) == 4


def test_a_killed_run_goes_on_from_what_was_saved(tmp_path, monkeypatch):
    settings = loop.Settings(steps=5, batch_size=2, learning_rate=0.01, save_every=2)
    whole = run(settings)
    state, real, written = tmp_path / "state.safetensors", loop._write, []
    monkeypatch.setattr(loop, "_write", lambda *a: (real(*a), written.append(state.read_bytes())))
    run(settings, state=state)
    assert len(written) == 3  # after 2 and 4 steps, and at the end
    state.write_bytes(written[0])  # as if the process had been killed after it
    assert equal(run(settings, state=state), whole)


def test_a_complete_run_is_given_back_without_a_step(tmp_path, monkeypatch):
    settings = loop.Settings(steps=3, batch_size=2, learning_rate=0.01)
    state = tmp_path / "state.safetensors"
    whole = run(settings, state=state)
    monkeypatch.setattr(loop, "_step", None)
    assert equal(run(settings, state=state), whole)


def test_dropout_goes_on_too(tmp_path):
    def model():
        made = tiny_model("llama")
        made.model.layers[0].mlp.register_forward_hook(
            lambda module, args, out: torch.nn.functional.dropout(out, 0.5, module.training)
        )
        return made

    settings = loop.Settings(steps=4, batch_size=2, learning_rate=0.01)
    whole = run(settings, model=model())
    state = tmp_path / "state.safetensors"

    def stop(done, steps, loss):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(settings, model=model(), state=state, on_step=stop)
    assert equal(run(settings, model=model(), state=state), whole)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_the_last_good_values_stay(tmp_path, what):
    settings = loop.Settings(steps=6, batch_size=2, learning_rate=0.01)
    state, model = tmp_path / "state.safetensors", tiny_model("llama")
    kept = []

    def on_step(done, steps, loss):
        if done == 3:
            kept.extend(value.detach().clone() for value in handle.parameters())
            head = model.lm_head.weight
            if what == "loss":
                head.data.fill_(math.nan)
            else:
                handle.parameters()[0].register_hook(lambda grad: grad * math.inf)

    handle = sparse(model, Coordinates.random(model, 30, seed=1))
    with pytest.raises(TrainingDiverged, match=f"the {what} is not finite in step 4.*lower") as e:
        loop.fit(handle, examples(), settings, state=state, on_step=on_step)
    assert all(torch.equal(a, b) for a, b in zip(kept, handle.parameters()))
    resumed = run(settings, state=state)
    assert equal(resumed, run(settings))
    assert e.value.losses == resumed[0][:3]


def test_what_diverges_at_once_has_no_losses():
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="in step 1: the values of step 0") as e:
        run(model=model)
    assert e.value.losses == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.02}, "learning_rate"),
        ({"data": 1}, "data"),
        ({"k": 9}, "coordinates, base"),
        ({"scale": 1.5}, "base"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, named):
    settings = loop.Settings(steps=2, batch_size=2, learning_rate=0.01, save_every=1)
    state = tmp_path / "state.safetensors"
    run(settings, state=state)
    before = state.read_bytes()
    model = tiny_model("llama").to(change.get("dtype", torch.float32))
    for parameter in model.parameters():
        parameter.data *= change.get("scale", 1)
    handle = sparse(model, Coordinates.random(model, change.get("k", 30), seed=1))
    rate = change.get("learning_rate", 0.01)
    other = loop.Settings(steps=2, batch_size=2, learning_rate=rate)
    with pytest.raises(InvalidInput, match=f"a run with another {named}: give"):
        loop.fit(handle, examples(seed=change.get("data", 0)), other, state=state)
    assert state.read_bytes() == before
    assert not any(value.any() for value in handle.parameters())
    state.write_bytes(before[:50])
    with pytest.raises(InvalidInput, match="cannot read"):
        loop.fit(handle, examples(), settings, state=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"warmup": 2}, "warmup must be a share"),
        ({"optimizer": "sgd"}, "one of adamw, adafactor, got 'sgd'"),
        ({"clip": -1}, "clip must be at least 0"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(InvalidInput, match=message):
        loop.Settings(**change)


def test_the_mean_loss_is_that_of_all_tokens():
    model, data = tiny_model("llama").double(), examples()
    one = loop.mean_loss(model, data, 7)
    assert loop.mean_loss(model, data, 2) == pytest.approx(one, rel=1e-6)  # it is float32
    loss = model(**collate(data, torch.device("cpu"))).loss
    assert one == pytest.approx(loss.item(), rel=1e-6)


# --- the figure ---


def test_the_figure():
    assert running_mean([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert running_mean([1.0, 3.0], weight=0.5) == pytest.approx([1.0, 7 / 3])
    drawn = loss_png([3.0, 2.0, 1.5], (3.0, 1.6))
    assert drawn.startswith(b"\x89PNG") and drawn == loss_png([3.0, 2.0, 1.5], (3.0, 1.6))
    assert drawn != loss_png([3.0, 2.0, 1.0], (3.0, 1.6))
