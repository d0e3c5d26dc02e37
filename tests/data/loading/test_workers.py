from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from coalign.data.loading.workers import fetch_all
from coalign.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def _square(task: int) -> int:
    return task * task


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_yields_all_tasks_in_order(workers):
    assert list(fetch_all(_square, range(3, 20), workers, ahead=2)) == [task * task for task in range(3, 20)]
    assert list(fetch_all(_square, range(0), workers, ahead=2)) == []


def _fail(task: int) -> int:
    if task == 4:
        raise UserError("Task 4 is missing: write it.")
    return task


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_error_is_raised_in_order_and_unchanged(workers):
    results = fetch_all(_fail, range(10), workers, ahead=2)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError) as caught:
        next(results)
    assert str(caught.value) == "Task 4 is missing: write it."


def _crash(task: int) -> int:
    return 1 // task


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_are_raised_as_they_are(workers):
    with pytest.raises(ZeroDivisionError, match="integer division"):
        list(fetch_all(_crash, range(2), workers, ahead=1))


def test_a_thread_runs_ahead_and_ends():
    """With 0 workers: by `ahead` tasks. Closing waits for the task in progress."""
    started: list[int] = []
    results = fetch_all(lambda task: (started.append(task), threading.current_thread())[1], range(100), 0, ahead=3)
    thread = next(results)
    assert thread is not threading.current_thread()
    deadline = time.monotonic() + 10
    while len(started) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert started == [0, 1, 2, 3]
    results.close()
    assert not thread.is_alive()
    assert started == [0, 1, 2, 3]


def test_only_the_loaders_thread_is_limited_to_one_thread_of_torch():
    def in_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results = fetch_all(lambda _: torch.get_num_threads(), range(2), 0, ahead=1)
        assert [next(results), torch.get_num_threads(), in_new_thread()] == [1, 3, 3]
        results.close()
        assert [torch.get_num_threads(), in_new_thread()] == [3, 3]
    finally:
        torch.set_num_threads(before)


def _die(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_killed_worker_is_a_user_error():
    with pytest.raises(UserError, match="fewer --workers"):
        list(fetch_all(_die, range(10), workers=1, ahead=1))


def _describe(task: int) -> tuple[int, int, int]:
    return os.getpid(), os.getpgid(0), torch.get_num_threads()


def test_workers_have_one_thread_and_their_own_process_group():
    described = set(fetch_all(_describe, range(8), workers=2, ahead=2))
    assert len({pid for pid, _, _ in described}) == 2
    assert all(threads == 1 for _, _, threads in described)
    assert all(group == pid for pid, group, _ in described)  # Ctrl-C does not reach them


def test_the_global_random_state_is_unchanged():
    before = torch.get_rng_state()
    list(fetch_all(_square, range(4), workers=1, ahead=1))
    assert torch.equal(torch.get_rng_state(), before)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until_gone(pids: set[int], seconds: float) -> set[int]:
    deadline = time.monotonic() + seconds
    while (remaining := {pid for pid in pids if _alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return remaining


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_early_terminates_the_workers():
    results = fetch_all(_describe, range(10**9), workers=2, ahead=2)
    pids = {next(results)[0] for _ in range(4)}
    assert len(pids) == 2
    assert all(map(_alive, pids))
    results.close()
    assert _wait_until_gone(pids, 5) == set()


_TRAINER = """
import os, signal, time
from coalign.data.loading.workers import fetch_all

def task(number):
    if number >= 4:
        {stuck}
    return os.getpid(), bytes(30_000)  # exceeds a pipe's capacity, so that workers also block while sending

pids = set()
results = fetch_all(task, range(10**9), workers=2, ahead=8)
for _ in range(4):
    pids.add(next(results)[0])
print(*pids, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stuck", ["pass", "time.sleep(60)"], ids=["blocked sending", "stuck in a sample"])
def test_killing_the_trainer_terminates_the_workers(stuck):
    trainer = subprocess.Popen([sys.executable, "-c", _TRAINER.format(stuck=stuck)], stdout=subprocess.PIPE, text=True)
    try:
        line = trainer.stdout.readline()
        pids = {int(pid) for pid in re.findall(r"\d+", line)}
        assert len(pids) == 2
        assert all(map(_alive, pids))
        time.sleep(0.3)
    finally:
        trainer.kill()
        trainer.wait()
    assert _wait_until_gone(pids, 8) == set()
