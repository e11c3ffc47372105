"""What the tests of studies run on."""

from __future__ import annotations

import pytest

from tests.cli.conftest import planted  # noqa: F401
from tests.studies import tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("study") / "data")
