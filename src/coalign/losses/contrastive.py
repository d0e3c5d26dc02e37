"""Contrastive losses, as sums over the local rows: the caller divides by the number of rows of all ranks."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coalign.losses.multi_positive import compare_views, mp_nce
from coalign.losses.tiled import Labels, at_least_float32, labels_2d, negatives_logsumexp, negatives_logsumexp_both_ways

SLOT_CHUNK = 8192  # queue slots compared at once: 16 MB with a batch of 512
SUM_CHUNK = 1024  # queue slots summed by one product


def info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    logit_scale: Float[Tensor, 1] | float,
    labels: Labels | None = None,
) -> Float[Tensor, ""]:
    """Returns InfoNCE, Σ_i −log( e^{s·q_i·k_p(i)} / Σ_j e^{s·q_i·k_j} ), CLIP's cross-entropy (Radford et al. 2021, Fig. 3).

    `positives` is the column of each row's positive, `logit_scale` is s = 1/τ. With `labels`, a row's denominator omits the columns that
    share a label with it, except for its positive. Inputs must be normalized. Computed in at least float32, without materializing the
    similarity matrix.
    """
    scale, (row_labels, column_labels) = _prepare(queries, len(keys), positives, logit_scale, labels)
    negatives = negatives_logsumexp(queries, keys, scale, row_labels, column_labels)
    return -F.logsigmoid(_paired_logits(queries, keys[positives], scale) - negatives).sum()


def clip_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    gathered_images: Float[Tensor, "global_batch dim"],
    gathered_texts: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    logit_scale: Float[Tensor, 1] | float,
    labels: Labels | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns CLIP's loss: the mean of `info_nce` from image to text and from text to image, local rows against gathered columns.

    `positives` holds the global indices of the local rows. If the local rows are the whole batch, both directions share their products.
    With `label_smoothing` ε, the target of a row is 1 − ε on its positive, plus ε spread evenly over the columns of its denominator
    (Szegedy et al. 2016, §7).
    """
    scale, (row_labels, column_labels) = _prepare(images, len(gathered_texts), positives, logit_scale, labels)
    if len(images) == len(gathered_images):
        negatives = torch.stack(negatives_logsumexp_both_ways(images, texts, scale, row_labels, row_labels))
    else:
        pairs = ((images, gathered_texts), (texts, gathered_images))
        negatives = torch.stack([negatives_logsumexp(q, k, scale, row_labels, column_labels) for q, k in pairs])
    paired = _paired_logits(images, texts, scale)
    loss = -F.logsigmoid(paired - negatives).sum() / 2
    if not label_smoothing:
        return loss
    # a share ε of the positive's logit is replaced by the mean logit, which is the logit of the mean key
    means = [
        _paired_logits(queries, _mean_keys(keys, positives, row_labels, column_labels), scale)
        for queries, keys in ((images, gathered_texts), (texts, gathered_images))
    ]
    return loss + label_smoothing * (paired - sum(means) / 2).sum()


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    gathered_first: Float[Tensor, "global_batch dim"],
    gathered_second: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    temperature: float,
    labels: Labels | None = None,
) -> Float[Tensor, ""]:
    """Returns NT-Xent between two views (Chen et al. 2020, Eq. 1), summed over both views of the local rows.

    Each view is contrasted with the other view of its sample against both views of all other samples, except those that share a label with
    it. `positives` holds the global index of each row. Inputs must be normalized. Computed in at least float32,
    without materializing the similarity matrix.
    """
    embeds, gathered = torch.stack([first, second], 1), torch.stack([gathered_first, gathered_second], 1)
    scales = torch.full([2, 2], 1 / temperature, dtype=at_least_float32(first).dtype, device=first.device)
    labels = labels or (positives, torch.arange(len(gathered), device=positives.device))
    scores = compare_views(embeds, gathered, scales, torch.zeros_like(scales), labels)
    return mp_nce(scores, 1 - torch.eye(2, device=first.device))


def _prepare(
    queries: Tensor, num_columns: int, positives: Tensor, logit_scale: Tensor | float, labels: Labels | None
) -> tuple[Tensor, Labels]:
    """Returns the scale as a tensor and the labels as [row, label] and [column, label]. Without labels, each column is its own label."""
    scale = torch.as_tensor(logit_scale, dtype=at_least_float32(queries).dtype, device=queries.device)
    return scale, labels_2d(labels or (positives, torch.arange(num_columns, device=positives.device)))


