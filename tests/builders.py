"""Small methods and batches for any line of the registry."""

import json
from dataclasses import replace

import torch

from coalign.methods import config_class, method_class
from coalign.networks.towers import TowerSpec
from coalign.types import Batch, ImageView, TextView

TRANSFORMER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
BATCH_NORM = {**TRANSFORMER, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet"}}


def shrunk(config):
    """The configuration with widths and queues of hundreds made small: what is tested does not depend on them."""
    sizes = {name: 16 for name, value in vars(config).items() if type(value) is int and value >= 100}
    return replace(config, **sizes)


def build_method(name, folder, model=TRANSFORMER, cls=None, **changes):
    """A small method of the registry (or `cls` in its place), in float64, the same weights at every call."""
    path = folder / "model.json"
    path.write_text(json.dumps(model))
    torch.manual_seed(7)
    config = replace(shrunk(config_class(name)()), **changes)
    return (cls or method_class(name))(
        config, TowerSpec(str(path), vocab_size=50, context_length=12, batch_norm_group=2)
    ).double()


def make_batch(plan, size, image_size=32, vocab_size=50, seed=0):
    """A batch with everything that the view plan asks for; captions repeat, tags and lengths are ragged."""
    g = torch.Generator().manual_seed(seed)

    def text(policy):
        lengths = torch.randint(3, 13, (size,), generator=g)
        ids = torch.randint(1, vocab_size, (size, int(lengths.max())), generator=g)
        labels = None
        if policy.mask_p:
            chosen = torch.rand(ids.shape, generator=g) < 0.3
            labels = torch.where(chosen & (torch.arange(ids.shape[1]) < lengths[:, None] - 1), ids, -100)
        return TextView(ids, lengths, labels)

    def image():
        return ImageView(
            torch.randint(256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=g),
            torch.rand(size, 11, generator=g),
            torch.rand(size, 2, 2, generator=g) if plan.patch_ranks else None,
        )

    return Batch(
        indices=torch.arange(size),
        images={name: image() for name in plan.images},
        texts={name: text(policy) for name, policy in plan.texts.items()},
        caption_ids=torch.randint(size // 2, (size,), generator=g),
        has_caption=torch.ones(size, dtype=torch.bool),
        tags=torch.randint(-1, 9, (size, 3), generator=g) if plan.tags else None,
    )
