import collections

import pytest
import torch
from torch.nn import functional as F

from coalign.networks import queue as queue_module
from coalign.networks.queue import FeatureQueue, nearest_neighbours


def new_queue(size, dim=3):
    none = torch.tensor(-1)
    return FeatureQueue(size, embeds=torch.zeros(dim), indices=none, caption_ids=none)


def rows(first, count, dim=3):
    """Rows that tell their number; sample = number, caption = number // 2."""
    numbers = torch.arange(first, first + count)
    g = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(100, dim, generator=g), dim=-1)
    return {"embeds": directions[numbers], "indices": numbers, "caption_ids": numbers // 2}


@pytest.mark.parametrize("size", [1, 4, 7, 20])
def test_is_first_in_first_out(size):
    queue, expected, pushed = new_queue(size), collections.deque(maxlen=size), 0
    for count in (3, 1, 4, 0, 7, 2, 15, 3):
        queue.push(**rows(pushed, count))
        expected.extend(range(pushed, pushed + count))
        pushed += count
        held = queue["indices"][queue.filled]
        assert sorted(held.tolist()) == list(expected)
        assert (queue["indices"][~queue.filled] == -1).all()
        assert queue.fill.item() == pytest.approx(len(expected) / size)
        together = rows(0, 100)  # the columns stay aligned
        torch.testing.assert_close(queue["embeds"][queue.filled], together["embeds"][held])
        assert torch.equal(queue["caption_ids"][queue.filled], together["caption_ids"][held])


def test_the_state_dict_is_all_there_is():
    queue, resumed = new_queue(5), new_queue(5)
    queue.push(**rows(0, 7))
    assert set(queue.state_dict()) == {"embeds", "indices", "caption_ids", "num_pushed"}
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.push(**rows(7, 2))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_pushing_takes_values_not_graphs_and_every_column():
    queue = new_queue(4)
    embeds = torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True)
    queue.push(embeds=embeds, indices=torch.tensor([0]), caption_ids=torch.tensor([0]))
    assert queue["embeds"].dtype == torch.float32
    assert not queue["embeds"].requires_grad
    with pytest.raises(ValueError, match="embeds, indices, caption_ids, not embeds"):
        queue.push(embeds=torch.ones(1, 3))


def test_lookups_and_updates_equal_declips_memory_bank(oracles):
    oracle = {key.removeprefix("declip_nnbank."): value for key, value in oracles("declip").items()}
    queue = FeatureQueue(20, embeds=torch.zeros(8))
    queue.push(embeds=oracle["in.bank0"].T)
    for number in range(3):
        query = F.normalize(oracle[f"in.query{number}"], dim=-1)
        found = nearest_neighbours(queue, query, {})
        torch.testing.assert_close(found.embeds, F.normalize(oracle[f"out.nn{number}"], dim=-1))
        if number < 2:  # its third update drops rows
            queue.push(embeds=oracle[f"in.query{number}"])
            torch.testing.assert_close(queue["embeds"], oracle[f"out.bank{number + 1}"].T)


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_nearest_neighbour_equals_loops(monkeypatch, at_once):
    monkeypatch.setattr(queue_module, "ROWS_AT_ONCE", at_once)
    queue = new_queue(30)
    queue.push(**rows(0, 20))
    own = {"indices": torch.arange(16, 24), "caption_ids": torch.arange(16, 24) // 2}
    queries = F.normalize(torch.randn(8, 3), dim=-1)
    for columns in ({}, {"indices": own["indices"]}, own):
        found = nearest_neighbours(queue, queries, columns)
        for row, query in enumerate(queries):
            best, best_slot = -2.0, -1
            for slot in range(20):
                if any(queue[name][slot] == values[row] for name, values in columns.items()):
                    continue
                if (similarity := float(query @ queue["embeds"][slot])) > best:
                    best, best_slot = similarity, slot
            assert found.slots[row] == best_slot
            assert found.similarity[row].item() == pytest.approx(best, abs=1e-6)
            torch.testing.assert_close(found.embeds[row], queue["embeds"][best_slot])


def test_a_row_without_any_neighbour():
    queue = new_queue(4)
    queries = F.normalize(torch.randn(2, 3), dim=-1)
    own = {"caption_ids": torch.tensor([0, 5])}
    empty = nearest_neighbours(queue, queries, own)
    assert empty.slots.tolist() == [-1, -1]
    queue.push(**rows(0, 2))  # both with caption 0
    found = nearest_neighbours(queue, queries, own)
    assert found.slots[0] == -1
    assert found.embeds[0].abs().sum() == found.similarity[0] == 0
    assert found.slots[1] in (0, 1)


def test_shuffled_search_finds_any_allowed_slot_alike():
    queue = new_queue(30)
    queue.push(**rows(0, 20))
    queries, own = rows(0, 1)["embeds"], {"indices": torch.tensor([0])}  # its nearest would be itself, in slot 0
    g = torch.Generator().manual_seed(0)
    counts = collections.Counter(
        nearest_neighbours(queue, queries, own, torch.randperm(30, generator=g)).slots.item() for _ in range(1900)
    )
    assert set(counts) == set(range(1, 20))  # filled, and not its own
    assert min(counts.values()) > 60  # 100 each are expected
    assert max(counts.values()) < 145
    found = nearest_neighbours(queue, queries, own, torch.randperm(30, generator=g))
    torch.testing.assert_close(found.embeds[0], queue["embeds"][found.slots[0]])
    assert found.similarity.item() == pytest.approx(float(queries[0] @ found.embeds[0]), abs=1e-6)


def test_half_precision_queries_are_compared_in_the_queues():
    queue = new_queue(20)
    queue.push(**rows(0, 20))
    queries = rows(5, 4)["embeds"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_neighbours(queue, queries, {})
    assert found.slots.tolist() == [5, 6, 7, 8]
    assert found.similarity.dtype == torch.float32
