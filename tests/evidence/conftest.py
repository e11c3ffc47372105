"""What the tests of several measurements run on."""

from __future__ import annotations

import pytest

from swkernels.detect.perplexity import tokens_of
from swkernels.evidence.yardstick import Yardstick
from tests.cli.checkpoints import TEXT, make_model, make_tokenizer, plant


@pytest.fixture
def model():
    """A tiny one with a super weight in layer 1, [5, 7]."""
    made = make_model(initializer_range=0.3)
    plant(made)
    return made


@pytest.fixture
def yardstick():
    return Yardstick(tokens_of(TEXT * 6, make_tokenizer()), window=32)
