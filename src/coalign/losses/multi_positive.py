"""Contrastive losses with several positives (UniCLIP §2.2), as sums over the local rows; the caller divides to obtain means.

Every view of a pair is an anchor. Its positives are views of its own pair; its negatives N_i are all views of all other pairs, except pairs
that share a label with it. x_ij = log s_ij. Image views precede text views. An anchor without negatives has loss zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from coalign.losses.tiled import (
    Labels,
    at_least_float32,
    labels_2d,
    masked_logit,
    negatives_logsumexp,
    negatives_logsumexp_both_ways,
    negatives_logsumexp_within,
)


class Scores(NamedTuple):
    """Scores of every anchor of the local pairs, [batch, view], from which the losses are computed."""

    own: Float[Tensor, "batch view key_view"]  # x_ip for every view p of the anchor's pair
    negatives: Float[Tensor, "batch view key_view"]  # log Σ e^{x_in} over the negatives n that are this view

    def among(self, anchors: slice, others: slice) -> Scores:
        """Returns the scores of the views `anchors`, compared only with the views `others`."""
        return Scores(self.own[:, anchors, others], self.negatives[:, anchors, others])


def domain_combinations(num_images: int, num_texts: int) -> Int[Tensor, "view view"]:
    """Returns D(i, j) for views i and j: 0 for image-image, 1 for image-text, 2 for text-text."""
    is_text = torch.arange(num_images + num_texts) >= num_images
    return is_text[:, None].long() + is_text[None, :].long()


def balancing_weights(num_images: int, num_texts: int) -> Float[Tensor, "view view"]:
    """Returns w_D of Eq. 12: 1/V², 1/(2UV), 1/U². One over the number of positives of a combination, so that all contribute equally."""
    pairs = torch.tensor([num_images**2, 2 * num_images * num_texts, num_texts**2], dtype=torch.float64)
    return (1 / pairs)[domain_combinations(num_images, num_texts)]


def compare_views(
    embeds: Float[Tensor, "batch view dim"],
    gathered: Float[Tensor, "global_batch view dim"],
    logit_scales: Float[Tensor, "view view"],
    offsets: Float[Tensor, "view view"],
    labels: Labels,
) -> Scores:
    """Returns the scores log s_ij = (cos(z_i, z_j) − b_D(i,j)) / τ_D(i,j) (Eq. 16) of normalized embeddings.

    `logit_scales` (1/τ) and `offsets` (b) are symmetric. `labels` of local and of all pairs are their global indices, or caption ids if
    pairs with the same caption are not negatives. Computed in at least float32, without materializing the similarity matrix. If the local
    rows are the whole batch, the product of each pair of views is computed once.
    """
    with torch.autocast(embeds.device.type, enabled=False):  # autocast would use half precision
        own = at_least_float32(embeds)
        own = (torch.einsum("ivd,iwd->ivw", own, own) - offsets) * logit_scales
    rows, columns = labels_2d(labels)
    views, all_views = ([x.contiguous() for x in embeds.unbind(1)] for embeds in (embeds, gathered))
    sums: dict[tuple[int, int], Tensor] = {}
    for v, view in enumerate(views):
        for w, other in enumerate(all_views):
            scale = logit_scales[v, w]
            if len(embeds) < len(gathered):
                sums[v, w] = negatives_logsumexp(view, other, scale, rows, columns)
            elif v == w:
                sums[v, v] = negatives_logsumexp_within(view, scale, rows)
            elif v < w:
                sums[v, w], sums[w, v] = negatives_logsumexp_both_ways(view, views[w], scale, rows, rows)
    indices = range(len(views))
    negatives = torch.stack([torch.stack([sums[v, w] for w in indices], 1) for v in indices], 1)
    return Scores(own, negatives - offsets * logit_scales)


def mp_nce(scores: Scores, weights: Float[Tensor, "view key_view"]) -> Float[Tensor, ""]:
    """Returns MP-NCE, Σ_i Σ_p −w_ip · log( e^{x_ip} / (e^{x_ip} + Σ_{n∈N_i} e^{x_in}) ), over the views p of i's pair (Eq. 12).

    The trivial pair (i, i) is a positive like any other; weight zero drops a positive. With `balancing_weights`, dividing by
    (number of pairs) · (V + U)² gives the mean over i and p of Eq. 12, and dividing by 3 · (number of pairs) the mean of the three
    combinations. With weights of one, dividing by their number gives Eq. 11, or Eq. 9 if the diagonal is zero.
    """
    own, negatives = scores
    return -(weights.to(own) * F.logsigmoid(own - negatives.logsumexp(2, keepdim=True))).sum()


def mil_nce(scores: Scores, pairs: Bool[Tensor, "view key_view"]) -> Float[Tensor, ""]:
    """Returns MIL-NCE, Σ_i −log( Σ_p e^{x_ip} / (Σ_p e^{x_ip} + Σ_{n∈N_i} e^{x_in}) ) (Eq. 4; Miech et al. 2020).

    P_i are the views of i's pair marked in `pairs`; an anchor without any has no loss.
    """
    own, negatives = scores
    positives = own.masked_fill(~pairs, masked_logit(own.dtype)).logsumexp(2)  # [batch, view]
    return -(F.logsigmoid(positives - negatives.logsumexp(2)) * pairs.any(1)).sum()


def sup_con(scores: Scores, pairs: Bool[Tensor, "view key_view"]) -> Float[Tensor, ""]:
    """Returns SupCon, Σ_i mean_p −log( e^{x_ip} / (Σ_p' e^{x_ip'} + Σ_{n∈N_i} e^{x_in}) ) (Eq. 6; Khosla et al. 2020).

    P_i are the views of i's pair marked in `pairs`; an anchor without any has no loss.
    """
    own, negatives = scores
    positives = own.masked_fill(~pairs, masked_logit(own.dtype)).logsumexp(2)
    denominators = torch.logaddexp(positives, negatives.logsumexp(2))  # [batch, view]
    weights = pairs.to(own) / pairs.sum(1, keepdim=True).clamp(min=1)  # mean over P_i
    return ((denominators[:, :, None] - own) * weights).sum()
