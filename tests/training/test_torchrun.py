"""torchrun: a run is the same with a killed rank, with a changed number of processes, and on two machines."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.equal_runs import assert_equal_runs, untimed

from coalign.training import checkpoint

pytestmark = pytest.mark.slow
OPTIONS = {"recipe": "declip", "precision": "fp32", "epochs": 12, "save_every": 3, "evals": 2, "resume": "auto"}
STEPS = 84
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launch(args, *options, prefix=(), **environment):
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, "-m", "coalign", *args]
    return subprocess.Popen(
        command, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory, pairs, model_file):
    """An uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    finish(launch(tiny.train_args(pairs, out, model_file, **OPTIONS), "--standalone", "--nproc-per-node=2"))
    assert checkpoint.load(out / "last").trainer["step"] == STEPS
    return out


def num_steps(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def wait_for(process, out, steps):
    deadline = time.monotonic() + 300
    while num_steps(out) < steps:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def workers(launcher):
    """Rank -> process id of a launcher's children."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            values = dict(item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item)
        except (OSError, ValueError):
            continue
        if parent == launcher.pid and "RANK" in values:
            pids[int(values["RANK"])] = int(folder.name)
    return pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_restarted_and_the_run_is_the_same(tmp_path, pairs, model_file, two, rank):
    out = tmp_path / "run"
    args = tiny.train_args(pairs, out, model_file, **OPTIONS)
    process = launch(args, "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    wait_for(process, out, 10)
    os.kill(workers(process)[rank], signal.SIGKILL)
    finish(process)
    assert_equal_runs(out, two)


def test_a_run_resumed_by_one_process_continues_with_the_same_batches(tmp_path, pairs, model_file):
    """Gradients are equal up to the order of additions. CLIP, because DeCLIP's nearest neighbors depend on the last digit."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    options = {**OPTIONS, "recipe": "clip"}
    args = tiny.train_args(pairs, out, model_file, **options)
    process = launch(args, "--standalone", "--nproc-per-node=2")
    wait_for(process, out, 20)
    for pid in workers(process).values():
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=300)
    assert 20 <= checkpoint.load(out / "last").trainer["step"] < STEPS
    finish(tiny.start(args), tiny.start(tiny.train_args(pairs, alone, model_file, **options)))
    losses, expected = ([row["loss"] for row in untimed(folder) if "loss" in row] for folder in (out, alone))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    weights = [checkpoint.load(folder / "last").model for folder in (out, alone)]
    # compared as one vector: if a gradient is zero up to rounding, Adam steps by its sign
    actual, reference = (torch.cat([value.flatten() for value in each.values()]) for each in weights)
    assert (actual - reference).norm() < 1e-2 * reference.norm()


@contextmanager
def two_machines():
    """Two connected network namespaces. Skips the test if they cannot be created."""
    if not shutil.which("ip") or os.getuid() != 0:
        pytest.skip("network namespaces need root and ip")
    names, links = [f"coalign-{os.getpid()}-{i}" for i in range(2)], [f"ca{os.getpid()}{i}" for i in range(2)]

    def ip(*args):
        completed = subprocess.run(["ip", *args], capture_output=True, text=True)
        if completed.returncode:
            pytest.skip(f"network namespaces cannot be created: {completed.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for number, (name, link) in enumerate(zip(names, links), 1):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names, links
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines_train_like_one(tmp_path, pairs, model_file, two):
    out = tmp_path / "run"
    args = tiny.train_args(pairs, out, model_file, **OPTIONS)
    with two_machines() as (names, links):
        processes = [
            launch(
                args, "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29511",
                prefix=("ip", "netns", "exec", name), GLOO_SOCKET_IFNAME=link, TP_SOCKET_IFNAME=link,
            )
            for number, (name, link) in enumerate(zip(names, links))
        ]  # fmt: skip
        finish(*processes)
    assert_equal_runs(out, two)


SHARD_SMALL_LAYERS = """
from coalign.cli import main as cli
from coalign.dtensor import is_sharded
from coalign.workflows.train import setup

original = setup.shard

def shard(method, world, whole):  # no layer of the tiny model reaches the default size
    original(method, world, whole, min_numel=64)
    assert sum(map(is_sharded, method.parameters())) > 4

setup.shard = shard
raise SystemExit(cli.main())
"""


def test_sharded_training_equals_unsharded_training(tmp_path, pairs, model_file):
    """--shard gives the same weights and the same checkpoint format, and one process can evaluate and resume the run."""
    outs = [tmp_path / name for name in ("unsharded", "sharded")]
    args = [tiny.train_args(pairs, out, model_file, **{**OPTIONS, "recipe": "mcd", "epochs": 3}) for out in outs]
    (tmp_path / "train_sharded.py").write_text(SHARD_SMALL_LAYERS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "train_sharded.py"), *args[1], "--shard"]
    finish(
        tiny.start(args[0], processes=2),
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
    )
    for name in ("last", "best"):
        one, other = (checkpoint.load(out / name).model for out in outs)
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=2e-5, msg=key)
    assert (outs[1] / "report.html").exists()
    finish(tiny.start(args[1]))  # one process without --shard: the run is already complete
