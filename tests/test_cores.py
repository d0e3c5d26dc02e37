import os
import re
import subprocess
import sys

import pytest

from coalign import cores


def openmp_settings(**environment: str) -> dict[str, str]:
    """The settings of OpenMP in a process that imports coalign and then torch, as printed by OpenMP itself."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import coalign, torch"],
        env=unset | {"OMP_DISPLAY_ENV": "true"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(re.findall(r"(OMP_\w+) = '(.*)'", done.stderr))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other OpenMP libraries")
def test_waiting_threads_of_torch_sleep_unless_the_user_has_set_otherwise():
    assert openmp_settings()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert openmp_settings(OMP_WAIT_POLICY="ACTIVE")["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_of_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(allowed)])
        assert cores.num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1)])
def test_container_limit_bounds_cores_and_threads(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.num_cores() == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cores.set_up_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 8 else str(expected))
    os.environ["OMP_NUM_THREADS"] = "5"  # the user's
    cores.set_up_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"
