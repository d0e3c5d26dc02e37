"""Shape annotations of losses and networks are checked at run time, and nothing may reach for the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["coalign.losses", "coalign.networks"], "beartype.beartype")
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def oracles():
    """name -> array of one oracle file, as torch tensors where they are numbers: oracles("contrastive")["openclip_clip.in.image"]."""

    def load(name):
        with np.load(Path(__file__).parent / "oracles" / f"{name}.npz", allow_pickle=False) as arrays:
            return {
                key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind in "fiub" else arrays[key]
                for key in arrays.files
            }

    return load
