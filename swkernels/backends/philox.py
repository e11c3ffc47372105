"""The dropout that every backend computes alike, from a seed, where it is used.

Element (t, j) of an activation [T, N] has word j mod 4 of Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011) with the 64-bit counter t * ceil(N / 4) + floor(j / 4)
and the seed as key. It is dropped where the word is below dropout * 2^32, and multiplied by
1 / (1 - dropout) where it is not.
"""

from __future__ import annotations

import torch

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold(dropout: float) -> int:
    """The first word that is kept: dropout * 2^32, rounded, below 2^32."""
    return min(round(dropout * 2**32), _WORD)


def factors(
    start: int, stop: int, width: int, dropout: float, seed: torch.Tensor
) -> torch.Tensor:
    """Return what rows [start, stop) of an activation [T, width] are multiplied by.

    Args:
        seed: int64 scalar.

    Returns:
        float32 [stop - start, width] on the seed's device: 0, or 1 / (1 - dropout).
    """
    tokens = torch.arange(start, stop, device=seed.device)
    groups = torch.arange(-(-width // 4), device=seed.device)
    words = _words(tokens, groups, width, seed).flatten(1)[:, :width]
    return _factors(words, dropout)


def factors_at(
    columns: torch.Tensor, T: int, width: int, dropout: float, seed: torch.Tensor
) -> torch.Tensor:
    """``factors`` of all rows at some columns, integers [m]: float32 [T, m]."""
    columns = columns.long()
    tokens = torch.arange(T, device=seed.device)
    words = _words(tokens, columns // 4, width, seed)
    place = (columns % 4)[None, :, None].expand(len(tokens), -1, 1)
    return _factors(words.gather(2, place).squeeze(2), dropout)


def _factors(words: torch.Tensor, dropout: float) -> torch.Tensor:
    return (words >= threshold(dropout)).to(torch.float32) * (1.0 / (1.0 - dropout))


def _words(
    tokens: torch.Tensor, groups: torch.Tensor, width: int, seed: torch.Tensor
) -> torch.Tensor:
    """Return the four words of each (token, group of four columns), int64 [n, g, 4]."""
    counter = tokens[:, None] * -(-width // 4) + groups  # [n, g]
    zero = torch.zeros_like(counter)
    words = [counter & _WORD, counter >> 32 & _WORD, zero, zero]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(_ROUNDS):
        # 32 x 32 bits wrap into the sign of an int64, which shift and mask take off again.
        first, second = (words[2 * i] * _MULTIPLIERS[i] for i in (0, 1))
        words = [
            (second >> 32 & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            (first >> 32 & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS)]
    return torch.stack(words, 2)
