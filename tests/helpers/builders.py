"""Small methods and batches for every registered method."""

import json
from dataclasses import replace

import torch

from coalign.methods import METHODS, config_class, method_class, recipe
from coalign.networks.towers.spec import TowerSpec
from coalign.types import Batch, ImageView, TextView

TRANSFORMER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
BERT = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 12,
}  # fmt: skip
HUGGING_FACE = {**TRANSFORMER, "text_cfg": {"hf_config": BERT, "hf_pooling": "mean"}}  # needs the extra "hf"
BATCH_NORM = {**TRANSFORMER, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet"}}


def shrunk(config):
    """Returns the configuration with every integer of at least 100 (widths, queue sizes) replaced by 16."""
    sizes = {name: 16 for name, value in vars(config).items() if type(value) is int and value >= 100}
    return replace(config, **sizes)


def build_method(name, folder, model=TRANSFORMER, cls=None, **changes):
    """Builds a small float64 method by its name or its recipe's (or of class `cls`), with the same weights on every call."""
    path = folder / "model.json"
    path.write_text(json.dumps(model))
    torch.manual_seed(7)
    config = config_class(name)() if name in METHODS else recipe(name)(100).method_config
    config = replace(shrunk(config), **changes)
    return (cls or method_class(name if name in METHODS else recipe(name)(100).method))(
        config, TowerSpec(str(path), vocab_size=50, context_length=12, batch_norm_group=2)
    ).double()


def make_batch(plan, size, image_size=32, vocab_size=50, seed=0):
    """Returns a random batch with everything in the view plan, repeated captions, and ragged tags and lengths."""
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
