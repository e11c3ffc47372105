"""Masked LoRA as a PEFT method, and PEFT's own LoRA through the fused operation; tiny models."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="needs peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import swkernels  # noqa: E402
from swkernels.errors import InvalidInput  # noqa: E402
from swkernels.integrations.peft import MaskedLoraConfig, accelerate_lora  # noqa: E402
from swkernels.integrations.peft.lora.mask import MODES  # noqa: E402
from swkernels.train import Coordinates, delta_top  # noqa: E402
from tests.models.tiny import VOCABULARY, H, tiny_model, token_ids  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LISTED = {0: [[3, 4], [5, 6], [3, 9]], 1: [[3, 4], [7, 8]]}
KINDS = [(mode, scale, False) for mode in MODES for scale in (0.0, 0.2, 1.0)]
KINDS += [(mode, 0.0, True) for mode in MODES]

pytestmark = pytest.mark.filterwarnings("ignore:.*coordinates lie outside")


def masked_config(mode="rows", scale=0.0, hold=False, **changes) -> MaskedLoraConfig:
    arguments = {
        "r": 4, "lora_alpha": 8, "target_modules": TARGETS, "coordinates": LISTED,
        "mask": mode, "mask_scale": scale, "hold": hold, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return MaskedLoraConfig(**arguments | changes)


def plain_config(**changes) -> LoraConfig:
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**arguments | changes)


def lora_layers(model) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def set_random(model, seed=0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    for layer in lora_layers(model).values():
        for adapter in getattr(layer, "masks", {}):
            layer.take_held(adapter)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def train(model, steps=3, decay=0.1, optimizer=None):
    ids = token_ids()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trainable, lr=1e-2, weight_decay=decay)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def deltas(model) -> dict[str, torch.Tensor]:
    """dW [D, H] of each layer, from what it contributes to its output."""
    found = {}
    for name, layer in lora_layers(model).items():
        eye = torch.eye(layer.in_features)
        with torch.no_grad():
            found[name] = (layer(eye) - layer.base_layer(eye)).T
    return found


def place_of(name, layer):
    """The coordinates that LISTED has for a layer."""
    block = int(name.split(".")[2])
    shape = layer.out_features, layer.in_features
    return [(row, col) for row, col in LISTED.get(block, []) if row < shape[0] and col < shape[1]]


def expected_delta(name, layer, mode, scale):
    A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach() for part in "AB")
    A, B = A.clone(), B.clone()
    pairs = place_of(name, layer)
    if "rows" in mode:
        B[sorted({row for row, _ in pairs})] *= scale
    if "columns" in mode:
        A[:, sorted({col for _, col in pairs})] *= scale
    dW = layer.scaling["default"] * B @ A
    if mode == "positions":
        for row, col in pairs:
            dW[row, col] *= scale
    return dW


@pytest.mark.parametrize("mode, scale, hold", [kind for kind in KINDS if not kind[2]])
def test_the_mask_is_the_formula(mode, scale, hold):
    model = get_peft_model(tiny_model("llama"), masked_config(mode, scale))
    set_random(model)
    masked = 0
    for name, dW in deltas(model).items():
        layer = lora_layers(model)[name]
        torch.testing.assert_close(
            dW, expected_delta(name, layer, mode, scale), rtol=1e-5, atol=1e-6
        )
        masked += len(place_of(name, layer))
    assert masked >= 10


@pytest.mark.parametrize("mode, scale, hold", KINDS)
def test_files_open_in_stock_peft_and_here(mode, scale, hold, tmp_path):
    model = get_peft_model(tiny_model("llama"), masked_config(mode, scale, hold))
    before = logits(model)
    train(model)
    want = logits(model.eval())
    assert not torch.allclose(want, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not {"mask", "coordinates", "hold"} & set(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert type(stock.base_model) is peft.LoraModel
    torch.testing.assert_close(logits(stock), want, rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path, config=MaskedLoraConfig.from_pretrained(tmp_path)
    )
    assert torch.equal(logits(again), want)
    ordinary = mode != "positions" or not hold
    ordinary &= not 0 < scale < 1 or mode == "positions"
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        endings = {key.rpartition(".")[2] for key in file.keys()}
    assert endings == ({"weight"} if ordinary else {"weight", "originals"})
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_positions_in_files_with_patterns(rslora, tmp_path):
    config = masked_config(
        "positions", 0.5, use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}
    )
    model = get_peft_model(tiny_model("llama"), config)
    set_random(model)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path, config=MaskedLoraConfig.from_pretrained(tmp_path)
    )
    assert torch.equal(logits(again), logits(model))
    assert {layer.r["default"] for layer in lora_layers(again).values()} == {2, 4}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_held_stays_under_weight_decay(mode):
    model = get_peft_model(tiny_model("llama"), masked_config(mode, hold=True))
    set_random(model)
    before = {name: dW.clone() for name, dW in deltas(model).items()}
    factors = {name: layer.effective_factors("default", torch.device("cpu")) for name, layer in
               lora_layers(model).items()}  # fmt: skip
    factors = {name: (A.clone(), B.clone()) for name, (A, B, _) in factors.items()}
    train(model, decay=0.5)
    for name, layer in lora_layers(model).items():
        A, B, _ = layer.effective_factors("default", torch.device("cpu"))
        pairs = place_of(name, layer)
        rows, cols = sorted({r for r, _ in pairs}), sorted({c for _, c in pairs})
        if "rows" in mode:
            assert torch.equal(B[rows], factors[name][1][rows])
            assert (layer.lora_B["default"].weight.grad[rows] == 0).all()
        if "columns" in mode:
            assert torch.equal(A[:, cols], factors[name][0][:, cols])
            assert (layer.lora_A["default"].weight.grad[:, cols] == 0).all()
        if mode == "positions":
            now = deltas(model)[name]
            for row, col in pairs:
                torch.testing.assert_close(
                    now[row, col], before[name][row, col], rtol=1e-4, atol=1e-6
                )
        assert not torch.allclose(deltas(model)[name], before[name], atol=1e-3)


def test_masked_rows_get_exactly_no_gradient():
    model = get_peft_model(tiny_model("llama"), masked_config("rows and columns", 0.0))
    set_random(model)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in lora_layers(model).items():
        pairs = place_of(name, layer)
        grad_A, grad_B = (getattr(layer, f"lora_{p}")["default"].weight.grad for p in "AB")
        assert (grad_B[sorted({r for r, _ in pairs})] == 0).all() and grad_B.any()
        assert (grad_A[:, sorted({c for _, c in pairs})] == 0).all() and grad_A.any()


def test_a_scale_of_one_is_bit_equal_to_no_mask_and_near_peft():
    models = []
    for config in (masked_config(scale=1.0), masked_config(coordinates=None), plain_config()):
        torch.manual_seed(0)
        models.append(get_peft_model(tiny_model("llama"), config))
    losses = [train(model) for model in models]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert torch.equal(logits(models[0]), logits(models[1]))
    torch.testing.assert_close(logits(models[0]), logits(models[2]), rtol=1e-4, atol=1e-5)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = torch.randint(
            0, VOCABULARY, (24, 12), generator=torch.Generator().manual_seed(5)
        )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model, folder, steps, **changes):
    arguments = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "weight_decay": 0.1, "save_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1,
    }  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(**arguments | changes), train_dataset=Rows())


@pytest.mark.parametrize(
    "mode, scale, hold, dropout",
    [(*kind, 0.0) for kind in KINDS if kind[1] != 1.0] + [("positions", 0.2, False, 0.2)],
)
def test_trainer_resumes_bit_equally(mode, scale, hold, dropout, tmp_path):
    def model():
        torch.manual_seed(0)
        return get_peft_model(
            tiny_model("llama"), masked_config(mode, scale, hold, lora_dropout=dropout)
        )

    whole = trainer(model(), tmp_path / "whole", 4)
    whole.train()
    rest = trainer(model(), tmp_path / "rest", 4)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(rest.model.eval()), logits(whole.model.eval()))


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_gives_the_same_gradients(kind):
    ids, grads = token_ids(), {}
    for used in ("none", kind):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model("llama"), masked_config("positions", 0.5, lora_dropout=0.2)
        )
        set_random(model)
        model.train()
        if used != "none":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": used == "reentrant"})
        torch.manual_seed(7)
        model(input_ids=ids, labels=ids).loss.backward()
        grads[used] = [p.grad for p in model.parameters() if p.requires_grad]
    for first, second in zip(grads["none"], grads[kind]):
        torch.testing.assert_close(first, second)


def test_q_k_and_v_share_one_reading(monkeypatch):
    from swkernels.integrations.peft.lora import fused

    calls = []
    real = fused.lora_project

    def counted(x, As, *rest):
        calls.append(len(As))
        return real(x, As, *rest)

    monkeypatch.setattr(fused, "lora_project", counted)
    model = get_peft_model(tiny_model("llama"), masked_config("columns", 0.5))
    set_random(model)
    logits(model)
    assert calls == [3, 1] * 3
    q = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    assert q.shared_input._source is None and not q.shared_input._ready  # nothing is kept


def test_shared_input_never_serves_another_input():
    model = get_peft_model(tiny_model("llama"), masked_config("columns", 0.5))
    set_random(model)
    layers = lora_layers(model)
    q, k = (layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    shared, alone = q.shared_input, {}
    x = torch.randn(5, H)
    for layer in (q, k):
        layer.shared_input = None
        alone[layer] = [layer(x), layer(x + 1), layer(2 * x)]
    for layer in (q, k):
        layer.shared_input = shared
    other = x + 1
    torch.testing.assert_close(q(x), alone[q][0])
    torch.testing.assert_close(k(other), alone[k][1])  # as in cross-attention
    torch.testing.assert_close(k(x), alone[k][0])
    torch.testing.assert_close(q(x), alone[q][0])
    y = x.clone()
    q(y)
    y.mul_(2)  # the tensor is the same, what is in it is not
    torch.testing.assert_close(k(y), alone[k][2])
    with torch.no_grad():
        q(y)
    assert k(y).requires_grad


def test_saved_activations_are_little_more_than_the_input():
    def saved_by(config):
        torch.manual_seed(0)
        model = nn.Module()
        model.q_proj, model.k_proj, model.v_proj = (nn.Linear(256, 256) for _ in range(3))
        model.forward = lambda x: model.q_proj(x) + model.k_proj(x) + model.v_proj(x)
        model = get_peft_model(model, config)
        kept, x = {}, torch.randn(512, 256, requires_grad=True)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model.base_model.model.forward(x)
        size = sum(
            t.numel() for key, t in kept.items() if key not in parameters and t.numel() > 4096
        )
        y.sum().backward()
        return size / x.numel()

    changes = {"target_modules": TARGETS[:3], "task_type": None, "lora_dropout": 0.1}
    changes["coordinates"] = {f"{name}": [[3, 4]] for name in TARGETS[:3]}
    assert saved_by(masked_config("rows", 0.5, **changes)) <= 1.1
    del changes["coordinates"]
    assert saved_by(plain_config(**changes)) > 2


def test_adapters_come_and_go():
    base = tiny_model("llama")
    before = logits(base)
    model = get_peft_model(base, masked_config("rows", 0.5))
    model.add_adapter("second", masked_config("positions", 0.2, r=3, lora_alpha=6))
    set_random(model)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
    torch.testing.assert_close(logits(model.unload()), before, rtol=1e-4, atol=1e-5)


def test_conv1d():
    config = masked_config("rows and columns", 0.5, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(tiny_model("gpt2"), config)
    set_random(model)
    want = logits(model)
    [layer, *_] = lora_layers(model).values()
    pairs = LISTED[0]
    A, B = (getattr(layer, f"lora_{part}")["default"].weight.detach().clone() for part in "AB")
    B[[row for row, _ in pairs[:2]]] *= 0.5
    A[:, [col for _, col in pairs]] *= 0.5
    torch.testing.assert_close(layer.get_delta_weight("default"), (2.0 * B @ A).T)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    import bitsandbytes as bnb


    def packed_model():
        tiny = tiny_model("llama")
        # Evaluating on a CPU, bitsandbytes repacks the weight: rows of whole blocks of 64 only.
        tiny.config.hidden_size = 64
        torch.manual_seed(0)
        base = type(tiny)(tiny.config).eval()
        for layer in base.model.layers:
            dense = layer.self_attn.q_proj
            D, wide = dense.weight.shape
            if bits == 4:
                packed = bnb.nn.Linear4bit(wide, D, bias=False, compute_dtype=torch.float32)
                packed.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False)
            else:
                packed = bnb.nn.Linear8bitLt(wide, D, bias=False, has_fp16_weights=False)
                packed.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False)
            layer.self_attn.q_proj = packed.to("cpu")
        setattr(base, f"is_loaded_in_{bits}bit", True)
        return base

    base = packed_model()
    before = logits(base)
    model = get_peft_model(base, masked_config("positions", 0.2, target_modules=["q_proj"]))
    assert torch.equal(logits(model), before)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(packed_model(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model.eval()), rtol=1e-4, atol=1e-5)
    report = accelerate_lora(stock)
    assert len(report.taken) == 3 and not report.left
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerated_peft_computes_as_peft(dtype):
    ids, results = token_ids(), []
    for fused in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama").to(dtype), plain_config())
        set_random(model)
        names = set(dict(model.named_modules())), set(model.state_dict())
        if fused:
            report = swkernels.accelerate_lora(model)
            assert len(report.taken) == 12 and not report.left
            assert "12 LoRA layers accelerated, 0 left" in str(report)
        assert names == (set(dict(model.named_modules())), set(model.state_dict()))
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([out.logits.detach(), *grads])
        assert {g.dtype for g in grads} == {torch.float32}
    tight = dtype == torch.float32
    for stock, ours in zip(*results):
        limit = float(stock.abs().max()) * (1e-5 if tight else 3e-2)
        assert float((stock - ours).abs().max()) <= limit
    report.remove()
    assert not any("forward" in layer.__dict__ for layer in lora_layers(model).values())
    assert torch.equal(model(input_ids=ids).logits, results[0][0])


def test_what_is_not_covered_falls_to_peft():
    model = get_peft_model(tiny_model("llama"), plain_config())
    set_random(model)
    model.add_adapter("second", plain_config(r=2))
    want = {}
    cases = {
        "one": lambda: model.set_adapter("default"),
        "two": lambda: model.base_model.set_adapter(["default", "second"]),
        "merged": lambda: model.merge_adapter(),
    }
    for fused in (False, True):
        if fused:
            model.unmerge_adapter()
            accelerate_lora(model)
        for name, change in cases.items():
            change()
            found = logits(model)
            torch.testing.assert_close(found, want.setdefault(name, found), rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(
                logits(model), logits(tiny_model("llama")), rtol=1e-4, atol=1e-5
            )
    model.unmerge_adapter()
    model.eval()
    mixed = model(input_ids=token_ids(), adapter_names=["default"] * len(token_ids())).logits
    torch.testing.assert_close(mixed, want["one"], rtol=1e-4, atol=1e-5)


def test_accelerate_says_what_it_left():
    model = get_peft_model(tiny_model("llama"), plain_config(use_dora=True))
    with pytest.raises(InvalidInput, match="a variant of LoRA .DoraLinearVariant"):
        accelerate_lora(model)
    mixed = get_peft_model(
        tiny_model("llama"), plain_config(target_modules=["q_proj", "embed_tokens"])
    )
    report = accelerate_lora(mixed)
    assert len(report.taken) == 3 and list(report.left.values()) == ["a layer.Embedding layer"]
    assert "1 left: a layer.Embedding layer" in str(report)
    report.remove()
    with pytest.raises(InvalidInput, match="Embedding"):
        accelerate_lora(mixed, strict=True)
    assert not any("forward" in layer.__dict__ for layer in lora_layers(mixed).values())
    with pytest.raises(InvalidInput, match="no LoRA layer"):
        accelerate_lora(tiny_model("llama"))
    masked = get_peft_model(tiny_model("llama"), masked_config())
    with pytest.raises(InvalidInput, match="masked layer"):
        accelerate_lora(masked)


def test_delta_top_and_holding_it(tmp_path):
    model = get_peft_model(tiny_model("llama"), plain_config())
    set_random(model)
    found = delta_top(model, 20)
    assert len(found.entries) == len(found.coordinates) == 20
    every = [
        (abs(value), name, row, col)
        for name, dW in deltas(model).items()
        for row, line in enumerate(dW.tolist())
        for col, value in enumerate(line)
    ]
    every.sort(key=lambda entry: -entry[0])
    assert {(n, r, c) for _, n, r, c in every[:20]} == {entry[:3] for entry in found.entries}
    assert [abs(v) for *_, v in found.entries] == pytest.approx(
        [e[0] for e in every[:20]], rel=1e-4
    )
    model.save_pretrained(tmp_path)
    assert delta_top(tmp_path, 20).entries == found.entries
    # Training goes on with these rows and columns, then with these positions, held.
    for mode in ("rows and columns", "positions"):
        config = masked_config(mode, hold=True, coordinates=found.coordinates)
        held = PeftModel.from_pretrained(
            tiny_model("llama"), tmp_path, config=config, is_trainable=True
        )
        torch.testing.assert_close(logits(held), logits(model), rtol=1e-5, atol=1e-6)
        before = deltas(held)
        train(held)
        after = deltas(held)
        for name, row, col, _ in found.entries:
            torch.testing.assert_close(
                after[name][row, col], before[name][row, col], rtol=1e-3, atol=1e-5
            )
        assert any(not torch.allclose(after[name], before[name], atol=1e-3) for name in after)


def test_delta_top_of_what_is_none(tmp_path):
    with pytest.raises(InvalidInput, match="no LoRA"):
        delta_top(tiny_model("llama"), 3)
    model = get_peft_model(tiny_model("llama"), plain_config())
    with pytest.raises(InvalidInput, match="no adapter 'other': the model has"):
        delta_top(model, 3, name="other")
    for k in (0, -1, 2.0, True):
        with pytest.raises(InvalidInput, match="k must be an integer from 1"):
            delta_top(model, k)
    with pytest.raises(InvalidInput, match="cannot read"):
        delta_top(tmp_path, 3)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    with pytest.raises(InvalidInput, match="adapter_model.safetensors: No such file"):
        delta_top(tmp_path, 3)


# --- what is wrong is said before anything changes ---


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": 2.0}, "r must be"),
        ({"mask": "entries"}, "mask must be one of rows, columns"),
        ({"mask_scale": 1.5}, r"must lie in \[0, 1\], got 1.5"),
        ({"mask_scale": float("nan")}, "must be a number"),
        ({"coordinates": {}}, "not empty"),
        ({"coordinates": {0: [[1, 2, 3]]}}, r"integers \[k, 2\]"),
        ({"coordinates": {0: [[-1, 2]]}}, "negative"),
        ({"coordinates": {1.5: [[1, 2]]}}, "the number of a layer"),
        ({"coordinates": "nowhere.json"}, "cannot read nowhere.json"),
        ({"use_dora": True}, "does not combine with use_dora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_bad_configurations(changes, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        masked_config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"strict": True, "coordinates": {0: [[3, 4], [500, 4]]}}, "1 coordinates .* outside"),
        ({"coordinates": {7: [[3, 4]]}}, "no coordinate lies in any of the 12 adapted modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens .* is no linear layer"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "no linear layer"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(changes, says):
    model = tiny_model("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InvalidInput, match=says):
        get_peft_model(model, masked_config(**changes))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_coordinates_outside_are_counted():
    with pytest.warns(UserWarning, match="4 coordinates lie outside"):
        get_peft_model(tiny_model("llama"), masked_config(coordinates={0: [[3, 4], [3, 5000]]}))


@pytest.mark.parametrize("saved, opened", [
    (("rows", 0.0), ("rows", 0.5)), (("rows", 0.5), ("rows", 0.2)), (("rows", 0.5), ("rows", 0.0)),
    (("positions", 0.5), ("rows", 0.5)), (None, ("rows", 0.0)), (None, ("positions", 0.0)),
    (None, ("columns", 0.5)), (("columns", 0.5), ("rows", 0.5)),
])  # fmt: skip
def test_an_adapter_of_another_mask_is_refused(saved, opened, tmp_path):
    config = plain_config() if saved is None else masked_config(*saved)
    model = get_peft_model(tiny_model("llama"), config)
    set_random(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny_model("llama"), masked_config(*opened))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InvalidInput, match="trained with another mask, or with none"):
        peft.set_peft_model_state_dict(other, peft.load_peft_weights(str(tmp_path)))
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_damaged_mask_file(tmp_path):
    model = get_peft_model(tiny_model("llama"), masked_config())
    model.save_pretrained(tmp_path)
    path = tmp_path / "swkernels_mask.json"
    for text, says in (("{", "as JSON"), ('{"format": "x"}', "no file of"), ("[]", "damaged")):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=says):
            MaskedLoraConfig.from_pretrained(tmp_path)
    path.unlink()
    assert not MaskedLoraConfig.from_pretrained(tmp_path).is_masked


def test_mixed_batches_and_weighted_adapters_are_refused():
    model = get_peft_model(tiny_model("llama"), masked_config())
    with pytest.raises(InvalidInput, match="adapter_names"):
        lora_layers(model)["model.layers.0.self_attn.q_proj"](
            torch.randn(2, H), adapter_names=["default"] * 2
        )
    with pytest.raises(InvalidInput, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_coordinates_of_a_file_and_of_a_report_name_their_layer(tmp_path):
    base = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    coordinates = Coordinates.of({name: [[3, 4], [5, 6]]}, base)
    coordinates.save(tmp_path / "coordinates.json")
    config = masked_config(coordinates=str(tmp_path / "coordinates.json"))
    model = get_peft_model(base, config)
    masked = {n for n, layer in lora_layers(model).items() if layer.masks}
    assert masked == {f"model.layers.1.self_attn.{t}" for t in TARGETS}
    again = get_peft_model(tiny_model("llama"), masked_config(coordinates=coordinates))
    assert {n for n, layer in lora_layers(again).items() if layer.masks} == masked
