"""The estimate of decoded images is what a cache takes, and limits of containers count."""

import io

import numpy as np
import pytest
from helpers.image_draws import photograph
from PIL import Image

from coalign.data.images.cache import ImageCache
from coalign.data.images.memory import available_memory, decoded_bytes
from coalign.data.images.views import make_views
from coalign.data.sources.base import Source
from coalign.errors import BadSample
from coalign.randomness import Draws
from coalign.types import CLIP_PREPROCESS, EVALUATION, STRONG, WEAK, Preprocess, Record

POLICIES = {"weak": WEAK, "strong": STRONG}
PADDED = Preprocess(resize_mode="longest")


class Photos(Source):
    name = "photos"

    def __init__(self, kind, broken=0):
        self.files = []
        for number in range(30):
            file = io.BytesIO()
            Image.fromarray(photograph(200 + 10 * (number % 5), 160, seed=number)).save(file, kind)
            self.files.append(b"" if number < broken else file.getvalue())

    def __len__(self):
        return len(self.files)

    def record(self, index):
        return Record(str(index), ("a photo",))

    def image(self, index):
        if index == 29:
            raise BadSample("no image")
        return self.files[index]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("broken", [0, 10])
@pytest.mark.parametrize(("policies", "preprocess"), [(POLICIES, CLIP_PREPROCESS), ({"view": EVALUATION}, PADDED)])
def test_the_estimate_is_what_a_cache_takes(kind, broken, policies, preprocess):
    """JPEGs are decoded at several resolutions. Unreadable images take nothing."""
    source, usable = Photos(kind, broken), np.arange(broken, 29)
    cache = ImageCache(30, 1e8)
    for epoch in range(30):
        images = [cache.open(index, lambda index=index: source.image(index)) for index in usable.tolist()]
        make_views(images, policies, Draws(0, epoch, usable).uniform, 32, preprocess=preprocess)
    taken = int(cache._used[0])
    estimated = decoded_bytes(source, np.arange(30), policies, 32, preprocess)
    assert 0.8 * taken < estimated < 1.1 * taken


def test_available_memory_is_limited_by_the_control_group(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "1000\n")
    assert available_memory(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/memory.max", "5000\n")
    assert available_memory(tmp_path) == 4000
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "100\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "300\n")
    assert available_memory(tmp_path) == 0


def test_available_memory_is_limited_by_nested_control_groups(tmp_path):
    """As in a Slurm job, whose limit is not that of the root group."""

    def write(path, limit, usage, names=("memory.max", "memory.current")):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (limit, usage)):
            (tmp_path / path / name).write_text(f"{text}\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(
        "4:cpu,memory:/slurm/job_7\n1:name=systemd:/a:b\n0::/slurm/job_7/step_0\n"
    )
    write("sys/fs/cgroup/slurm/job_7/step_0", "max", 500)
    write("sys/fs/cgroup/slurm/job_7", 5000, 1000)
    assert available_memory(tmp_path) == 4000
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write("sys/fs/cgroup/memory/slurm", 2000, 500, names)
    assert available_memory(tmp_path) == 1500
    write("sys/fs/cgroup/memory/slurm/job_7", 700, 500, names)
    assert available_memory(tmp_path) == 200


def test_available_memory_is_known_without_proc(tmp_path):
    assert available_memory(tmp_path) > 2**28
    assert 2**20 < available_memory() < 2**48
