"""The formulas by which a spike is told from ordinary activation.

Notation of the super-weight paper (Yu et al. 2024, arXiv 2411.07191): ``Y[i, j] = sum_k X[i, k]
W[j, k]``; i a token, j a row of W (output channel), k a column (input channel).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Dominance(NamedTuple):
    """How far single products stand out of the sum that makes one output.

    Attributes:
        share: |x_m w_m| / sum_k |x_k w_k|, in [0, 1], for each column m.
        dominance: |x_m w_m| / sum_{k != m} |x_k w_k|; above 1 the product outweighs all others.
        signed_share: x_m w_m / y.
    """

    share: torch.Tensor
    dominance: torch.Tensor
    signed_share: torch.Tensor


def dominance(x: torch.Tensor, w: torch.Tensor) -> Dominance:
    """Compare every product of one output with the rest of its sum.

    The condition ``|X[i,m] W[j,m]| >> sum_{k != m} |X[i,k] W[j,k]|`` is section 3.2 of the review
    of the super-weight paper; replications find true super weights at ``signed_share`` 0.59 to
    0.97 and the members of a set well below, so ``share`` is a wide criterion, not a band at 1.

    Args:
        x: [..., H], the input of the down projection at one token.
        w: [..., H], one row of the weight.

    Returns:
        ``Dominance``, each field float64 [..., H].
    """
    products = x.double() * w.double()
    magnitude = products.abs()
    total = magnitude.sum(-1, keepdim=True)
    rest = total - magnitude
    return Dominance(magnitude / total, magnitude / rest, products / products.sum(-1, keepdim=True))


def prominence(peaks: torch.Tensor) -> torch.Tensor:
    """Divide the channel peaks [..., C] of a layer by their median over channels.

    Scale-free, so one threshold serves every layer, dtype and model. Where the median is zero the
    result is infinite for a non-zero peak and 0 for a zero one.
    """
    median = peaks.median(-1, keepdim=True).values
    return torch.where(peaks > 0, peaks / median, torch.zeros_like(peaks))


def outlier_threshold(count: float, total: float, squares: float, gamma: float) -> float:
    """Return mean + gamma * std of all elements of Y, from streamed moments.

    The review's definition of a super activation, ``|Y[i,j]| > mu_Y + gamma sigma_Y`` (section
    4.2), with the population standard deviation as in its worked example.

    Args:
        count, total, squares: number, sum and sum of squares of the elements.
        gamma: how many standard deviations.
    """
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return mean + gamma * variance**0.5
