"""Hidden states that wait: their values, their memory, their file."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from swkernels.errors import InvalidInput
from swkernels.models.hidden import HiddenStates


def states(count=3, size=64):
    return [torch.full((2, size), float(i)) + torch.arange(size) for i in range(count)]


def memory(tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_within_the_budget_nothing_moves():
    hidden = HiddenStates(budget=10_000)
    tensors = states()
    for tensor in tensors:
        hidden.hold(tensor)
    assert hidden.used == hidden.peak == 3 * 512 and hidden.spilled == 0
    assert all(memory(tensor) == 512 for tensor in tensors)
    for tensor in tensors:
        hidden.release(tensor)
    assert hidden.used == 0


def test_beyond_the_budget_values_wait_in_the_file():
    hidden = HiddenStates(budget=512)
    tensors = states()
    expected = [tensor.clone() for tensor in tensors]
    views = [tensor[1:] for tensor in tensors]  # other names of the same memory
    for tensor in tensors:
        hidden.hold(tensor)
    assert [memory(tensor) for tensor in tensors] == [512, 0, 0]
    assert hidden.used == 512 and hidden.spilled == 1024
    for tensor in reversed(tensors):
        hidden.fetch(tensor)
    assert all(map(torch.equal, tensors, expected))
    assert all(torch.equal(view, value[1:]) for view, value in zip(views, expected))
    hidden.rest(tensors[2])  # it is in the file still: nothing is written again
    assert memory(tensors[2]) == 0 and hidden.spilled == 1024
    hidden.fetch(tensors[2])
    assert torch.equal(tensors[2], expected[2])


def test_two_holders_share_a_tensor():
    hidden = HiddenStates(budget=0)
    (tensor,) = states(1)
    expected = tensor.clone()
    hidden.hold(tensor)
    hidden.hold(tensor.view(4, 32))
    hidden.release(tensor)
    hidden.fetch(tensor)
    assert torch.equal(tensor, expected)
    hidden.release(tensor)
    hidden.rest(tensor)  # nobody holds it: it stays as it is
    assert torch.equal(tensor, expected) and not hidden._held


def test_places_in_the_file_are_used_again():
    hidden = HiddenStates(budget=0)
    for _ in range(5):
        for tensor in states(2):
            hidden.hold(tensor)
            hidden.fetch(tensor)
            hidden.release(tensor)
    assert hidden.spilled == 10 * 512 and hidden._end == 512


def test_a_tensor_that_nobody_holds_is_left_alone():
    hidden = HiddenStates(budget=0)
    (tensor,) = states(1)
    hidden.fetch(tensor)
    assert memory(tensor) == 512


def test_the_file_has_no_name(tmp_path):
    hidden = HiddenStates(budget=0, folder=tmp_path)
    hidden.hold(states(1)[0])
    assert list(tmp_path.iterdir()) == []
    hidden.close()


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    hidden = HiddenStates(budget=0, folder=tmp_path)
    (tensor,) = states(1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InvalidInput, match=f"{tmp_path}: No space left"):
        hidden.hold(tensor)
    assert torch.equal(tensor, states(1)[0])


def test_small_writes_and_reads_are_put_together(monkeypatch):
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:100], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:60]], at))
    hidden = HiddenStates(budget=0)
    (tensor,) = states(1)
    expected = tensor.clone()
    hidden.hold(tensor)
    hidden.fetch(tensor)
    assert torch.equal(tensor, expected)
