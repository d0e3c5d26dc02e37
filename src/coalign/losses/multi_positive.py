"""Contrastive losses with several positives (UniCLIP §2.2), as sums over this rank's rows: the caller divides.

Every view of a pair is an anchor. Positives are members of the own pair; negatives, N_i, are all members of all other pairs, except of
those that share a label with the own one. x_ij = log s_ij. Views of images come before views of texts. A row without negatives has loss
zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from coalign.losses.tiled import (
    Labels,
    as_rows,
    at_least_float32,
    floor,
    sum_over_others,
    sum_over_others_both_ways,
    sum_over_others_within,
)


class Scores(NamedTuple):
    """What these losses are made of, for every anchor of this rank's pairs, [batch, view]."""

    own: Float[Tensor, "batch view key_view"]  # x_ip of every member p of the own pair
    negatives: Float[Tensor, "batch view key_view"]  # log Σ e^{x_in} over the negatives of each view

    def among(self, anchors: slice, others: slice) -> Scores:
        """Of some views as anchors, compared with some views alone."""
        return Scores(self.own[:, anchors, others], self.negatives[:, anchors, others])


def domain_combinations(num_images: int, num_texts: int) -> Int[Tensor, "view view"]:
    """D(i, j) of views i and j: 0 for image-image, 1 for image-text, 2 for text-text."""
    is_text = torch.arange(num_images + num_texts) >= num_images
    return is_text[:, None].long() + is_text[None, :].long()


def balancing_weights(num_images: int, num_texts: int) -> Float[Tensor, "view view"]:
    """w_D of Eq. 12: 1/V², 1/(2UV), 1/U², one over a combination's number of positives, so that each contributes equally."""
    pairs = torch.tensor([num_images**2, 2 * num_images * num_texts, num_texts**2], dtype=torch.float64)
    return (1 / pairs)[domain_combinations(num_images, num_texts)]


def compare_views(
    embeds: Float[Tensor, "batch view dim"],
    gathered: Float[Tensor, "global_batch view dim"],
    logit_scales: Float[Tensor, "view view"],
    offsets: Float[Tensor, "view view"],
    labels: Labels,
) -> Scores:
    """The scores log s_ij = (cos(z_i, z_j) − b_D(i,j)) / τ_D(i,j) (Eq. 16), of normalised embeddings, in at least float32 and without the
    matrix of all of them in memory. `logit_scales` are 1/τ and, as `offsets`, symmetric.

    `labels` of own and of all pairs: their places, or the ids of their captions, where pairs with the same one are no negatives. Where the
    own rows are the whole batch, each two views are multiplied once.
    """
    with torch.autocast(embeds.device.type, enabled=False):  # which would compute the products in half precision
        own = at_least_float32(embeds)
        own = (torch.einsum("ivd,iwd->ivw", own, own) - offsets) * logit_scales
    rows, columns = as_rows(labels)
    views, all_views = ([x.contiguous() for x in embeds.unbind(1)] for embeds in (embeds, gathered))
    sums: dict[tuple[int, int], Tensor] = {}
    for v, view in enumerate(views):
        for w, other in enumerate(all_views):
            scale = logit_scales[v, w]
            if len(embeds) < len(gathered):
                sums[v, w] = sum_over_others(view, other, scale, rows, columns)
            elif v == w:
                sums[v, v] = sum_over_others_within(view, scale, rows)
            elif v < w:
                sums[v, w], sums[w, v] = sum_over_others_both_ways(view, views[w], scale, rows, rows)
    number = range(len(views))
    negatives = torch.stack([torch.stack([sums[v, w] for w in number], 1) for v in number], 1)
    return Scores(own, negatives - offsets * logit_scales)


def mp_nce(scores: Scores, weights: Float[Tensor, "view key_view"]) -> Float[Tensor, ""]:
    """MP-NCE: Σ_i Σ_p −w_ip · log( e^{x_ip} / (e^{x_ip} + Σ_{n∈N_i} e^{x_in}) ) over the members p of i's own pair (Eq. 12).

    The trivial pair (i, i) is a positive as any other; a weight of zero drops a positive. With `balancing_weights` the batch's mean over i
    and p of Eq. 12 is this divided by (number of pairs) · (V + U)²; divided by 3 · (number of pairs) it is the mean of the three
    combinations. With ones it is Eq. 11, and with ones but zeros on the diagonal Eq. 9, divided by the number of ones.
    """
    own, negatives = scores
    return -(weights.to(own) * F.logsigmoid(own - negatives.logsumexp(2, keepdim=True))).sum()


def mil_nce(scores: Scores, pairs: Bool[Tensor, "view key_view"]) -> Float[Tensor, ""]:
    """MIL-NCE: Σ_i −log( Σ_p e^{x_ip} / (Σ_p e^{x_ip} + Σ_{n∈N_i} e^{x_in}) ) (Eq. 4; Miech et al. 2020).

    P_i are the members of the own pair where `pairs` is true; a row where it is true nowhere has no loss.
    """
    own, negatives = scores
    positives = own.masked_fill(~pairs, floor(own.dtype)).logsumexp(2)  # [batch, view]
    return -(F.logsigmoid(positives - negatives.logsumexp(2)) * pairs.any(1)).sum()


def sup_con(scores: Scores, pairs: Bool[Tensor, "view key_view"]) -> Float[Tensor, ""]:
    """SupCon: Σ_i mean_p −log( e^{x_ip} / (Σ_p' e^{x_ip'} + Σ_{n∈N_i} e^{x_in}) ) (Eq. 6; Khosla et al. 2020).

    P_i are the members of the own pair where `pairs` is true; a row where it is true nowhere has no loss.
    """
    own, negatives = scores
    positives = own.masked_fill(~pairs, floor(own.dtype)).logsumexp(2)
    denominators = torch.logaddexp(positives, negatives.logsumexp(2))  # [batch, view]
    share = pairs.to(own) / pairs.sum(1, keepdim=True).clamp(min=1)  # mean over P_i
    return ((denominators[:, :, None] - own) * share).sum()
