"""The tuning records: which file wins, what matches, what a broken file says."""

from __future__ import annotations

import json

import pytest

from swkernels import tuning
from swkernels.errors import InvalidInput

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def user_directory(monkeypatch, tmp_path):
    tuning.clear_cache()
    monkeypatch.setenv("SWKERNELS_TUNING", str(tmp_path))
    yield tmp_path
    tuning.clear_cache()


def write(path, *records, device=H100, **content):
    content = {"schema": tuning.SCHEMA, "device": device, "measured": True, **content}
    path.write_text(json.dumps(content | {"records": list(records)}))


def record(variant="descriptors", **fields):
    return {"op": "linear_absmax", "variant": variant, "config": {"BLOCK_T": 64}, **fields}


def look(tokens=1000, dtype="bfloat16", device=H100, architecture="sm_90", **options):
    return tuning.lookup(
        "linear_absmax", device, 4096, 14336, tokens, dtype, architecture=architecture, **options
    )


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(0, 16), (1, 16), (16, 16), (17, 64), (1000, 1024), (65536, 65536), (10**9, 65536)],
)
def test_token_bucket(tokens, bucket):
    assert tuning.token_bucket(tokens) == bucket


def test_without_a_record_linear_takes_the_library_and_nothing_is_called_measured():
    choice = look()
    assert choice.variant == "two_pass"
    assert choice.measured is False
    assert choice.source.endswith("default.json")


def test_the_fused_kernel_has_a_default_configuration_everywhere():
    for architecture in (
        "sm_80",
        "sm_86",
        "sm_90",
        "sm_100",
        "sm_103",
        "sm_120",
        "gfx90a",
        "gfx942",
    ):
        for dtype in ("float32", "tfloat32", "bfloat16", "float16"):
            choice = look(dtype=dtype, architecture=architecture, variant="pointers")
            assert {"BLOCK_T", "BLOCK_D", "BLOCK_H", "GROUP_T"} <= choice.config.keys()


def test_the_users_file_wins_for_its_device_only(user_directory):
    write(user_directory / "h100.json", record())
    assert look().variant == "descriptors"
    assert look().measured is True
    assert look().source == str(user_directory / "h100.json")
    assert look(device="NVIDIA A100-SXM4-40GB", architecture="sm_80").variant == "two_pass"


def test_the_variable_may_name_a_file(user_directory, monkeypatch):
    write(user_directory / "x.txt", record("pointers"))
    monkeypatch.setenv("SWKERNELS_TUNING", str(user_directory / "x.txt"))
    assert look().variant == "pointers"


@pytest.mark.parametrize(
    ("field", "value", "other"),
    [
        ("rows", 4096, 4097),
        ("columns", 14336, 14335),
        ("tokens", 1024, 4096),
        ("dtypes", ["bfloat16"], ["float16"]),
        ("architectures", ["sm_8*", "sm_9*"], ["sm_10*"]),
    ],
)
def test_each_field_must_match(user_directory, field, value, other):
    write(user_directory / "a.json", record(**{field: other}), record("pointers", **{field: value}))
    assert look().variant == "pointers"
    tuning.clear_cache()
    write(user_directory / "a.json", record(**{field: other}))
    assert look().variant == "two_pass"


def test_a_variant_can_be_asked_for(user_directory):
    write(user_directory / "a.json", record("two_pass"), record("pointers"))
    assert look().variant == "two_pass"
    assert look(variant="pointers").config == {"BLOCK_T": 64}


def test_nobody_can_change_a_configuration_that_others_share():
    with pytest.raises(TypeError):
        look(variant="pointers").config["BLOCK_T"] = 1


def test_no_record_is_an_error_that_says_so():
    with pytest.raises(InvalidInput, match=r"no tuning record for linear_absmax \(split\)"):
        look(variant="split")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"schema": "other/1", "records": []}', "schema is 'other/1'"),
        ('{"records": []}', "'schema'"),
        ('{"schema": "swkernels.tuning/1", "records": [{"op": "x"}]}', "lacks config, variant"),
    ],
)
def test_a_broken_file_is_named(user_directory, text, says):
    (user_directory / "bad.json").write_text(text)
    with pytest.raises(InvalidInput, match="cannot read the tuning file") as raised:
        look()
    assert says in str(raised.value)
    assert "bad.json" in str(raised.value)
