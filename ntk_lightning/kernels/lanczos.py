"""Lanczos quadrature of v'A log(A) v, from products with A alone, between a lower and an upper bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["entropy_quadratures", "lanczos"]


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int, eps: float) -> tuple[Tensor, Tensor]:
    """Run Lanczos from every column of ``start`` on its own: A V = V T + (the next vector) e_s'.

    Vectors are not orthogonalized again: the copies of an eigenvalue that rounding then brings share its weight, which
    leaves quadratures as they are. A column whose Krylov space ends, as for a low rank, goes on with zeros that have no
    weight.

    Args:
        matvec: Maps (n, k) to A times it.
        start: Starting vectors (n, k), of any length.
        steps: s, the number of steps.
        eps: Relative rounding of ``matvec``: a next vector below ten times that is zero.

    Returns:
        Squares of the columns' lengths (k,), and tridiagonal matrices T (k, s, s).
    """
    squares, tiny = start.square().sum(0), torch.finfo(start.dtype).tiny
    previous, v = torch.zeros_like(start), start / squares.sqrt().clamp_min(tiny)
    tridiagonal = start.new_zeros(start.shape[1], steps, steps)
    beta = largest = start.new_zeros(start.shape[1])
    for j in range(steps):
        w = matvec(v) - beta * previous
        alpha = (w * v).sum(0)
        tridiagonal[:, j, j] = alpha
        if j + 1 < steps:
            w = w - alpha * v
            beta = w.norm(dim=0)
            largest = torch.maximum(largest, alpha.abs() + beta)
            beta = torch.where(beta > 10 * eps * largest, beta, 0)
            tridiagonal[:, j, j + 1] = tridiagonal[:, j + 1, j] = beta
            previous, v = v, torch.where(beta > 0, w / beta.clamp_min(tiny), 0)
    return squares, tridiagonal


def entropy_quadratures(tridiagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Bound e_1'f(A) e_1 for f(x) = x log x, from the T of Lanczos on a positive semidefinite A.

    The rule of Gauss is e_1'f(T) e_1. That of Gauss and Radau has a node at 0: the last pivot of T, 1 / (T^-1)_ss, is
    taken from T_ss, so that T is singular. The truth less a rule is a positive number times a derivative of f, of order
    2s for Gauss and 2s - 1 for Radau. Even derivatives are positive, and odd ones negative from the third on: Gauss is
    below, Radau above. Golub and Meurant (2010, "Matrices, moments and quadrature"), chapter 6.

    Args:
        tridiagonal: T, (k, s, s).

    Returns:
        Lower and upper bounds, both (k,), to rounding.
    """
    lower, eigenvalues, vectors = _first_entry(tridiagonal)
    info = torch.finfo(eigenvalues.dtype)
    floor = info.eps * eigenvalues[:, -1:].clamp_min(info.tiny / info.eps)  # a T that is singular already stays
    inverse = (vectors[:, -1].square() / torch.maximum(eigenvalues, floor)).sum(1)
    singular = tridiagonal.clone()
    singular[:, -1, -1] -= 1 / inverse
    return lower, _first_entry(singular)[0]


def _first_entry(tridiagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e_1'f(T) e_1 = sum_j u_1j^2 f(theta_j), then theta and u; eigenvalues that rounding made negative count as 0."""
    eigenvalues, vectors = torch.linalg.eigh(tridiagonal)
    return -(vectors[:, 0].square() * torch.special.entr(eigenvalues.clamp_min(0))).sum(1), eigenvalues, vectors
