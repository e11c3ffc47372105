"""The worked 3 x 3 example of the review of the super-weight paper, and what it concludes."""

from __future__ import annotations

import math

import pytest
import torch

from swkernels.detect.criteria import dominance, outlier_threshold, prominence
from swkernels.detect.tracking import _moments

X = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
W = torch.tensor([[10.0, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
Y = X @ W.T


def test_the_sums_of_the_example():
    expected = torch.tensor([[11.3, 3.2, 5.0], [42.8, 7.7, 12.2], [74.3, 12.2, 19.4]])
    torch.testing.assert_close(Y, expected)


@pytest.mark.parametrize("token, product, rest", [(0, 10.0, 1.3), (1, 40.0, 2.8), (2, 70.0, 4.3)])
def test_the_super_weight_dominates_its_row_for_every_token(token, product, rest):
    parts = dominance(X[token], W[0])
    assert parts.dominance[0].item() == pytest.approx(product / rest)
    assert parts.share[0].item() == pytest.approx(product / (product + rest))
    assert parts.signed_share[0].item() == pytest.approx(product / float(Y[token, 0]))
    assert (parts.dominance[1:] < 1).all()


def test_another_input_shows_the_same_pair():
    parts = dominance(torch.tensor([2.0, 1, 0]), W[0])
    assert parts.dominance[0].item() == pytest.approx(20 / 0.2)


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("token", [0, 1, 2])
def test_no_term_dominates_elsewhere(row, token):
    """The example finds no dominating term in Y[1, 2] and Y[1, 3]; nor is there one below."""
    assert (dominance(X[token], W[row]).dominance < 1.5).all()
    if token == 0:
        assert (dominance(X[token], W[row]).dominance <= 1.5).all()
        assert (dominance(X[token], W[row]).share < 0.6).all()


def test_with_gamma_2_only_the_largest_is_a_super_activation():
    moments = _moments(Y, torch.arange(3)).tolist()
    assert moments[0] == 9
    assert outlier_threshold(*moments, 0) == pytest.approx(20.9, abs=0.01)
    limit = outlier_threshold(*moments, 2)
    assert limit == pytest.approx(64.7, abs=0.1)
    assert (Y.abs() > limit).nonzero().tolist() == [[2, 0]]


def test_with_gamma_1_the_second_is_on_the_boundary():
    limit = outlier_threshold(*_moments(Y, torch.arange(3)).tolist(), 1)
    assert limit == pytest.approx(42.8, abs=0.05)
    assert float(Y[2, 0]) > limit


def test_padding_does_not_enter_the_moments():
    padded = torch.cat([Y, torch.full((2, 3), 1e6)])
    index = torch.tensor([0, 1, 2, -1, -1])
    assert torch.equal(_moments(padded, index), _moments(Y, torch.arange(3)))


def test_prominence_is_free_of_scale_and_safe_at_zero():
    peaks = torch.tensor([1.0, 2.0, 3.0, 40.0, 2.0])
    assert prominence(peaks).tolist() == [0.5, 1.0, 1.5, 20.0, 1.0]
    assert torch.equal(prominence(peaks * 1e-3), prominence(peaks))
    dead = prominence(torch.tensor([0.0, 0.0, 5.0]))
    assert dead.tolist() == [0.0, 0.0, math.inf]
