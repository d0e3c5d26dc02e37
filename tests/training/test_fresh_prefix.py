"""Processes that start together share a prefix of the store, whatever earlier starts have left in it."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import sleep

import pytest
import torch.distributed as dist

from coalign.training import distributed
from coalign.training.distributed import fresh_prefix

SIZE = 3


def store_factory(port):
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))


def meet(port, delays):
    """Of each rank, started `delays` seconds late: whether an earlier start was under the prefix it found, and who else is."""

    def one(rank):
        sleep(delays[rank])
        store = fresh_prefix(store_factory(port), rank, SIZE)
        earlier = store.check([f"was here/{rank}"])
        store.set(f"was here/{rank}", f"rank {rank}")
        return earlier, [store.get(f"was here/{other}").decode() for other in range(SIZE)]

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, range(SIZE)))


TOGETHER = [(False, ["rank 0", "rank 1", "rank 2"])] * SIZE


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.4, 0, 0), (0, 0.4, 0), (0, 0.1, 0.4)])
def test_every_start_has_a_prefix_of_its_own_whoever_comes_first(delays):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        assert meet(server.port, delays) == TOGETHER


def test_a_start_whose_first_rank_had_died_half_way_is_passed_over():
    """It had offered, and acknowledged an earlier process of rank 1."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("offer", "dead")
    server.set("dead/acknowledged/1", "an earlier one")
    assert meet(server.port, (0.4, 0, 0)) == TOGETHER


def test_a_first_rank_that_never_answers_is_said(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.1))
    store = dist.HashStore()
    store.set("offer", "dead")
    with pytest.raises(distributed.UserError, match="did not answer the one of rank 1 within"):
        fresh_prefix(store, 1, 2)
