"""The algebra of updates: norms and best approximations of factored ones, and the ways to combine dense ones."""

from __future__ import annotations

import torch
from torch import Tensor


def factored_norm(a: Tensor, b: Tensor) -> float:
    """|B A| (Frobenius) of A (..., r, in) and B (..., out, r), from r x r matrices."""
    return torch.linalg.vector_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.mT, mode="r").R.mT).item()


def truncate_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A by rank `rank`, as (A, B) with equal singular values each, without building B A.

    A (..., r, in), B (..., out, r): B = Q_b R_b and A^T = Q_a R_a, so that the SVD of the small R_b R_a^T is that of B A.
    """
    qa, ra = torch.linalg.qr(a.mT)
    qb, rb = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    return root[..., :, None] * (vh[..., :rank, :] @ qa.mT), (qb @ u[..., :rank]) * root[..., None, :]


def truncate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of delta (..., out, in) by rank `rank`, as (A, B).

    The leading singular vectors of the shorter side come from its Gram matrix: tens of times faster than the SVD of delta,
    and what is lost there in fp64 (singular values below 1e-8 of the largest) is far below fp32.
    """
    if delta.shape[-2] <= delta.shape[-1]:
        b = torch.linalg.eigh(delta @ delta.mT).eigenvectors[..., -rank:]
        return truncate_factors(b.mT @ delta, b, rank)
    a = torch.linalg.eigh(delta.mT @ delta).eigenvectors[..., -rank:].mT
    return truncate_factors(a, delta @ a.mT, rank)


def ties(deltas: Tensor, weights: Tensor, density: float, total: float) -> Tensor:
    """Trim, elect a sign, disjoint mean: deltas (n, ...), weights (n,) -> (...).

    v_i = w_i trim(delta_i), trim keeping the `density` largest entries in magnitude; sign = sign(sum_i v_i), entry by entry;
    `total` sum_{agree} v_i / sum_{agree} |w_i| over the i whose v_i has that sign. `total` is the sum of all |w_i|: equal
    weights 1/n give the paper's mean, and where no signs conflict and nothing is trimmed it is the weighted sum.
    """
    keep = max(1, round(density * deltas[0].numel()))
    magnitude = deltas.flatten(1).abs()
    least = magnitude.kthvalue(magnitude.shape[1] - keep + 1, dim=1).values
    shape = (-1,) + (1,) * (deltas.ndim - 1)
    scaled = weights.view(shape) * deltas * (magnitude >= least[:, None]).view(deltas.shape)
    agree = (scaled.sign() == scaled.sum(0).sign()) & (scaled != 0)
    mass = (weights.abs().view(shape) * agree).sum(0)
    return total * (scaled * agree).sum(0) / torch.where(mass > 0, mass, 1)


def dare(deltas: Tensor, weights: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """sum_i w_i m_i delta_i / density: deltas (n, ...), each entry of the masks m_i 1 with probability `density`, else 0."""
    masks = torch.stack([torch.bernoulli(torch.full(delta.shape, float(density)), generator=generator) for delta in deltas])
    return torch.tensordot(weights, masks * deltas, 1) / density
