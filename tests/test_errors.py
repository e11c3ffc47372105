"""Messages stay one line and steer no terminal, whatever the names in a file."""

from __future__ import annotations

import pickle

import torch
from safetensors.torch import save_file

from swkernels.cli import main
from swkernels.errors import BackendUnavailable, InvalidInput, NonFiniteActivation


def test_what_cannot_be_printed_is_shown_as_an_escape():
    for kind in (InvalidInput, BackendUnavailable, NonFiniteActivation):
        error = kind("\x1b[31mred\x07\u202e\ud800 a\nb é")
        assert str(error) == r"\x1b[31mred\x07\u202e\ud800 a\nb é"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(InvalidInput()) == ""


def test_a_tensor_of_a_hostile_name_in_the_terminal(tmp_path, capfd):
    save_file({"\x1b]0;x\x07.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"\x1b]0;x\x07.weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    assert main(["rank", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert r"\x1b]0;x\x07.weight" in error and error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
