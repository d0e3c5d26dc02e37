"""First-in-first-out queues of features, and the nearest neighbour in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

ROWS_AT_ONCE = 256  # whose similarities to the whole queue are in memory together: 64 MB with 65,536 slots


class FeatureQueue(nn.Module):
    """The newest `size` rows of aligned columns, each column a buffer; the row that comes replaces the oldest.

    A column is declared by the value of its empty slots, which gives shape and type: `FeatureQueue(8, embeds=torch.zeros(16),
    caption_ids=torch.tensor(-1))`. `queue["embeds"]` is [queue, 16], of which the slots in `filled` hold rows. A queue that is larger than
    the data keeps several rows of a sample, from several epochs.
    """

    num_pushed: Tensor

    def __init__(self, size: int, **columns: Tensor) -> None:
        super().__init__()
        self.size, self.columns = size, tuple(columns)
        for name, empty in columns.items():
            self.register_buffer(name, empty.expand(size, *empty.shape).clone())
        self.register_buffer(
            "num_pushed", torch.zeros(1, dtype=torch.long)
        )  # rows ever; the next goes to this slot modulo size

    def __getitem__(self, column: str) -> Tensor:
        return getattr(self, column)

    @property
    def filled(self) -> Tensor:
        """bool [queue], true where a slot holds a row."""
        return torch.arange(self.size, device=self.num_pushed.device) < self.num_pushed

    @property
    def fill(self) -> Tensor:
        """The share of slots that hold a row, []."""
        return (self.num_pushed[0] / self.size).clamp(max=1)

    @torch.no_grad()
    def push(self, **rows: Tensor) -> None:
        """Puts in rows of every column, [row, …], the last one as the newest. Of more rows than slots, the last ones stay."""
        if set(rows) != set(self.columns):
            raise ValueError(f"the queue holds {', '.join(self.columns)}, not {', '.join(rows)}")
        (num_rows,) = {len(values) for values in rows.values()}
        kept = torch.arange(max(0, num_rows - self.size), num_rows, device=self.num_pushed.device)
        slots = (self.num_pushed + kept) % self.size
        for name, values in rows.items():
            self[name].index_copy_(0, slots, values.detach()[kept].to(self[name].dtype))
        self.num_pushed += num_rows


class Neighbours(NamedTuple):
    slots: Tensor  # int64 [batch], the neighbour's slot in the queue; -1 where there is none
    embeds: Tensor  # float [batch, dim], normalised; zero where there is none
    similarity: Tensor  # float [batch], its cosine; 0 where there is none


@torch.no_grad()
def nearest_neighbours(
    queue: FeatureQueue,
    queries: Float[Tensor, "batch dim"],
    own: Mapping[str, Int[Tensor, " batch"]],
    shuffle: Int[Tensor, " queue"] | None = None,
) -> Neighbours:
    """The slot of `queue` whose "embeds" are most similar to each normalised query.

    Empty slots are out, and so are those that equal the row's value in one of the columns named in `own` (the same sample, the same
    caption). The control `shuffle`, a permutation of the slots, searches by the embeds of other slots: what is found is random, but never
    what is out.
    """
    keys = queue["embeds"]
    searched, empty = (keys if shuffle is None else keys[shuffle]), ~queue.filled
    best, slots = [], []
    with torch.autocast(queries.device.type, enabled=False):  # which would compare in half precision
        queries = queries.to(keys.dtype)
        for rows in torch.arange(len(queries), device=queries.device).split(ROWS_AT_ONCE):
            similarity = queries[rows] @ searched.T  # [rows, queue]
            out = empty.expand_as(similarity)
            for column, values in own.items():
                out = out | (values[rows, None] == queue[column])
            value, slot = similarity.masked_fill_(out, -torch.inf).max(1)
            best.append(value)
            slots.append(slot)
        found = torch.cat(best) > -torch.inf
        slot = torch.cat(slots)
        embeds = F.normalize(keys[slot], dim=-1) * found[:, None]
        return Neighbours(torch.where(found, slot, -1), embeds, (queries * embeds).sum(-1))
