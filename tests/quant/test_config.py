"""QuantConfig: its fields, its JSON, what it refuses."""

from __future__ import annotations

import json

import pytest

from swkernels.backends.plan import Clip
from swkernels.errors import InvalidInput
from swkernels.quant import QuantConfig
from swkernels.quant.config import matches

CONFIGS = [
    QuantConfig(),
    QuantConfig(code="int8", symmetric=False, block_size=(16, 8), clip=Clip("zscore", 9)),
    QuantConfig(code="nf4", block_size="tensor", scale_dtype="int8", outlier_dtype="bfloat16"),
    QuantConfig(largest=3, largest_per="block", include=["down_proj"], exclude="lm_head"),
    QuantConfig(embeddings="int8"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_brings_it_back(config):
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hash(config)


def test_missing_fields_have_their_defaults():
    assert QuantConfig.from_dict({"code": "fp4"}) == QuantConfig(code="fp4")


def test_bits():
    assert [QuantConfig(code=code).bits for code in ("int4", "nf4", "fp4", "int8")] == [4, 4, 4, 8]


def test_embeddings_have_a_code_of_their_own():
    ends = QuantConfig(code="int4", symmetric=False, embeddings="nf4").of_embeddings()
    assert (ends.code, ends.symmetric) == ("nf4", True)
    ends = QuantConfig(code="int4", symmetric=False, embeddings="int8").of_embeddings()
    assert (ends.code, ends.symmetric) == ("int8", False)


@pytest.mark.parametrize(
    "name, pattern, found",
    [
        ("model.layers.0.mlp.down_proj", "down_proj", True),
        ("model.layers.0.mlp.down_proj", "proj", False),  # the end begins at a dot
        ("model.layers.0.mlp.down_proj", "layers.0.*", True),
        ("model.layers.10.mlp.down_proj", "layers.0.*", False),
        ("model.layers.0.mlp.down_proj", "model.layers.?.mlp.*", True),
        ("lm_head", "lm_head", True),
    ],
)
def test_patterns(name, pattern, found):
    assert matches(name, (pattern,)) is found


BAD = {
    "code": ({"code": "int3"}, "unknown code 'int3'"),
    "symmetric": ({"symmetric": 1}, "symmetric must be True or False"),
    "table": ({"code": "nf4", "symmetric": False}, "nf4 is symmetric"),
    "block": ({"block_size": 0}, "block_size must be a positive integer"),
    "block's type": ({"block_size": 64.0}, "block_size must be a positive integer"),
    "clip": ({"clip": "zscore"}, "clip must be None or a Clip"),
    "scales": ({"scale_dtype": "bfloat16"}, "unknown scale_dtype 'bfloat16'"),
    "largest": ({"largest": -1}, "largest must be an integer from 0"),
    "largest's type": ({"largest": True}, "largest must be an integer from 0"),
    "per": ({"largest_per": "row"}, "largest_per must be 'tensor' or 'block'"),
    "outliers": ({"outlier_dtype": "int8"}, "outlier_dtype must be None, float32"),
    "embeddings": ({"embeddings": True}, "embeddings must be None or one of int4"),
    "include": ({"include": [""]}, "include must be patterns of names"),
    "exclude": ({"exclude": 3}, "exclude must be patterns of names"),
}


@pytest.mark.parametrize("name", BAD)
def test_fields_that_are_refused(name):
    fields, message = BAD[name]
    with pytest.raises(InvalidInput, match=message):
        QuantConfig(**fields)


@pytest.mark.parametrize(
    "document, message",
    [
        (["int4"], "expected the fields of a QuantConfig, got list"),
        ({"bits": 4}, "unknown field 'bits': expected code"),
        ({"clip": {"by": "zscore"}}, "clip must have by and value, got by"),
        ({"clip": {"by": "median", "value": 1}}, "unknown clip 'median'"),
    ],
)
def test_documents_that_are_refused(document, message):
    with pytest.raises(InvalidInput, match=message):
        QuantConfig.from_dict(document)
