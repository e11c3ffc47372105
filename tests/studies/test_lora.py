"""LoRA in training runs: begun as PEFT's own, figures by hand, masks, states, verdicts."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from swkernels.detect.loading import load_model
from swkernels.detect.report import encode
from swkernels.errors import InvalidInput
from swkernels.studies import adapters
from swkernels.studies.book import Book
from swkernels.studies.data import Data
from swkernels.studies.lab import Lab
from swkernels.studies.recipes import lora, lora_down, lora_mask
from swkernels.studies.recipes.settings import training
from swkernels.studies.runs import training as runs
from swkernels.studies.runs.evaluate import answers
from swkernels.train.loop import Settings, fit
from tests.studies import tiny
from tests.studies.made_up import QUESTIONS, found, trained, verdict

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REPORT = {"change_at": [4, 16], "delta_top": 6}
SEED = 42


@pytest.fixture(scope="module")
def laboratory(planted, data, tmp_path_factory):
    model, tokenizer, _ = load_model(str(planted), dtype="float32")
    work = tmp_path_factory.mktemp("lora")
    book = Book(work / "runs.jsonl")
    load = lambda: copy.deepcopy(model)  # noqa: E731
    return Lab(load, Data(data), book, work, model, tokenizer, tiny.PLANTED)


def adapted(lab, targets="attention", steps=4, **masking):
    """(what ``adapt`` returns, its layers by name), after some steps at a high rate."""
    adapter = lora.adapter_of(targets, REPORT) | masking
    model = lab.load()
    made = adapters.adapt(lab, model, adapter, SEED)
    if steps:
        examples = answers(lab.data.task("arc/train", 8), lab.tokenizer)
        settings = Settings(
            steps=steps, batch_size=4, learning_rate=0.01, warmup=0, weight_decay=0, seed=SEED
        )
        fit(made.trainable, examples, settings)
    return made, {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def factors(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """B [D, r] and A [r, H] as they are trained."""
    return layer.lora_B.default.weight.detach(), layer.lora_A.default.weight.detach()


def updates(layers) -> dict[str, torch.Tensor]:
    """dW = B A alpha / r by name."""
    return {name: 2.0 * torch.matmul(*factors(layer)) for name, layer in layers.items()}


def largest(lab, k) -> list[tuple[int, int, int]]:
    """(layer, row, column) of the super weight and the k - 1 other largest down projections."""
    sizes = torch.stack([layer.mlp.down_proj.weight.abs() for layer in lab.model.model.layers])
    flat = sizes.flatten().argsort(descending=True)[: k + 1]
    found = [tuple(int(x) for x in torch.unravel_index(i, sizes.shape)) for i in flat]
    found.remove((1, 5, 7))
    return [(1, 5, 7), *found[: k - 1]]


# --- what it is ---


@pytest.mark.parametrize("targets", ["attention", "down_proj"])
def test_it_begins_as_the_lora_of_peft_and_is_as_large(laboratory, targets):
    made, layers = adapted(laboratory, targets, steps=0)
    names = list(ATTENTION) if targets == "attention" else ["down_proj"]
    model = laboratory.load()
    torch.manual_seed(SEED)
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    theirs = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert list(theirs) == list(layers)
    for name, layer in layers.items():
        assert torch.equal(factors(layer)[1], factors(theirs[name])[1])
        assert not factors(layer)[0].any()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert made.parameters == count == sum(p.numel() for p in made.trainable.parameters())


def test_it_trains_as_the_lora_of_peft(laboratory):
    _, layers = adapted(laboratory)
    made, _ = adapted(laboratory, steps=0)
    made.trainable.model = model = laboratory.load()
    torch.manual_seed(SEED)
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=list(ATTENTION)))
    examples = answers(laboratory.data.task("arc/train", 8), laboratory.tokenizer)
    settings = Settings(
        steps=4, batch_size=4, learning_rate=0.01, warmup=0, weight_decay=0, seed=SEED
    )
    fit(made.trainable, examples, settings)
    theirs = updates({n: m for n, m in model.named_modules() if hasattr(m, "lora_A")})
    for name, delta in updates(layers).items():
        assert delta.abs().max() > 0.01
        assert torch.allclose(delta, theirs[name], rtol=0, atol=1e-4)


# --- what the record says of it ---


def test_figures_of_attention_by_hand(laboratory):
    made, layers = adapted(laboratory)
    figures, deltas = made.describe(), updates(layers)
    weights = {name: layer.base_layer.weight.detach() for name, layer in layers.items()}
    assert figures["touched"] is None
    for k in (4, 16):
        moved = [
            (deltas[name][row, column] / weights[name][row, column]).abs().item()
            for layer, row, column in largest(laboratory, k)
            for name in layers
            if f"layers.{layer}." in name and column < 32  # attention is 32 x 32
        ]
        summary = figures["change"][str(k)]
        moved = torch.tensor(moved, dtype=torch.float64)
        assert summary["coordinates"] == len(moved) > 4
        relative = summary["relative"]
        assert relative["mean"] == pytest.approx(moved.mean().item(), rel=1e-4)
        assert relative["max"] == pytest.approx(moved.max().item(), rel=1e-4)
        assert relative["share_above"] == (moved > 0.1).double().mean()
    assert figures["change"]["super weights"]["coordinates"] == 4
    assert figures["super_weights"]["relative"]["max"] == 0  # it lies in a down projection
    every = sorted(
        ((abs(float(d)), name, divmod(n, 32)) for name, delta in deltas.items()
         for n, d in enumerate(delta.flatten())), reverse=True,
    )[:6]  # fmt: skip
    listed = {(name, (r, c)) for name, at in figures["delta_top"].items() for r, c in at}
    assert listed == {(name, place) for _, name, place in every}


def test_sizes_by_hand(laboratory):
    made, layers = adapted(laboratory)
    update, deltas = made.describe()["update"], updates(layers)
    assert update["modules"] == list(deltas)
    for n, (name, delta) in enumerate(deltas.items()):
        B, A = factors(layers[name])
        assert update["std_B"][n] == pytest.approx(B.std().item(), rel=1e-5)
        assert update["std_A"][n] == pytest.approx(A.std().item(), rel=1e-5)
        assert update["mean"][n] == pytest.approx(delta.abs().mean().item(), rel=1e-5)
        bound = 2 * B.norm(dim=1)[:, None] * A.norm(dim=0)[None]
        ratio = delta.abs() / bound
        assert update["bound"][n] == pytest.approx(ratio.max().item(), rel=1e-4) and ratio.max() < 1
        assert update["tightness"][n] == pytest.approx(ratio.mean().item(), rel=1e-4)
    # Matrices of one size: the mean of all modules is that of their means.
    groups = torch.zeros(10, 2)
    for name, delta in deltas.items():
        weight = layers[name].base_layer.weight.detach().abs().flatten()
        order = weight.sort().indices.split(103)  # 1,024 entries in ten groups
        for n, part in enumerate(order):
            groups[n] += torch.stack([weight[part].mean(), delta.flatten()[part].abs().mean()])
    for group, (weight, delta) in zip(update["groups"], groups / len(deltas)):
        assert group["weight"] == pytest.approx(weight.item(), rel=1e-4)
        assert group["delta"] == pytest.approx(delta.item(), rel=1e-4)


def test_figures_of_down_projections_by_hand(laboratory):
    made, layers = adapted(laboratory, "down_proj")
    figures, deltas = made.describe(), updates(layers)
    before = layers["model.layers.1.mlp.down_proj"].base_layer.weight[5, 7].item()
    moved = deltas["model.layers.1.mlp.down_proj"][5, 7].item()
    summary = figures["super_weights"]
    assert before == 10 and abs(moved) > 1e-3
    assert summary["relative"]["mean"] == pytest.approx(abs(moved) / 10, rel=1e-3)
    assert summary["magnitude"]["after"] == pytest.approx(10 + moved, rel=1e-6)
    assert summary["local_maximum"] == {
        "before": 1,
        "after": 1,
        "delta": summary["local_maximum"]["delta"],
    }
    assert figures["change"]["super weights"] == summary
    assert figures["change"]["16"]["coordinates"] == 16


# --- masks ---


@pytest.mark.parametrize("mask", ["rows", "columns", "rows and columns", "positions"])
def test_dw_is_zero_where_the_mask_is_and_nowhere_else(laboratory, mask):
    made, layers = adapted(
        laboratory, mask=mask, scale=0.0, hold=False, at={"top": 5}
    )  # fmt: skip
    touched = made.describe()["touched"]
    rows = columns = positions = 0
    for name, layer in layers.items():
        places = [(r, c) for n, r, c in largest(laboratory, 5) if f"layers.{n}." in name and c < 32]
        expected = torch.zeros(32, 32, dtype=torch.bool)
        for row, column in places:
            if "rows" in mask:
                expected[row] = True
            if "columns" in mask:
                expected[:, column] = True
            if mask == "positions":
                expected[row, column] = True
        delta = layer.get_delta_weight("default").abs()
        assert torch.equal(delta <= rounding(layer) * (mask == "positions"), expected)
        rows += len({row for row, _ in places})
        columns += len({column for _, column in places})
        positions += len(places)
    assert positions > 4
    assert touched["parameters"] == made.parameters == 8 * 64 * 8
    assert (touched["rows"], touched["columns"]) == (8 * rows, 8 * columns)
    assert (touched["positions"], touched["entries"]) == (positions, 8 * 32 * 32)


def rounding(layer) -> torch.Tensor:
    """By how much two sums for an entry of dW may differ, [D, H]: at positions one is taken off."""
    B, A = factors(layer)
    return 2.0 * 2 * 8 * torch.finfo(torch.float32).eps * (B.abs() @ A.abs())


def test_held_entries_are_those_of_the_beginning(laboratory):
    at = {"top": 5}
    first = adapted(laboratory, steps=0)[1]
    made, layers = adapted(laboratory, mask="rows and columns", scale=0.0, hold=True, at=at)
    for name, layer in layers.items():
        places = [(r, c) for n, r, c in largest(laboratory, 5) if f"layers.{n}." in name and c < 32]
        state = layer.state_dict()  # the factors that it computes with
        B, A = state["lora_B.default.weight"], state["lora_A.default.weight"]
        rows, columns = {r for r, _ in places}, {c for _, c in places}
        for row in range(32):
            assert (not B[row].any()) == (row in rows)
        for column in range(32):
            same = torch.equal(A[:, column], factors(first[name])[1][:, column])
            assert same == (column in columns)


# --- runs ---


CONFIG = dict(
    training(
        tiny.PLAN,
        lora.adapter_of("attention", REPORT)
        | {"mask": "rows", "scale": 0.5, "hold": False, "at": {"top": 5}},
    ).config
) | {"learning_rate": 0.02, "batch_size": 2, "accumulate": 2}  # fmt: skip


def perform(lab, folder, **changes) -> str:
    """The figures of a run as the record has them."""
    folder.mkdir(exist_ok=True)
    return json.dumps(encode(runs.train(lab, CONFIG | changes, folder / "run")))


def test_a_run_is_the_same_again_and_after_an_interruption(laboratory, tmp_path, monkeypatch):
    whole = perform(laboratory, tmp_path / "a")
    assert perform(laboratory, tmp_path / "b") == whole
    assert perform(laboratory, tmp_path / "c", seed=43) != whole

    def stop(stage, done, total):
        if stage == "steps" and done in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(laboratory, "progress", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            perform(laboratory, tmp_path / "d")
    monkeypatch.undo()
    assert perform(laboratory, tmp_path / "d") == whole


def test_a_state_of_another_adapter_is_refused(laboratory, tmp_path):
    perform(laboratory, tmp_path / "a")
    other = CONFIG["adapter"] | {"scale": 0.2}
    with pytest.raises(InvalidInput, match="another adapter"):
        perform(laboratory, tmp_path / "a", adapter=other)


# --- what it needs ---


def test_a_model_without_attention_is_refused():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"down_proj": nn.Linear(4, 4)})])}
    )
    with pytest.raises(InvalidInput, match="ModuleDict has no attention projection"):
        adapters.check_attention(model)


def test_without_peft_it_says_how_to_get_it(laboratory, monkeypatch):
    monkeypatch.setitem(sys.modules, "swkernels.integrations.peft", None)
    monkeypatch.delattr("swkernels.integrations.peft", raising=False)
    with pytest.raises(InvalidInput, match=r"pip install 'swkernels\[peft\]'"):
        adapters.check_attention(laboratory.model)


# --- the page ---


@pytest.mark.parametrize("module", [lora, lora_down])
@pytest.mark.parametrize(("right", "holds"), [(280, True), (200, False), (242, None)])
def test_whether_it_improves(module, right, holds):
    made = {module.run_of(found({}).plan): trained(right, values=9)}
    section = module.section(found(made))
    one = verdict(section, "improves over the baseline")
    assert one.holds is holds
    assert f"{100 * right / QUESTIONS:.1f} %" in one.why
    row = section.parts[0].rows[1]
    assert row[:2] == [module.LABEL, 9] and row[-1] in ("77.3 %", "68.77 %")
    assert module.section(found({})).verdicts == []


def test_runs_are_told_apart_by_seed_and_sweep():
    plan = found({}).plan
    keys = {
        lora.run_of(plan).key,
        lora.run_of(plan, sweep=True).key,
        lora.run_of(plan, seed=43, sweep=True).key,
        lora_mask.run_of(plan, "rows", 0.0).key,
        lora_mask.run_of(plan, "columns", 0.0).key,
    }
    assert len(keys) == 5
    assert lora.run_of(plan, seed=plan.seed) == lora.run_of(plan)
