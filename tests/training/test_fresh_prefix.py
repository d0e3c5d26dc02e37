"""Processes that start together agree on a new store prefix, whatever earlier starts left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import sleep

import pytest
import torch.distributed as dist

from coalign.training import distributed
from coalign.training.distributed import fresh_prefix

SIZE = 3


def connect(port):
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))


def start_ranks(port, delays):
    """Starts each rank after its delay in seconds. Returns per rank whether its prefix was used before, and the ranks that share it."""

    def start_rank(rank):
        sleep(delays[rank])
        store = fresh_prefix(connect(port), rank, SIZE)
        used = store.check([f"started/{rank}"])
        store.set(f"started/{rank}", f"rank {rank}")
        return used, [store.get(f"started/{other}").decode() for other in range(SIZE)]

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(start_rank, range(SIZE)))


ALL_SHARE_A_NEW_PREFIX = [(False, ["rank 0", "rank 1", "rank 2"])] * SIZE


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.4, 0, 0), (0, 0.4, 0), (0, 0.1, 0.4)])
def test_every_start_has_a_new_prefix_in_any_order_of_ranks(delays):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        assert start_ranks(server.port, delays) == ALL_SHARE_A_NEW_PREFIX


def test_the_offer_of_a_dead_first_rank_is_ignored():
    """The dead process had made an offer and acknowledged an earlier rank 1."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("offer", "dead")
    server.set("dead/acknowledged/1", "an earlier token")
    assert start_ranks(server.port, (0.4, 0, 0)) == ALL_SHARE_A_NEW_PREFIX


def test_a_missing_first_rank_is_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.1))
    store = dist.HashStore()
    store.set("offer", "dead")
    with pytest.raises(distributed.UserError, match="Rank 0 of 2 processes did not respond to rank 1 within"):
        fresh_prefix(store, 1, 2)
