"""Contrastive losses, as sums over this rank's rows: the caller divides by the number of rows of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coalign.losses.multi_positive import compare_views, mp_nce
from coalign.losses.tiled import Labels, as_rows, at_least_float32, sum_over_others, sum_over_others_both_ways

SLOTS_AT_ONCE = 8192  # of a queue, which are compared together: 16 MB with a batch of 512
SUMMED_AT_ONCE = 1024  # slots whose keys are added up by one product


def info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    logit_scale: Float[Tensor, 1] | float,
    labels: Labels | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE: Σ_i −log( e^{s·q_i·k_p(i)} / Σ_j e^{s·q_i·k_j} ), the cross-entropy of CLIP (Radford et al. 2021, Fig. 3).

    `positives` holds the column of each row's positive, `logit_scale` multiplies (1/τ). With `labels`, columns that share one with the row,
    as its positive does, are left out of its denominator, the positive excepted. Inputs are normalised by the caller; computed in at least
    float32, and without the matrix of all similarities in memory.
    """
    scale, (of_rows, of_columns) = _settle(queries, len(keys), positives, logit_scale, labels)
    others = sum_over_others(queries, keys, scale, of_rows, of_columns)
    return -F.logsigmoid(_own(queries, keys[positives], scale) - others).sum()


def clip_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    gathered_images: Float[Tensor, "global_batch dim"],
    gathered_texts: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    logit_scale: Float[Tensor, 1] | float,
    labels: Labels | None = None,
) -> Float[Tensor, ""]:
    """CLIP's loss: the mean of `info_nce` from image to text and from text to image, of own rows against all columns.

    `positives` are the own rows' places among all: where these are the whole batch, one product serves both directions.
    """
    scale, (of_rows, of_columns) = _settle(images, len(gathered_texts), positives, logit_scale, labels)
    if len(images) == len(gathered_images):
        others = torch.stack(sum_over_others_both_ways(images, texts, scale, of_rows, of_rows))
    else:
        pairs = ((images, gathered_texts), (texts, gathered_images))
        others = torch.stack([sum_over_others(q, k, scale, of_rows, of_columns) for q, k in pairs])
    return -F.logsigmoid(_own(images, texts, scale) - others).sum() / 2


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    gathered_first: Float[Tensor, "global_batch dim"],
    gathered_second: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, ""]:
    """NT-Xent between two views (Chen et al. 2020, Eq. 1), summed over both views of own rows: each picks its sample's other view among
    both views of all samples, itself left out. `positives` holds the global position of each row. Inputs are normalised by the caller;
    computed in at least float32, and without the matrix of all similarities in memory.
    """
    embeds, gathered = torch.stack([first, second], 1), torch.stack([gathered_first, gathered_second], 1)
    scales = torch.full([2, 2], 1 / temperature, dtype=at_least_float32(first).dtype, device=first.device)
    every = torch.arange(len(gathered), device=positives.device)
    scores = compare_views(embeds, gathered, scales, torch.zeros_like(scales), (positives, every))
    return mp_nce(scores, 1 - torch.eye(2, device=first.device))


def _settle(
    queries: Tensor, columns: int, positives: Tensor, logit_scale: Tensor | float, labels: Labels | None
) -> tuple[Tensor, Labels]:
    """The scale as a tensor, and labels [row, label] and [column, label]: where none are given, a place is its own."""
    scale = torch.as_tensor(logit_scale, dtype=at_least_float32(queries).dtype, device=queries.device)
    return scale, as_rows(labels or (positives, torch.arange(columns, device=positives.device)))


def _own(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast(queries.device.type, enabled=False):  # which would compute in half precision
        return (at_least_float32(queries) * at_least_float32(keys)).sum(1) * scale


# ---------------------------------------------------------------- against a queue of keys


def queue_info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "queue dim"],
    temperature: float,
    ignored: Bool[Tensor, "batch queue"] | None = None,
) -> Float[Tensor, " batch"]:
    """InfoNCE of each query with its own key, against the keys of a queue (He et al. 2020, Eq. 1; MCT, Eqs. 3 and 8):
    −log( e^{q_i·k_i/τ} / (e^{q_i·k_i/τ} + Σ_j e^{q_i·k_j/τ}) ) for each row i.

    Where `ignored` is true, for an empty slot or what is no negative, the slot is left out; without any left the loss is zero, with a
    gradient of zero. Own keys and queue get no gradient. Inputs are normalised by the caller; computed in at least float32, and without
    the matrix of all similarities in memory.
    """
    return _QueueInfoNCE.apply(queries, keys.detach(), queue.detach(), temperature, ignored)


