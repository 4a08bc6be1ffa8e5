"""One gradient matrix sent as two thin factors, with what was left out carried over: the definition.

Legend: M rows, N columns, R rank. All arithmetic is fp32; no function waits for the device.
Sources: PowerSGD (arXiv 1905.13727) for the factors, the warm start and error feedback; PowerSGD+ (arXiv 2509.11254)
for why a warm start alone need not converge and the projection has to be renewed from time to time.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from apt_model.core.errors import InputError


class Compressed(NamedTuple):
    """What one step of `compress` gives, all fp32."""

    sent: Tensor
    """[M, N], the low-rank matrix that takes the gradient's place."""
    error: Tensor
    """[M, N], gradient and carried error less what was sent: the next step's error under error feedback."""
    basis: Tensor
    """[N, R], orthonormal columns to start the next step from."""


def compress(
    gradient_MN: Tensor, error_MN: Tensor | None, basis_NR: Tensor, *, row_balance: bool, kappa: float = 0.1
) -> Compressed:
    """Compress one gradient matrix to the rank of `basis_NR` by one power iteration from it.

    With A = G + E, the row scale D (the identity without `row_balance`) and N = A / D: P = orth(N Q), R = N^T P,
    sent = D P R^T, error = A - sent, Q <- orth(R). With D = I this is an orthogonal projection, so the error is never
    longer than A. With D it is oblique and can be: where |A - sent| > |A| this step is taken with D = I instead.

    Args:
        gradient_MN: the gradient, any floating dtype.
        error_MN: what earlier steps left out, fp32; None for no error feedback.
        basis_NR: orthonormal columns, fp32. A rank of min(M, N) or more sends A exactly.
        row_balance: divide rows by their L1 norms before the projection. Twice the arithmetic.
        kappa: no row is divided by less than this share of the largest row norm.

    Raises:
        InputError: shapes do not fit together.
    """
    _check_shapes(gradient_MN, error_MN, basis_NR)
    target_MN = gradient_MN.float() if error_MN is None else gradient_MN.float() + error_MN
    if basis_NR.shape[1] >= min(target_MN.shape):
        return Compressed(target_MN, torch.zeros_like(target_MN), basis_NR)
    sent_MN, factor_NR = project(target_MN, basis_NR)
    if row_balance:
        balanced_MN, balanced_NR = project(target_MN, basis_NR, row_scale(target_MN, kappa))
        norm = torch.linalg.vector_norm
        expands = norm(target_MN - balanced_MN) > norm(target_MN)
        sent_MN = torch.where(expands, sent_MN, balanced_MN)
        factor_NR = torch.where(expands, factor_NR, balanced_NR)
    # A zero gradient says nothing about the subspace: the basis stays what it was.
    basis_NR = torch.where(factor_NR.any(), _orthonormal(factor_NR), basis_NR)
    return Compressed(sent_MN, target_MN - sent_MN, basis_NR)


def project(target_MN: Tensor, basis_NR: Tensor, scale_M1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D P R^T [M, N] and R [N, R] for the row scale D, unguarded; D = I where `scale_M1` is None."""
    scaled_MN = target_MN if scale_M1 is None else target_MN / scale_M1
    left_MR = _orthonormal(scaled_MN @ basis_NR)
    factor_NR = scaled_MN.T @ left_MR
    sent_MN = left_MR @ factor_NR.T
    return (sent_MN if scale_M1 is None else sent_MN * scale_M1), factor_NR


def row_scale(target_MN: Tensor, kappa: float) -> Tensor:
    """D as a column [M, 1]: each row's L1 norm, at least `kappa` of the largest; 1 where that is zero."""
    sums_M1 = target_MN.abs().sum(dim=1, keepdim=True)
    scale_M1 = torch.maximum(sums_M1, kappa * sums_M1.amax())
    return torch.where(scale_M1 > 0, scale_M1, 1.0)


def random_basis(columns: int, rank: int, *, seed: int, index: int, step: int, device: torch.device) -> Tensor:
    """Orthonormal columns [N, R] spanning a subspace drawn uniformly, fp32.

    The draw follows from (seed, index, step) and the kind of device alone: the global generators are neither read nor
    moved. `index` tells parameters apart, so that two of one shape do not share their noise.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{step}".encode(), digest_size=8).digest()
    # On the tensor's own device: noise copied from the host would make the host wait for the stream.
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))
    return _orthonormal(torch.randn(columns, rank, generator=generator, device=device))


def refresh_basis(target_MN: Tensor, rank: int, *, seed: int, index: int, step: int) -> Tensor:
    """A basis [N, R] for `target_MN` made anew: one power iteration from noise that follows from (seed, index, step).

    A warm-started basis can stay blind to a direction that it is orthogonal to; noise is orthogonal to none. A zero
    target gives the noise itself, made orthonormal.
    """
    target_MN = target_MN.float()
    noise_NR = random_basis(target_MN.shape[1], rank, seed=seed, index=index, step=step, device=target_MN.device)
    _, factor_NR = project(target_MN, noise_NR)
    return torch.where(factor_NR.any(), _orthonormal(factor_NR), noise_NR)


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns, completed arbitrarily where they are dependent."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    # QR answers column by column. Row by row is how a checkpoint stores it, and layout decides which kernel runs: left
    # as it came, a resumed run would differ in the last bit.
    return basis.contiguous()


def _check_shapes(gradient_MN: Tensor, error_MN: Tensor | None, basis_NR: Tensor) -> None:
    if gradient_MN.ndim != 2:
        raise InputError(f"compress: expected a gradient of shape [M, N], got {list(gradient_MN.shape)}")
    if error_MN is not None and error_MN.shape != gradient_MN.shape:
        raise InputError(f"compress: expected an error of shape {list(gradient_MN.shape)}, got {list(error_MN.shape)}")
    if basis_NR.ndim != 2 or basis_NR.shape[0] != gradient_MN.shape[1]:
        raise InputError(f"compress: expected a basis of shape [{gradient_MN.shape[1]}, R], got {list(basis_NR.shape)}")
