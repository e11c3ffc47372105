"""``swkernels guard``: exit codes, keys, what is printed."""

from __future__ import annotations

import json

import pytest

from swkernels.cli import main
from tests.guard.checkpoints import NAME, H, coordinates, flip_in, write

WEIGHT = f"{NAME.format(1)}.weight"


@pytest.fixture
def model(tmp_path):
    coordinates().save(tmp_path / "coordinates.json")
    return write(tmp_path / "model")


def create(model, *more):
    listed = ["--coordinates", str(model.parent / "coordinates.json"), "--chunk", "1024"]
    path = model.parent / "guard.json"
    return main(["guard", "create", str(model), "-o", str(path), *listed, *more]), str(path)


def test_create_verify_and_repair(model, capfd):
    code, path = create(model)
    assert code == 0 and "not sealed" in capfd.readouterr().out
    assert main(["guard", "verify", str(model), path]) == 0
    assert "intact" in capfd.readouterr().out
    flip_in(model, WEIGHT, 2 * (3 * H + 5) + 1)
    assert main(["guard", "verify", str(model), path]) == 1
    out = capfd.readouterr().out
    assert WEIGHT in out and "expected" in out and "1 of 3 super weights hit" in out
    assert main(["guard", "verify", str(model), path, "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["status"] == "damaged" and len(found["findings"][0]["super_weights"]) == 1
    copy = model.parent / "copy"
    assert main(["guard", "repair", str(model), path, "-o", str(copy)]) == 0
    assert "put back" in capfd.readouterr().out
    assert main(["guard", "verify", str(copy), path]) == 0
    flip_in(model, WEIGHT, 5000)
    assert main(["guard", "repair", str(model), path, "-o", str(copy)]) == 1


def test_what_cannot_be_checked(model, capfd):
    _, path = create(model)
    assert main(["guard", "verify", str(model / "nothing"), path]) == 2
    assert main(["guard", "verify", str(model), str(model / "config.json")]) == 2
    assert main(["guard", "repair", str(model), path, "-o", str(model)]) == 2
    assert "swkernels: error:" in capfd.readouterr().err


def test_keys_come_from_a_file_or_the_environment_and_are_never_printed(model, capfd, monkeypatch):
    secret = "a secret of twenty-eight bytes"
    key = model.parent / "key"
    key.write_text(secret + "\n")
    code, path = create(model, "--key-file", str(key), "--json")
    assert code == 0 and json.loads(capfd.readouterr().out)["hash"] == "sha256"
    assert main(["guard", "verify", str(model), path]) == 2
    monkeypatch.setenv("SWKERNELS_GUARD_KEY", secret)
    assert main(["guard", "verify", str(model), path]) == 0
    monkeypatch.setenv("SWKERNELS_GUARD_KEY", "x" * 20)
    assert main(["guard", "verify", str(model), path]) == 2
    monkeypatch.setenv("SWKERNELS_GUARD_KEY", "short")
    assert main(["guard", "verify", str(model), path]) == 2
    out, error = capfd.readouterr()
    assert secret not in out + error and "short" not in error.replace("shorter", "")
