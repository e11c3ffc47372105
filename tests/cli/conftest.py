"""What the tests of several commands run on."""

from __future__ import annotations

import pytest

from tests.cli.checkpoints import TEXT, make_model, plant, save


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """The folder of a tiny model with a super weight; no command may change it."""
    model = make_model(initializer_range=0.3)
    plant(model)
    return save(model, tmp_path_factory.mktemp("models") / "planted")


@pytest.fixture(scope="session")
def short_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT * 6, encoding="utf-8")
    return path
