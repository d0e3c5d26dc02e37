"""Log-ratio distillation (MCD, Eqs. 6–9), as sums over the local rows: the caller divides by the number of index pairs of all ranks.

Eq. 6 compares two pairs: LR(a, b; c, d) = ℓ( log[D_S(a,b) / D_S(c,d)] − log[D_T(a,b) / D_T(c,d)] ). With the residual
r(a, b) = log D_S(a, b) − log D_T(a, b), this equals ℓ(r(a,b) − r(c,d)), so every term here is a function of residuals.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coalign.losses.tiled import at_least_float32, over_row_chunks

Norm = Literal["squared", "absolute"]
SQUARED_EPS, EPS = 1e-4, 1e-6  # inside the root (over the width) and inside the logarithm (Kim et al. 2019)


def log_distances(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
    """Returns the log Euclidean distance log D(a_i, b_i) of each row i, in at least float32. Value and gradient are finite if a_i = b_i."""
    difference = at_least_float32(first) - at_least_float32(second)
    return _log_root(difference.square().sum(1), first.shape[1])


def all_log_distances(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "global_batch dim"]
) -> Float[Tensor, "batch global_batch"]:
    """Returns log D(a_i, b_j) for every row i and column j, like `log_distances`."""
    with torch.autocast(first.device.type, enabled=False):
        a, b = at_least_float32(first), at_least_float32(second)
        squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T  # [batch, global_batch]
        return _log_root(squared.clamp(min=0), first.shape[1])


def _log_root(squared: Tensor, dim: int) -> Tensor:
    return ((squared + SQUARED_EPS / dim).sqrt() + EPS).log()


def positive_log_ratio(
    original: Float[Tensor, " batch"], augmented: Float[Tensor, " batch"], norm: Norm
) -> Float[Tensor, ""]:
    """Returns Σ_i LR(v_i, t_i; ṽ_i, t_i) (Eq. 7) from the residuals r(v_i, t_i) and r(ṽ_i, t_i). Divide by the number of pairs N."""
    return _norm(original - augmented, norm).sum()


def negative_log_ratio(
    original: Float[Tensor, "batch dim"],
    augmented: Float[Tensor, "batch dim"],
    teacher_original: Float[Tensor, "batch dim"],
    teacher_augmented: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    norm: Norm,
) -> Float[Tensor, ""]:
    """Returns Σ_i Σ_{j≠i} LR(v_i, t_j; ṽ_i, t_j) (Eq. 8). Divide by N(N − 1).

    Takes the student's and the teacher's embeddings of v and ṽ, and all texts, which the teacher's distances use without gradient.
    `positives` is the column of each row's own text, which is omitted. The distance matrices are not materialized.
    """

    def row_sums(v: Tensor, augmented: Tensor, teacher_v: Tensor, teacher_augmented: Tensor, own: Tensor) -> Tensor:
        differences = _residuals(v, teacher_v, texts) - _residuals(augmented, teacher_augmented, texts)
        return _norm(_zero_positives(differences, own), norm).sum(1)

    rows = (original, augmented, teacher_original, teacher_augmented, positives)
    return over_row_chunks(row_sums, *rows, columns=len(texts)).sum()


def noisy_log_ratio(
    own: Float[Tensor, " batch"], gathered: Float[Tensor, " global_batch"], norm: Norm
) -> Float[Tensor, ""]:
    """Returns Σ_i Σ_{j≠i} LR(v_i, t_i; v_j, t_j) (Eq. 9) from the residuals r(v_i, t_i) of local and of all rows. Divide by N(N − 1).

    Needs O(N) memory, because Σ_ij (r_i − r_j)² = 2N Σ_i (r_i − r̄)² (so the mean is twice the sample variance) and
    Σ_ij |r_i − r_j| = 2 Σ_i r_i (#{r_j < r_i} − #{r_j > r_i}). These identities hold for the sum over all ranks, not for each rank's share.
    """
    if norm == "squared":
        return 2 * len(gathered) * (own - gathered.mean()).square().sum()
    ascending = gathered.detach().sort().values
    value = own.detach().contiguous()
    below = torch.searchsorted(ascending, value, right=False)
    above = len(ascending) - torch.searchsorted(ascending, value, right=True)
    return 2 * (own * (below - above)).sum()


def noisy_log_ratio_of_texts(
    original: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    norm: Norm,
) -> Float[Tensor, ""]:
    """Returns Σ_i Σ_{j≠i} LR(v_i, t_i; v_i, t_j), an alternative reading of Eq. 9 that compares an image's own text with other texts. The
    arguments are as in `negative_log_ratio`. Divide by N(N − 1)."""

    def row_sums(v: Tensor, teacher: Tensor, own: Tensor) -> Tensor:
        residuals = _residuals(v, teacher, texts)
        differences = residuals.gather(1, own[:, None]) - residuals
        return _norm(_zero_positives(differences, own), norm).sum(1)

    return over_row_chunks(row_sums, original, teacher, positives, columns=len(texts)).sum()


def _residuals(student: Tensor, teacher: Tensor, texts: Tensor) -> Tensor:
    """Returns the residuals r of every row with every text, [row, global_batch]."""
    return all_log_distances(student, texts) - all_log_distances(teacher, texts.detach())


def _zero_positives(differences: Tensor, positives: Tensor) -> Tensor:
    return differences.scatter(1, positives[:, None], 0.0)


def _norm(differences: Tensor, norm: Norm) -> Tensor:
    return differences.square() if norm == "squared" else differences.abs()
