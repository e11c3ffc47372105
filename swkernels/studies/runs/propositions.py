"""The training paper's propositions as random experiments (arXiv 2607.08733, appendices H and I.1).

All of it is float64 on the CPU; the same seed gives the same figures.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_CHUNK = 1 << 22  # numbers drawn together


def coverage(N: int, d: int, k: int, trials: int, seed: int) -> dict:
    """Proposition 1: how much of random d-dimensional subspaces k fixed coordinates capture.

    Returns:
        ``mean`` of |P_V P_S|_F^2 / d over ``trials`` subspaces S of R^N, each the span of a
        Gaussian [N, d]; its ``error`` (standard error); ``deviation`` of a single draw, and what
        that is in theory (``deviation_expected``); ``expected``, k / N.
    """
    generator = _generator(seed)
    chosen = torch.randperm(N, generator=generator)[:k]
    parts = []
    for count in _chunks(trials, N * d):
        normal = torch.randn(count, N, d, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(normal).Q  # [count, N, d]
        parts.append(basis[:, chosen].square().sum((1, 2)) / d)
    captured = torch.cat(parts)
    deviation = float(captured.std())
    return {
        "N": N, "d": d, "k": k,
        "mean": float(captured.mean()),
        "error": deviation / math.sqrt(trials),
        "deviation": deviation,
        "deviation_expected": coverage_deviation(N, d, k),
        "expected": k / N,
    }  # fmt: skip


def coverage_deviation(N: int, d: int, k: int) -> float:
    """The standard deviation of |P_V P_S|_F^2 / d over uniform S, V fixed.

    tr(P_V P_S) has the variance 2 k d (N - k) (N - d) / (N^2 (N - 1) (N + 2)): P_S has the mean
    d / N I, and the covariance of two entries is fixed by its invariance and by P_S^2 = P_S.
    """
    return math.sqrt(2 * k * (N - k) * (N - d) / (d * (N - 1) * (N + 2))) / N


def dimension(m: int, n: int, r: int, seed: int) -> dict:
    """Proposition 2: the rank of the Jacobian of (B, A) -> B A at a random point, by its SVD.

    Returns:
        ``rank``, how many singular values are above rounding; ``smallest`` of these and ``next``,
        the largest of the others (None where there are none), over the largest; ``expected``,
        r (m + n - r); ``parameters``, r (m + n).
    """
    generator = _generator(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    by_B = torch.einsum("ip,kj->ijpk", torch.eye(m, dtype=torch.float64), A)
    by_A = torch.einsum("ik,jq->ijkq", B, torch.eye(n, dtype=torch.float64))
    jacobian = torch.cat([part.reshape(m * n, -1) for part in (by_B, by_A)], 1)  # [m n, r (m + n)]
    values = torch.linalg.svdvals(jacobian)
    values = values / values[0]
    rank = int((values > max(jacobian.shape) * torch.finfo(torch.float64).eps).sum())
    return {
        "m": m, "n": n, "r": r,
        "rank": rank,
        "smallest": float(values[rank - 1]),
        "next": float(values[rank]) if rank < len(values) else None,
        "expected": r * (m + n - r),
        "parameters": r * (m + n),
    }  # fmt: skip


def entry_bound(m: int, n: int, r: int, alpha: float, seed: int) -> dict:
    """Proposition 3: |dW_ij| over alpha / r |B_i| |A_j|, of Gaussian factors.

    Returns:
        ``largest``, at most 1 but for rounding, and ``mean`` of the ratio over all entries.
    """
    generator = _generator(seed)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    A = torch.randn(r, n, generator=generator, dtype=torch.float64)
    update = (alpha / r) * (B @ A)
    bound = (alpha / r) * B.norm(dim=1)[:, None] * A.norm(dim=0)
    ratio = update.abs() / bound
    return {"m": m, "n": n, "r": r, "largest": float(ratio.max()), "mean": float(ratio.mean())}


def size(r: int, alpha: float, sigma_B: float, sigma_A: float, draws: int, seed: int) -> dict:
    """Proposition 4: mean |dW| and variance of dW = alpha / r sum_k B_k A_k, of normal factors.

    Returns:
        ``mean`` and ``variance`` of ``draws`` entries with their standard errors ``mean_error`` and
        ``variance_error``; ``published``, ``approximate`` and ``exact``: see ``mean_sizes``; and
        ``variance_expected``, alpha^2 sigma_B^2 sigma_A^2 / r.
    """
    generator = _generator(seed)
    parts = []
    for count in _chunks(draws, 2 * r):
        B, A = torch.randn(2, count, r, generator=generator, dtype=torch.float64)
        parts.append((alpha / r) * sigma_B * sigma_A * (B * A).sum(1))
    update = torch.cat(parts)
    return {
        "r": r,
        "mean": float(update.abs().mean()),
        "mean_error": float(update.abs().std()) / math.sqrt(draws),
        "variance": float(update.square().mean()),  # the mean is known to be 0
        "variance_error": float(update.square().std()) / math.sqrt(draws),
        "variance_expected": (alpha * sigma_B * sigma_A) ** 2 / r,
    } | mean_sizes(r, alpha, sigma_B, sigma_A)


def mean_sizes(r: int, alpha: float, sigma_B: float, sigma_A: float) -> dict:
    """E|dW| as published, by the proof's approximation, and exactly.

    ``published`` is equation 10, alpha sigma_B sigma_A sqrt(2 / pi). Its proof has sqrt(2 r / pi)
    sigma_B sigma_A for the sum of r products, which over r gives ``approximate``, the published
    figure over sqrt(r). Given B the sum is normal with the deviation sigma_A |B|, so that the
    ``exact`` mean is sqrt(2 / pi) sigma_A E|B|, and |B| is sigma_B times a chi variable of r.
    """
    published = alpha * sigma_B * sigma_A * math.sqrt(2 / math.pi)
    chi = math.sqrt(2) * math.exp(math.lgamma((r + 1) / 2) - math.lgamma(r / 2))
    return {
        "published": published,
        "approximate": published / math.sqrt(r),
        "exact": published * chi / r,
    }


def newton_ratios(M: float, H: int, tokens: int, trials: int, seed: int) -> list[float]:
    """Theorem 1: |dw_c| / |dw_j| of a diagonal Newton step on L = |W x - t|^2 / 2, times M.

    Inputs have |x_j| = mu at all H channels but c, where |x_c| = M mu, so that the theorem gives
    1 whatever W, t, mu and the signs are.

    Args:
        tokens: inputs whose mean loss is taken; mu is another for each.

    Returns:
        The ratio times M of each of ``trials`` problems.
    """
    generator = _generator(seed)
    found = []
    for _ in range(trials):
        W, x, target = _problem(M, H, tokens, generator)
        gradient, curvature = _row_derivatives(W, x, target)
        step = (gradient / curvature).abs()
        found.append(float(M * step[-1] / step[0]))
    return found


def adam_ratio(M: float, H: int, steps: int, seed: int) -> float:
    """|dw_c| / |dw_j| after some steps of Adam on the problem of ``newton_ratios``, one input."""
    W, x, target = _problem(M, H, 1, _generator(seed))
    row = nn.Parameter(W.clone())
    optimizer = torch.optim.Adam([row], lr=1e-6, eps=1e-30)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(row, x, target).backward()
        optimizer.step()
    moved = (row.detach() - W).abs()
    return float(moved[-1] / moved[0])


def _problem(M: float, H: int, tokens: int, generator: torch.Generator):
    """One row of W [H], inputs x [tokens, H] whose last channel stands out, and targets."""
    signs = torch.randint(2, (tokens, H), generator=generator, dtype=torch.float64) * 2 - 1
    scale = torch.rand(tokens, 1, generator=generator, dtype=torch.float64) + 0.5
    x = signs * scale
    x[:, -1] *= M
    row = torch.randn(H, generator=generator, dtype=torch.float64)
    target = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return row, x, x @ row + target  # errors of the size of 1


def _loss(row: torch.Tensor, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (x @ row - target).square().mean() / 2


def _row_derivatives(row: torch.Tensor, x: torch.Tensor, target: torch.Tensor):
    """The gradient and the diagonal of the Hessian, each [H], by automatic differentiation."""
    leaf = row.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(leaf, x, target), leaf, create_graph=True)
    diagonal = [
        torch.autograd.grad(gradient[j], leaf, retain_graph=True)[0][j] for j in range(len(row))
    ]
    return gradient.detach(), torch.stack(diagonal)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _chunks(total: int, each: int) -> list[int]:
    """``total`` in parts of about ``_CHUNK`` numbers, of which one takes ``each``."""
    most = max(1, _CHUNK // each)
    return [min(most, total - start) for start in range(0, total, most)]