def _paired_logits(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """Returns s·q_i·k_i for each row i."""
    with torch.autocast(queries.device.type, enabled=False):  # autocast would use half precision
        return (at_least_float32(queries) * at_least_float32(keys)).sum(1) * scale


def _mean_keys(
    keys: Float[Tensor, "column dim"],
    positives: Int[Tensor, " row"],
    row_labels: Int[Tensor, "row label"],
    column_labels: Int[Tensor, "column label"],
) -> Float[Tensor, "row dim"]:
    """Returns the mean key over each row's denominator: its positive, and all columns that share no label with it.

    The columns that share a label are subtracted from the sum over all columns: those equal at each position, less those equal at two, and
    so on. A positive shares all labels with its row.
    """
    with torch.autocast(keys.device.type, enabled=False):
        keys = at_least_float32(keys)
        total, count = keys.sum(0) + keys[positives], keys.new_tensor(len(keys) + 1)
        for size in range(1, row_labels.shape[1] + 1):
            for chosen in combinations(range(row_labels.shape[1]), size):
                labels = torch.cat([row_labels[:, chosen], column_labels[:, chosen]])
                rows, columns = labels.unique(dim=0, return_inverse=True)[1].split([len(row_labels), len(keys)])
                sums = keys.new_zeros(len(labels), keys.shape[1]).index_add(0, columns, keys)
                total = total + (-1) ** size * sums[rows]
                count = count + (-1) ** size * columns.bincount(minlength=len(labels))[rows]
        return total / count[:, None]


# ---------------------------------------------------------------- against a queue of keys


def queue_info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "queue dim"],
    temperature: float,
    ignored: Bool[Tensor, "batch queue"] | None = None,
) -> Float[Tensor, " batch"]:
    """Returns InfoNCE of each query with its key against the keys of a queue (He et al. 2020, Eq. 1; MCT, Eqs. 3 and 8):
    −log( e^{q_i·k_i/τ} / (e^{q_i·k_i/τ} + Σ_j e^{q_i·k_j/τ}) ) for each row i.

    `ignored` marks slots to omit: empty ones and those that are not negatives. If all are, loss and gradient are zero. Keys and queue
    receive no gradient. Inputs must be normalized. Computed in at least float32, without materializing the similarity matrix.
    """
    return _QueueInfoNCE.apply(queries, keys.detach(), queue.detach(), temperature, ignored)


class _QueueInfoNCE(torch.autograd.Function):
    """Computes the gradient in the same pass over the queue, SLOT_CHUNK at a time: (k̄_i − k_i)/τ with the softmax-weighted mean key k̄_i."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, ignored: Tensor | None
    ) -> Tensor:
        ctx.dtype = queries.dtype
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys, queue = (at_least_float32(x) for x in (queries, keys, queue))
            positive = (queries * keys).sum(1, keepdim=True) / temperature  # [batch, 1]
            # online softmax, starting with the positive: the largest logit so far, and Σ e^l and Σ e^l·k relative to it
            largest, total, weighted = positive, torch.ones_like(positive), keys
            for first in range(0, len(queue), SLOT_CHUNK):
                slots = slice(first, first + SLOT_CHUNK)
                logits = (queries @ queue[slots].T).div_(temperature)  # [batch, slots]
                if ignored is not None:
                    logits.masked_fill_(ignored[:, slots], -torch.inf)
                previous, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
                rescale, terms = (previous - largest).exp(), logits.sub_(largest).exp_()
                total = total * rescale + terms.sum(1, keepdim=True)
                weighted = weighted * rescale + terms @ queue[slots]
            ctx.save_for_backward((weighted / total - keys) / temperature)
            return (largest + total.log() - positive).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (query_grad,) = ctx.saved_tensors
        return (gradient[:, None] * query_grad).to(ctx.dtype), None, None, None, None


def tag_info_nce(
    info_nce: Float[Tensor, " batch"],
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "queue dim"],
    temperature: float,
    positives: Bool[Tensor, "batch queue"],
) -> Float[Tensor, " batch"]:
    """Returns MCT's J_tag (Eq. 5) for each row i: −1/|P_i| Σ_{p∈P_i} log( e^{q_i·k_p/τ} / Σ_j e^{q_i·k_j/τ} ).

    `info_nce` is the rows' `queue_info_nce`. It has the same denominator, so only q_i·k_i is replaced by the mean of q_i·k_p over P_i,
    which is q_i times the mean key. P_i contains the row's own key and the slots marked in `positives`, none of which may be ignored.
    Without such slots, J_tag is InfoNCE.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, queue = (at_least_float32(x) for x in (queries, keys, queue))
        weights = positives.to(queue.dtype)
        # in chunks, because some CPU kernels add long sums sequentially, and 1/τ amplifies the rounding error
        chunks = zip(weights.split(SUM_CHUNK, dim=1), queue.split(SUM_CHUNK))
        slot_sum = torch.stack([weight @ slots for weight, slots in chunks]).sum(0)
        mean_key = (keys + slot_sum) / (1 + weights.sum(1, keepdim=True))
        return info_nce + (queries * (keys - mean_key)).sum(1) / temperature


@torch.no_grad()
def common_tags(
    tags: Int[Tensor, "batch tag"], queue_tags: Int[Tensor, "queue queue_tag"]
) -> UInt8[Tensor, "batch queue"]:
    """Returns the number of tags that each sample shares with each slot: t_p · t_j of MCT's Eq. 4.

    Tags are lists of at most 255 distinct ids, padded with −1. Multi-hot vectors over the whole vocabulary would take gigabytes for the
    queue. Instead, a table stores which sample of the batch has which tag, and each slot sums the rows of its tags.
    """
    batch_tags = tags.unique()
    batch_tags = batch_tags[batch_tags >= 0]
    if not len(batch_tags):
        return torch.zeros(len(tags), len(queue_tags), dtype=torch.uint8, device=tags.device)
    absent = len(batch_tags)  # a row of zeros, for padding and for tags that are not in the batch
    table = torch.zeros(absent + 1, len(tags), device=tags.device)
    sample = torch.arange(len(tags), device=tags.device)[:, None].expand_as(tags)
    table[torch.searchsorted(batch_tags, tags).where(tags >= 0, absent), sample] = 1
    table[absent] = 0
    rows = torch.searchsorted(batch_tags, queue_tags).clamp(max=absent - 1)
    rows = rows.where(batch_tags[rows] == queue_tags, absent)  # [queue, queue_tag]
    counts = []
    for chunk in rows.split(SLOT_CHUNK):
        shared = F.embedding_bag(chunk, table, mode="sum", padding_idx=absent)  # [chunk, batch]
        counts.append(shared.to(torch.uint8).T)
    return torch.cat(counts, dim=1)
