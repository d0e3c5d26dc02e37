"""First-in-first-out queues of features, and nearest-neighbor search in a queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

QUERY_CHUNK = 256  # queries compared with the whole queue at once: 64 MB with 65,536 slots


class FeatureQueue(nn.Module):
    """Holds the newest `size` rows of aligned columns, each a buffer. A new row replaces the oldest.

    A column is declared by the value of its empty slots, which sets its shape and dtype: `FeatureQueue(8, embeds=torch.zeros(16),
    caption_ids=torch.tensor(-1))`. `queue["embeds"]` is [queue, 16]; `filled` marks the slots that hold rows. A queue larger than the
    dataset holds several rows per sample, from different epochs.
    """

    num_pushed: Tensor

    def __init__(self, size: int, **columns: Tensor) -> None:
        super().__init__()
        self.size, self.columns = size, tuple(columns)
        for name, empty in columns.items():
            self.register_buffer(name, empty.expand(size, *empty.shape).clone())
        # total number of rows pushed; the next row enters the slot num_pushed modulo size
        self.register_buffer("num_pushed", torch.zeros(1, dtype=torch.long))

    def __getitem__(self, column: str) -> Tensor:
        return getattr(self, column)

    @property
    def filled(self) -> Tensor:
        """Mask of slots that hold a row, bool [queue]."""
        return torch.arange(self.size, device=self.num_pushed.device) < self.num_pushed

    @property
    def fill(self) -> Tensor:
        """Fraction of slots that hold a row, []."""
        return (self.num_pushed[0] / self.size).clamp(max=1)

    @torch.no_grad()
    def push(self, **rows: Tensor) -> None:
        """Adds rows, given as [row, …] for every column; the last row is the newest. If there are more rows than slots, only the last ones
        are kept. Raises ValueError if the columns differ from the queue's."""
        if set(rows) != set(self.columns):
            raise ValueError(f"The queue has columns {', '.join(self.columns)}, but got {', '.join(rows)}.")
        (num_rows,) = {len(values) for values in rows.values()}
        kept = torch.arange(max(0, num_rows - self.size), num_rows, device=self.num_pushed.device)
        slots = (self.num_pushed + kept) % self.size
        for name, values in rows.items():
            self[name].index_copy_(0, slots, values.detach()[kept].to(self[name].dtype))
        self.num_pushed += num_rows


class Neighbors(NamedTuple):
    slots: Tensor  # int64 [batch], the neighbor's slot in the queue; -1 if there is none
    embeds: Tensor  # float [batch, dim], normalized; zero if there is none
    similarity: Tensor  # float [batch], cosine with the neighbor; 0 if there is none


@torch.no_grad()
def nearest_neighbors(
    queue: FeatureQueue,
    queries: Float[Tensor, "batch dim"],
    excluded: Mapping[str, Int[Tensor, " batch"]],
    shuffle: Int[Tensor, " queue"] | None = None,
) -> Neighbors:
    """Returns, for each normalized query, the slot of `queue` with the most similar "embeds".

    Empty slots are skipped, and so are slots that equal the query's value in a column of `excluded` (same sample, same caption). The
    control `shuffle`, a permutation of the slots, compares queries with the embeds of other slots: the result is then random, but still
    never a skipped slot.
    """
    keys = queue["embeds"]
    searched, empty = (keys if shuffle is None else keys[shuffle]), ~queue.filled
    best, slots = [], []
    with torch.autocast(queries.device.type, enabled=False):  # autocast would use half precision
        queries = queries.to(keys.dtype)
        for rows in torch.arange(len(queries), device=queries.device).split(QUERY_CHUNK):
            similarity = queries[rows] @ searched.T  # [rows, queue]
            skipped = empty.expand_as(similarity)
            for column, values in excluded.items():
                skipped = skipped | (values[rows, None] == queue[column])
            value, slot = similarity.masked_fill_(skipped, -torch.inf).max(1)
            best.append(value)
            slots.append(slot)
        valid = torch.cat(best) > -torch.inf
        slot = torch.cat(slots)
        embeds = F.normalize(keys[slot], dim=-1) * valid[:, None]
        return Neighbors(torch.where(valid, slot, -1), embeds, (queries * embeds).sum(-1))
