"""lm-eval's own runner over models that are changed in memory."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval")

from swkernels.errors import InvalidInput  # noqa: E402
from swkernels.evidence.edits import Edits  # noqa: E402
from swkernels.integrations.lm_eval import as_lm, figures, lm_eval, tasks_of  # noqa: E402
from swkernels.quant import QuantConfig, quantize  # noqa: E402
from swkernels.train import Coordinates  # noqa: E402
from tests.cli.checkpoints import WORDS, make_model, make_tokenizer, plant  # noqa: E402

DOWN = "model.layers.1.mlp.down_proj"


def questions(count: int) -> list[dict]:
    """Random words of the tiny vocabulary."""
    draw = random.Random(3)
    return [
        {
            "context": " ".join(draw.choices(WORDS, k=3)),
            "choices": [" ".join(draw.choices(WORDS, k=draw.randint(1, 2))) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(count)
    ]


ROWS = questions(12)


@pytest.fixture
def tiny(tmp_path) -> dict:
    """A task of lm-eval as the dictionary of its YAML file, with its data on disk."""
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@pytest.fixture
def model():
    model = make_model(initializer_range=0.4)
    plant(model)
    return model


def score(lm) -> list[tuple[float, bool]]:
    requests = [SimpleNamespace(args=(r["context"], f" {c}")) for r in ROWS for c in r["choices"]]
    return lm.loglikelihood(requests, disable_tqdm=True)


def by_hand(model, tokenizer) -> float:
    """The accuracy by lm-eval's acc: the largest summed log-likelihood, in a few lines."""
    right = 0
    for row in ROWS:
        context, sums = tokenizer(row["context"])["input_ids"], []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['context']} {choice}")["input_ids"]])
            with torch.no_grad():
                rows = model(ids).logits[0].log_softmax(-1)
            places = range(len(context), ids.shape[1])
            sums.append(sum(float(rows[at - 1, ids[0, at]]) for at in places))
        right += max(range(len(sums)), key=sums.__getitem__) == row["answer"]
    return right / len(ROWS)


def test_an_edited_model_is_what_is_measured(model):
    lm = as_lm(model, make_tokenizer(), batch_size=2)
    assert lm.model is model
    before = score(lm)
    edits = Edits(model, Coordinates.of({DOWN: [[5, 7]]}, {DOWN: (32, 48)}))
    with edits.zeroed():
        zeroed = score(lm)
        assert zeroed == score(as_lm(model, make_tokenizer(), batch_size=2))
    assert max(abs(a - b) for (a, _), (b, _) in zip(before, zeroed)) > 0.1
    assert score(lm) == before


def test_a_task(model, tiny):
    tokenizer = make_tokenizer()
    found = lm_eval(model, tokenizer, [tiny], batch_size=3)
    assert found["results"]["tiny"]["acc,none"] == by_hand(model, tokenizer)
    assert found["n-samples"]["tiny"] == {"original": len(ROWS), "effective": len(ROWS)}
    assert "samples" not in found

    edits = Edits(model, Coordinates.of({DOWN: [[5, 7]]}, {DOWN: (32, 48)}))
    with edits.zeroed():
        changed = lm_eval(model, tokenizer, [tiny], batch_size=3)
        assert changed["results"]["tiny"]["acc,none"] == by_hand(model, tokenizer)
    assert changed["results"] != found["results"]
    assert figures(lm_eval(model, tokenizer, [tiny], batch_size=3)) == figures(found)
    limited = lm_eval(model, tokenizer, [tiny], limit=2, log_samples=True)
    assert limited["n-samples"]["tiny"]["effective"] == len(limited["samples"]["tiny"]) == 2


def test_a_quantized_model(model, tiny):
    quantize(model, QuantConfig(block_size=16), progress=False)
    tokenizer = make_tokenizer()
    found = lm_eval(model, tokenizer, [tiny])
    assert found["results"]["tiny"]["acc,none"] == by_hand(model, tokenizer)


def test_an_adapted_model(model, tiny):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    found = lm_eval(adapted, make_tokenizer(), [tiny])
    assert found["results"]["tiny"]["acc,none"] == by_hand(adapted, make_tokenizer())


def test_the_model_and_its_tokenizer_are_left_as_they_were(model, tiny):
    model.train()
    model.model.layers[0].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    tokenizer = make_tokenizer()
    lm_eval(model, tokenizer, [tiny])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert "tie_weights" not in vars(model)


def test_weights_that_were_untied_stay_so():
    model = make_model(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    as_lm(model, make_tokenizer())
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_task_of_a_file(tiny, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(tiny))  # which is YAML, too
    assert tasks_of(f" {path} ,{path}") == [str(path)] * 2
    assert tasks_of([tiny, str(path)]) == [tiny, str(path)]
    found = lm_eval(make_model(), make_tokenizer(), str(path), limit=2)
    assert found["n-samples"]["tiny"]["effective"] == 2


def test_a_folder_of_tasks(tiny, tmp_path, few_tasks):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(tiny))
    found = lm_eval(
        make_model(), make_tokenizer(), "tiny", include_path=tmp_path / "tasks", limit=2
    )
    assert found["n-samples"]["tiny"]["effective"] == 2


@pytest.fixture
def few_tasks(monkeypatch):
    """Without the index of lm-eval's 14,000 own tasks, which takes seconds."""
    import lm_eval.tasks as library

    from swkernels.integrations.lm_eval import _manager

    class Few(library.TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            assert include_defaults
            super().__init__(include_path=include_path, include_defaults=False)
            self._all_tasks += ["arc_easy", "arc_challenge", "wikitext"]

    monkeypatch.setattr(library, "TaskManager", Few)
    _manager.cache_clear()
    yield
    _manager.cache_clear()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("arc_eassy", "lm-eval knows no task 'arc_eassy': did you mean arc_easy"),
        ("arc_easy,zzz", "lm-eval knows no task 'zzz': lm-eval ls tasks lists them"),
        ("", "expected the name of a task"),
        ("arc_easy,,wikitext", "expected the name of a task"),
        ([], "expected the name of a task"),
    ],
)
def test_tasks_that_are_not_known(few_tasks, tasks, message):
    with pytest.raises(InvalidInput, match=message) as error:
        tasks_of(tasks)
    assert "\n" not in str(error.value)
    assert tasks_of("arc_easy, wikitext") == ["arc_easy", "wikitext"]


def test_data_that_cannot_be_loaded(model, tiny):
    away = tiny | {"dataset_path": "nobody/nowhere", "dataset_kwargs": None}
    with pytest.raises(InvalidInput, match="cannot load tiny of lm-eval: .*network") as error:
        lm_eval(model, make_tokenizer(), [away])
    assert "\n" not in str(error.value)


def test_without_the_library(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for call in (lambda: as_lm(model, make_tokenizer()), lambda: tasks_of("arc_easy")):
        with pytest.raises(InvalidInput, match=r"pip install 'swkernels\[lm-eval\]'"):
            call()


def test_what_lm_eval_cannot_take(model):
    with pytest.raises(InvalidInput, match="batch_size must be at least 1, got 0"):
        as_lm(model, make_tokenizer(), batch_size=0)
    with pytest.raises(InvalidInput, match="needs a model of transformers, got Linear"):
        as_lm(torch.nn.Linear(2, 2), make_tokenizer())


def test_its_remarks_are_left_out(model, caplog):
    as_lm(model, make_tokenizer(), max_length=16)
    assert not caplog.records
    assert as_lm(model, make_tokenizer(), max_length=16).max_length == 16
