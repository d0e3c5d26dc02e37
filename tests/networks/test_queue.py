import collections

import pytest
import torch
from torch.nn import functional as F

from coalign.networks import queue as queue_module
from coalign.networks.queue import FeatureQueue, nearest_neighbors


def empty_queue(size, dim=3):
    empty = torch.tensor(-1)
    return FeatureQueue(size, embeds=torch.zeros(dim), indices=empty, caption_ids=empty)


def rows(first, count, dim=3):
    """Returns distinguishable rows: index = number, caption id = number // 2."""
    numbers = torch.arange(first, first + count)
    g = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(100, dim, generator=g), dim=-1)
    return {"embeds": directions[numbers], "indices": numbers, "caption_ids": numbers // 2}


@pytest.mark.parametrize("size", [1, 4, 7, 20])
def test_first_in_first_out(size):
    queue, expected, pushed = empty_queue(size), collections.deque(maxlen=size), 0
    for count in (3, 1, 4, 0, 7, 2, 15, 3):
        queue.push(**rows(pushed, count))
        expected.extend(range(pushed, pushed + count))
        pushed += count
        stored = queue["indices"][queue.filled]
        assert sorted(stored.tolist()) == list(expected)
        assert (queue["indices"][~queue.filled] == -1).all()
        assert queue.fill.item() == pytest.approx(len(expected) / size)
        all_rows = rows(0, 100)  # the columns stay aligned
        torch.testing.assert_close(queue["embeds"][queue.filled], all_rows["embeds"][stored])
        assert torch.equal(queue["caption_ids"][queue.filled], all_rows["caption_ids"][stored])


def test_state_dict_is_complete():
    queue, resumed = empty_queue(5), empty_queue(5)
    queue.push(**rows(0, 7))
    assert set(queue.state_dict()) == {"embeds", "indices", "caption_ids", "num_pushed"}
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.push(**rows(7, 2))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_push_detaches_casts_and_needs_every_column():
    queue = empty_queue(4)
    embeds = torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)
    queue.push(embeds=embeds, indices=torch.tensor([0]), caption_ids=torch.tensor([0]))
    assert queue["embeds"].dtype == torch.float32
    assert not queue["embeds"].requires_grad
    with pytest.raises(ValueError, match=r"embeds, indices, caption_ids, but got embeds\."):
        queue.push(embeds=torch.ones(1, 3))


def test_equals_declips_memory_bank(oracles):
    oracle = {key.removeprefix("declip_nnbank."): value for key, value in oracles("declip").items()}
    queue = FeatureQueue(20, embeds=torch.zeros(8))
    queue.push(embeds=oracle["in.bank0"].T)
    for number in range(3):
        query = F.normalize(oracle[f"in.query{number}"], dim=-1)
        neighbors = nearest_neighbors(queue, query, {})
        torch.testing.assert_close(neighbors.embeds, F.normalize(oracle[f"out.nn{number}"], dim=-1))
        if number < 2:  # the released code's third update drops rows
            queue.push(embeds=oracle[f"in.query{number}"])
            torch.testing.assert_close(queue["embeds"], oracle[f"out.bank{number + 1}"].T)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_nearest_neighbors_equal_loops(monkeypatch, chunk):
    monkeypatch.setattr(queue_module, "QUERY_CHUNK", chunk)
    queue = empty_queue(30)
    queue.push(**rows(0, 20))
    excluded = {"indices": torch.arange(16, 24), "caption_ids": torch.arange(16, 24) // 2}
    queries = F.normalize(torch.randn(8, 3), dim=-1)
    for columns in ({}, {"indices": excluded["indices"]}, excluded):
        neighbors = nearest_neighbors(queue, queries, columns)
        for row, query in enumerate(queries):
            best, best_slot = -2.0, -1
            for slot in range(20):
                if any(queue[name][slot] == values[row] for name, values in columns.items()):
                    continue
                if (similarity := float(query @ queue["embeds"][slot])) > best:
                    best, best_slot = similarity, slot
            assert neighbors.slots[row] == best_slot
            assert neighbors.similarity[row].item() == pytest.approx(best, abs=1e-6)
            torch.testing.assert_close(neighbors.embeds[row], queue["embeds"][best_slot])


def test_query_without_neighbor():
    queue = empty_queue(4)
    queries = F.normalize(torch.randn(2, 3), dim=-1)
    excluded = {"caption_ids": torch.tensor([0, 5])}
    empty = nearest_neighbors(queue, queries, excluded)
    assert empty.slots.tolist() == [-1, -1]
    queue.push(**rows(0, 2))  # both with caption 0
    neighbors = nearest_neighbors(queue, queries, excluded)
    assert neighbors.slots[0] == -1
    assert neighbors.embeds[0].abs().sum() == neighbors.similarity[0] == 0
    assert neighbors.slots[1] in (0, 1)


def test_shuffled_search_is_uniform_over_allowed_slots():
    queue = empty_queue(30)
    queue.push(**rows(0, 20))
    # without exclusion, slot 0 would be the nearest
    queries, excluded = rows(0, 1)["embeds"], {"indices": torch.tensor([0])}
    g = torch.Generator().manual_seed(0)
    counts = collections.Counter(
        nearest_neighbors(queue, queries, excluded, torch.randperm(30, generator=g)).slots.item() for _ in range(1900)
    )
    assert set(counts) == set(range(1, 20))  # filled slots except its own
    assert min(counts.values()) > 60  # the expected count is 100
    assert max(counts.values()) < 145
    neighbors = nearest_neighbors(queue, queries, excluded, torch.randperm(30, generator=g))
    torch.testing.assert_close(neighbors.embeds[0], queue["embeds"][neighbors.slots[0]])
    assert neighbors.similarity.item() == pytest.approx(float(queries[0] @ neighbors.embeds[0]), abs=1e-6)


def test_half_precision_queries_are_compared_in_float32():
    queue = empty_queue(20)
    queue.push(**rows(0, 20))
    queries = rows(5, 4)["embeds"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        neighbors = nearest_neighbors(queue, queries, {})
    assert neighbors.slots.tolist() == [5, 6, 7, 8]
    assert neighbors.similarity.dtype == torch.float32