class _QueueInfoNCE(torch.autograd.Function):
    """With its gradient in the same pass over the queue, SLOTS_AT_ONCE at a time: (k̄_i − k_i)/τ, where k̄ is the softmax's mean key."""

    @staticmethod
    def forward(
        context: Any, queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, ignored: Tensor | None
    ) -> Tensor:
        context.dtype = queries.dtype
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys, queue = (at_least_float32(x) for x in (queries, keys, queue))
            own = (queries * keys).sum(1, keepdim=True) / temperature  # [batch, 1]
            # of what was seen so far, the own key at first: the largest logit, and Σ e^l and Σ e^l·k relative to it
            largest, total, weighted = own, torch.ones_like(own), keys
            for first in range(0, len(queue), SLOTS_AT_ONCE):
                slots = slice(first, first + SLOTS_AT_ONCE)
                logits = (queries @ queue[slots].T).div_(temperature)  # [batch, slots]
                if ignored is not None:
                    logits.masked_fill_(ignored[:, slots], -torch.inf)
                before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
                shrunk, terms = (before - largest).exp(), logits.sub_(largest).exp_()
                total = total * shrunk + terms.sum(1, keepdim=True)
                weighted = weighted * shrunk + terms @ queue[slots]
            context.save_for_backward((weighted / total - keys) / temperature)
            return (largest + total.log() - own).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_queries,) = context.saved_tensors
        return (gradient[:, None] * of_queries).to(context.dtype), None, None, None, None


def tag_info_nce(
    info_nce: Float[Tensor, " batch"],
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "queue dim"],
    temperature: float,
    positives: Bool[Tensor, "batch queue"],
) -> Float[Tensor, " batch"]:
    """MCT's J_tag (Eq. 5) for each row i: −1/|P_i| Σ_{p∈P_i} log( e^{q_i·k_p/τ} / Σ_j e^{q_i·k_j/τ} ), from the row's `queue_info_nce`,
    whose denominator is the same: the mean of q_i·k_p over P_i takes the place of q_i·k_i, and is q_i times the mean key.

    P_i is the own key and the slots that are true in `positives`, none of which may have been ignored. Without any it is InfoNCE.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, queue = (at_least_float32(x) for x in (queries, keys, queue))
        shared = positives.to(queue.dtype)
        # in parts: some processors' kernels add up a long sum one by one, whose rounding 1/τ makes visible
        parts = zip(shared.split(SUMMED_AT_ONCE, dim=1), queue.split(SUMMED_AT_ONCE))
        of_slots = torch.stack([part @ slots for part, slots in parts]).sum(0)
        mean_key = (keys + of_slots) / (1 + shared.sum(1, keepdim=True))
        return info_nce + (queries * (keys - mean_key)).sum(1) / temperature


@torch.no_grad()
def common_tags(
    tags: Int[Tensor, "batch tag"], queue_tags: Int[Tensor, "queue queue_tag"]
) -> UInt8[Tensor, "batch queue"]:
    """How many tags each sample has in common with each slot: t_p · t_j of MCT's Eq. 4.

    Tags are lists of at most 255 ids without repetition, padded with −1. Binary vectors of the whole vocabulary would take gigabytes for
    the queue; here each slot sums the rows of its tags in a table of which of the batch's own tags each sample has.
    """
    known = tags.unique()
    known = known[known >= 0]  # the tags of this batch
    if not len(known):
        return torch.zeros(len(tags), len(queue_tags), dtype=torch.uint8, device=tags.device)
    none = len(known)  # where padding and other tags lead: a row of zeros
    table = torch.zeros(none + 1, len(tags), device=tags.device)
    sample = torch.arange(len(tags), device=tags.device)[:, None].expand_as(tags)
    table[torch.searchsorted(known, tags).where(tags >= 0, none), sample] = 1
    table[none] = 0
    places = torch.searchsorted(known, queue_tags).clamp(max=none - 1)
    places = places.where(known[places] == queue_tags, none)  # [queue, queue_tag]
    counts = []
    for slots in places.split(SLOTS_AT_ONCE):
        of_slots = F.embedding_bag(slots, table, mode="sum", padding_idx=none)  # [slots, batch]
        counts.append(of_slots.to(torch.uint8).T)
    return torch.cat(counts, dim=1)
