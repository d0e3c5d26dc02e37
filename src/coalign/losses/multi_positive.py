"""Contrastive losses with several positives (UniCLIP §2.2), as sums over this rank's rows: the caller divides.

They share one layout. `logits` [batch, view, global_batch, key_view] holds x_ij = log s_ij of every embedding of this rank's pairs (the
rows) with every embedding of all ranks' pairs; `positives` [batch] is the position of each row's own pair among the global ones. Positives
are members of the own pair; negatives, N_i, are all members of all other pairs, except of those that `ignored` [batch, global_batch]
excludes. Views of images come before views of texts. A row without negatives has loss zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from coalign.losses.contrastive import at_least_float32


def domain_combinations(num_images: int, num_texts: int) -> Int[Tensor, "view view"]:
    """D(i, j) of views i and j: 0 for image-image, 1 for image-text, 2 for text-text."""
    is_text = torch.arange(num_images + num_texts) >= num_images
    return is_text[:, None].long() + is_text[None, :].long()


def balancing_weights(num_images: int, num_texts: int) -> Float[Tensor, "view view"]:
    """w_D of Eq. 12: 1/V², 1/(2UV), 1/U², one over a combination's number of positives, so that each contributes equally."""
    pairs = torch.tensor([num_images**2, 2 * num_images * num_texts, num_texts**2], dtype=torch.float64)
    return (1 / pairs)[domain_combinations(num_images, num_texts)]


def domain_logits(
    queries: Float[Tensor, "batch view dim"],
    keys: Float[Tensor, "global_batch key_view dim"],
    logit_scales: Float[Tensor, "view key_view"],
    offsets: Float[Tensor, "view key_view"],
) -> Float[Tensor, "batch view global_batch key_view"]:
    """log s_ij = (cos(z_i, z_j) − b_D(i,j)) / τ_D(i,j) (Eq. 16), of normalised embeddings, in at least float32."""
    with torch.autocast(queries.device.type, enabled=False):  # which would compute the product in half precision
        cosines = torch.einsum("ivd,jwd->ivjw", at_least_float32(queries), at_least_float32(keys))
        return (cosines - offsets[:, None]) * logit_scales[:, None]


def mp_nce(
    logits: Float[Tensor, "batch view global_batch key_view"],
    positives: Int[Tensor, " batch"],
    weights: Float[Tensor, "view key_view"],
    ignored: Bool[Tensor, "batch global_batch"] | None = None,
) -> Float[Tensor, ""]:
    """MP-NCE: Σ_i Σ_p −w_ip · log( e^{x_ip} / (e^{x_ip} + Σ_{n∈N_i} e^{x_in}) ) over the members p of i's own pair (Eq. 12).

    The trivial pair (i, i) is a positive as any other; a weight of zero drops a positive. With `balancing_weights` the batch's mean over i
    and p of Eq. 12 is this divided by (number of pairs) · (V + U)²; divided by 3 · (number of pairs) it is the mean of the three
    combinations. With ones it is Eq. 11, and with ones but zeros on the diagonal Eq. 9, divided by the number of ones.
    """
    own, negatives = _split(logits, positives, ignored)
    return -(weights.to(own) * F.logsigmoid(own - negatives[:, :, None])).sum()


def mil_nce(
    logits: Float[Tensor, "batch view global_batch key_view"],
    positives: Int[Tensor, " batch"],
    pairs: Bool[Tensor, "view key_view"],
    ignored: Bool[Tensor, "batch global_batch"] | None = None,
) -> Float[Tensor, ""]:
    """MIL-NCE: Σ_i −log( Σ_p e^{x_ip} / (Σ_p e^{x_ip} + Σ_{n∈N_i} e^{x_in}) ) (Eq. 4; Miech et al. 2020).

    P_i are the members of the own pair where `pairs` is true; a row where it is true nowhere has no loss.
    """
    own, negatives = _split(logits, positives, ignored)
    own = own.masked_fill(~pairs, _floor(own)).logsumexp(2)  # [batch, view]
    return -(F.logsigmoid(own - negatives) * pairs.any(1)).sum()


def sup_con(
    logits: Float[Tensor, "batch view global_batch key_view"],
    positives: Int[Tensor, " batch"],
    pairs: Bool[Tensor, "view key_view"],
    ignored: Bool[Tensor, "batch global_batch"] | None = None,
) -> Float[Tensor, ""]:
    """SupCon: Σ_i mean_p −log( e^{x_ip} / (Σ_p' e^{x_ip'} + Σ_{n∈N_i} e^{x_in}) ) (Eq. 6; Khosla et al. 2020).

    P_i are the members of the own pair where `pairs` is true; a row where it is true nowhere has no loss.
    """
    own, negatives = _split(logits, positives, ignored)
    denominators = torch.logaddexp(own.masked_fill(~pairs, _floor(own)).logsumexp(2), negatives)  # [batch, view]
    share = pairs.to(own) / pairs.sum(1, keepdim=True).clamp(min=1)  # mean over P_i
    return ((denominators[:, :, None] - own) * share).sum()


def _floor(logits: Tensor) -> float:
    """In place of minus infinity, of which logsumexp's gradient is NaN where nothing else is summed."""
    return torch.finfo(logits.dtype).min / 4


def _split(logits: Tensor, positives: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits with the own pair's members [batch, view, key_view], and log Σ_{n∈N_i} e^{x_in} [batch, view]."""
    logits = at_least_float32(logits)
    rows = torch.arange(len(positives), device=positives.device)
    left_out = torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.bool, device=logits.device)
    if ignored is not None:
        left_out |= ignored
    left_out[rows, positives] = True
    negatives = logits.masked_fill(left_out[:, None, :, None], _floor(logits)).flatten(2).logsumexp(2)
    return logits[rows, :, positives], negatives
