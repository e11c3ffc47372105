"""The process that runs commands, and a checkpoint to run them on."""

from __future__ import annotations

import pytest

from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, plant
from tests.faults.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="session")
def intact(tmp_path_factory):
    """A folder with a model in two files of weights, 0.3 MB, and a text; nobody writes to it."""
    folder = tmp_path_factory.mktemp("intact")
    model = make_model(hidden_size=64, intermediate_size=160)
    plant(model)
    model.save_pretrained(folder / "model", max_shard_size="200KB")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 40)
    assert len(list((folder / "model").glob("*.safetensors"))) == 2
    return folder
