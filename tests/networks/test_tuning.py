"""What is trained of pretrained towers, in which mode and at which rate."""

import json
import re
from itertools import pairwise

import open_clip
import pytest
import timm
import torch
from helpers.builders import BATCH_NORM, TRANSFORMER
from helpers.steps import ALONE, STEP, batch_for, takes
from helpers.tuned import pretrained, tuned
from torch import nn

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods import METHODS
from coalign.networks.blocks import find_blocks
from coalign.networks.towers.image import ImageTower, build_image_tower
from coalign.networks.towers.spec import TowerSpec, find_towers, new_projection
from coalign.networks.towers.text import build_text_tower
from coalign.networks.tuning import Tuning, block_depths
from coalign.optim import build_optimizers, lr_at
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward, move_statistics

DEEP = {
    **TRANSFORMER,
    "vision_cfg": {**TRANSFORMER["vision_cfg"], "layers": 3},
    "text_cfg": {**TRANSFORMER["text_cfg"], "layers": 3},
}
TWO_TOWERS = [name for name in METHODS if name != "oner"]
CASES = [(name, "transformer") for name in TWO_TOWERS] + [
    (name, "batch norm") for name in TWO_TOWERS if takes(name, BATCH_NORM)
]
RATE = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_fraction=0)


def optimizers_of(method, tuning, config=RATE):
    return build_optimizers(tuning.groups(), config, method, tuning.rates())


def train_steps(method, tuning, optimizers=None, steps=2):
    """Takes optimizer steps in training mode, as the trainer does. Returns the optimizers."""
    optimizers = optimizers or optimizers_of(method, tuning)
    method.train()
    for _ in range(steps):
        optimizers.set_lr(0, 10)
        result = forward_backward(method, batch_for(method), STEP, ALONE)
        optimizers.step()
        move_statistics(method, ALONE, keep=True)
        method.after_step(result.features, result.targets, RankGather(ALONE), STEP)
        optimizers.zero_grad()
    return optimizers


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# ---------------------------------------------------------------- frozen parts


@pytest.mark.parametrize(("name", "model"), CASES)
def test_a_locked_trunk_does_not_change(tmp_path, name, model):
    """Neither weights nor running statistics; the optimizer has no state of them, and no gradient reaches them."""
    method, tuning = tuned(name, tmp_path, model, image_tuning="locked", text_tuning="locked")
    trunks = [child for tower in find_towers(method) for key, child in tower.named_children() if key != "projection"]
    before = [state(trunk) for trunk in trunks]
    optimizers = train_steps(method, tuning)
    assert not set().union(*map(changed, trunks, before))
    frozen = {
        name for name, p in method.named_parameters() if any(p is q for trunk in trunks for q in trunk.parameters())
    }
    assert frozen
    assert not frozen & optimizers.state_dict().keys()
    assert all(p.grad is None for trunk in trunks for p in trunk.parameters())
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained == optimizers.state_dict().keys()


@pytest.mark.parametrize("model", ["transformer", "batch norm"])
def test_a_locked_trunk_has_no_graph(tmp_path, model):
    method, _ = tuned("clip", tmp_path, model, image_tuning="locked", text_tuning="locked")
    method.train()
    batch = batch_for(method)
    caption = batch.texts["caption"]
    image, text = method.image(batch.images["image"].pixels), method.text(caption.ids, caption.lengths)
    assert image.pooled.grad_fn is None
    assert text.pooled.grad_fn is None
    assert method.encode_image(batch.images["image"].pixels).requires_grad


def test_frozen_blocks_have_no_graph(tmp_path):
    """The graph of last:1 ends at the last block: it does not have a node for each parameter of the others."""
    method, _ = tuned("clip", tmp_path, DEEP, image_tuning="last:1")
    pooled = method.image(batch_for(method).images["image"].pixels).pooled
    leaves, nodes = set(), [pooled.grad_fn]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [each for each, _ in node.next_functions if each is not None]
    trunk = method.image.trunk
    assert leaves <= {*trunk.transformer.resblocks[-1].parameters(), *trunk.ln_post.parameters()}


def test_frozen_parts_stay_in_evaluation_mode(tmp_path):
    """Dropout of a locked trunk is off, and its batch norms use their running statistics, whatever the batch size."""
    method, _ = tuned("mcd", tmp_path, "batch norm", image_tuning="locked")
    for _ in range(2):
        method.train()
        for tower in (method.image, method.teacher):
            assert not any(module.training for module in tower.trunk.modules())
        assert all(module.training for module in method.text.modules())
        method.eval()
    method.train()
    pixels = batch_for(method).images["image"].pixels[:3]  # not a multiple of the group
    torch.testing.assert_close(method.image(pixels[:1]).pooled, method.image(pixels).pooled[:1])


def test_last_blocks_train_in_training_mode(tmp_path):
    method, _ = tuned("clip", tmp_path, DEEP, image_tuning="last:1", text_tuning="last:2")
    method.train()
    assert [block.training for block in method.image.trunk.transformer.resblocks] == [False, False, True]
    assert [block.training for block in method.text.transformer.transformer.resblocks] == [False, True, True]


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        ("last:0", set()),
        ("last:1", {"transformer.resblocks.2", "ln_post"}),
        ("last:2", {"transformer.resblocks.1", "transformer.resblocks.2", "ln_post"}),
        ("locked", set()),
    ],
)
def test_last_blocks_the_norm_and_the_projection_are_trained(tmp_path, tuning, trained):
    method, tuned_method = tuned("clip", tmp_path, DEEP, parts=("trunk", "projection"), image_tuning=tuning)
    before = state(method.image)
    train_steps(method, tuned_method)
    expected = {
        name
        for name in before
        if any(name.startswith(f"trunk.{part}.") for part in trained)
        or (name.startswith("projection") and tuning != "locked")
    }
    assert changed(method.image, before) == expected


def test_a_pretrained_projection_is_locked_and_a_new_one_is_not(tmp_path):
    for parts, is_trained in ((("trunk", "projection"), False), (("trunk",), True)):
        method, _ = tuned("clip", tmp_path, parts=parts, image_tuning="locked")
        assert method.image.projection.weight.requires_grad == is_trained


def test_an_attention_pool_is_the_projection_of_a_resnet(tmp_path):
    """open_clip's ResNets have no projection of their own."""
    model = {**TRANSFORMER, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}}
    method, _ = tuned("clip", tmp_path, model, image_tuning="last:0")
    assert {name.split(".")[0] for name, p in method.image.trunk.named_parameters() if p.requires_grad} == {"attnpool"}
    method, _ = tuned("clip", tmp_path, model, image_tuning="last:1")
    names = {name.split(".")[0] for name, p in method.image.trunk.named_parameters() if p.requires_grad}
    assert names == {"layer4", "attnpool"}


def test_counts(tmp_path):
    method, tuning = tuned("slip", tmp_path, image_tuning="locked")
    trunk = sum(p.numel() for p in method.image.trunk.parameters())
    assert tuning.num_frozen() == {"image": trunk, "text": 0, "ssl_head": 0, "scale": 0}
    assert tuning.num_trained()["image"] == method.image.projection.weight.numel()
    rows = {(row.role, row.part): row for row in tuning.table()}
    assert rows["image", "trunk"].starts == "weights"
    assert rows["image", "trunk"].tuning == "frozen"
    assert rows["image", "trunk"].lr is None
    assert rows["image", "projection"].starts == "random values"


# ---------------------------------------------------------------- layer decay


def beit_layer(name, num_layers):
    """The layer of a parameter of a ViT as in BEiT's `get_num_layer_for_vit`: embeddings are 0, blocks 1 to L, and the rest L + 1."""
    block = re.search(r"(?:blocks|resblocks|layer)\.(\d+)\.", name)
    if block:
        return int(block.group(1)) + 1
    embedding = (
        "class_embedding|cls_token|pos_embed|positional_embedding|conv1|ln_pre|patch_embed|token_embedding|embeddings"
    )
    return 0 if re.search(embedding, name) else num_layers + 1


def towers(folder):
    path = folder / "deep.json"
    path.write_text(json.dumps(DEEP))
    spec = TowerSpec(str(path), vocab_size=50, context_length=12)
    yield build_image_tower(spec), 3
    yield build_text_tower(spec), 3
    trunk = timm.create_model("test_vit", num_classes=0)
    yield ImageTower(trunk, trunk.num_features, 16, 160), len(trunk.blocks)


def test_depths_are_beits_layers(tmp_path):
    for tower, num_layers in towers(tmp_path):
        depths = block_depths(tower)
        names = {name: p for name, p in tower.named_parameters() if not name.startswith("projection")}
        assert {name: num_layers + 1 - beit_layer(name, num_layers) for name in names} == {
            name: depths[p] for name, p in names.items()
        }
        assert len(find_blocks(tower)) == num_layers


def test_depths_of_a_resnet_are_timms_groups():
    """Which are by residual block; the stem is the first group."""
    trunk = timm.create_model("test_resnet", num_classes=0)
    depths = block_depths(ImageTower(trunk, trunk.num_features, 16, 32))
    groups = timm.models.group_parameters(trunk, trunk.group_matcher(coarse=False))
    order = [{depths[dict(trunk.named_parameters())[name]] for name in names} for _, names in sorted(groups.items())]
    assert all(len(group) == 1 for group in order)
    flat = [group.pop() for group in order]
    assert all(first - second == 1 for first, second in pairwise(flat))
    assert flat[-1] == 1


def test_rates_decay_by_depth(tmp_path):
    decay, config = 0.5, OptimizerConfig(lr=1e-3, warmup_fraction=0.2, start_lr=1e-4, final_lr=1e-5)
    method, tuning = tuned("clip", tmp_path, DEEP, image_layer_decay=decay, settings={"optimizer": config})
    optimizers = optimizers_of(method, tuning, config)
    names = {p: name for name, p in method.named_parameters()}
    for step in (0, 1, 7):
        lrs = optimizers.set_lr(step, 10)
        base = lr_at(step, 10, 1e-3, 2, 1e-4, 1e-5)
        assert lrs["image.trunk"] == pytest.approx(base)  # the norm after the last block
        for group in optimizers.by_kind["adamw"].param_groups:
            for name in (names[p] for p in group["params"]):
                scale = 1.0
                if name.startswith("image.trunk"):
                    scale = decay ** (4 - beit_layer(name, 3))
                assert group["lr"] == pytest.approx(base * scale), name


# ---------------------------------------------------------------- rates of pretrained and new parts


def test_new_parts_have_their_own_rate(tmp_path):
    config = OptimizerConfig(lr=1e-5, new_lr=1e-3, warmup_fraction=0)
    method, tuning = tuned("slip", tmp_path, settings={"optimizer": config})
    lrs = optimizers_of(method, tuning, config).set_lr(0, 10)
    pretrained_parts = {"image.trunk", "text.trunk"}
    assert {name for name, lr in lrs.items() if lr == pytest.approx(1e-5)} == pretrained_parts
    assert {name for name, lr in lrs.items() if lr == pytest.approx(1e-3)} == {
        "image.projection", "text.projection", "ssl_head", "scale",
    }  # fmt: skip


def test_the_temperature_of_a_whole_model_is_pretrained(tmp_path):
    config = OptimizerConfig(lr=1e-5, new_lr=1e-3, warmup_fraction=0)
    method, tuning = tuned("clip", tmp_path, parts=("trunk", "projection"), settings={"optimizer": config})
    lrs = optimizers_of(method, tuning, config).set_lr(0, 10)
    assert list(lrs.values()) == pytest.approx([1e-5] * 5)


@pytest.mark.parametrize("name", ["clip", "mcd", "mct"])
def test_encoders_wait_for_the_heads(tmp_path, name):
    """Nothing pretrained changes in the head phase; then everything is trained, with a warm-up of its own."""
    method, tuning = tuned(name, tmp_path, "batch norm", head_epochs=2)
    waiting = [p for role in ("image", "text") for p in tuning.trunk(role) if p.requires_grad]
    assert waiting
    optimizers = optimizers_of(method, tuning)
    tuning.set_heads_only(True)
    before = [state(tower.trunk if role == "image" else tower.transformer) for role, tower in tuning.towers.items()]
    train_steps(method, tuning, optimizers)
    after = [state(tower.trunk if role == "image" else tower.transformer) for role, tower in tuning.towers.items()]
    assert all(torch.equal(one[key], two[key]) for one, two in zip(before, after) for key in one)
    assert not any(optimizers.by_kind["adamw"].state[p] for p in waiting)
    tuning.set_heads_only(False)
    method.train()
    assert all(p.requires_grad for p in waiting)
    assert all(module.training for tower in tuning.towers.values() for module in tower.modules())
    before = state(method.image.trunk)
    train_steps(method, tuning, optimizers)
    assert changed(method.image.trunk, before) >= {key for key, _ in method.image.trunk.named_parameters()}


def test_the_warm_up_of_encoders_starts_after_the_heads(tmp_path):
    config = OptimizerConfig(lr=1e-5, new_lr=1e-3, warmup_fraction=0.2)
    method, tuning = tuned("clip", tmp_path, head_epochs=1, settings={"optimizer": config})
    optimizers = optimizers_of(method, tuning, config)
    trunk, heads = zip(
        *((lrs["image.trunk"], lrs["image.projection"]) for lrs in (optimizers.set_lr(s, 30, 10) for s in range(30)))
    )
    assert trunk[:10] == (0.0,) * 10
    assert trunk[10:] == pytest.approx([lr_at(step, 20, 1e-5, 4, 1e-6, 1e-6) for step in range(20)])
    assert heads == pytest.approx([lr_at(step, 30, 1e-3, 6, 1e-6, 1e-5) for step in range(30)])


def test_rates_that_destroy_weights_are_warned_of(tmp_path):
    both = (
        "The learning rate of the pretrained image and text encoders, 0.002, is above 0.0001, which destroys their weights; "
        "use --lr 1e-05, or lock them with --image-tuning locked --text-tuning locked."
    )
    one = (
        "The learning rate of the pretrained text encoder, 0.002, is above 0.0001, which destroys its weights; use --lr 1e-05, or lock it "
        "with --text-tuning locked."
    )
    for lr, new_lr, changes, warning in (
        (1e-4, None, {}, None),
        (1e-5, 1e-3, {}, None),
        (2e-3, None, {}, both),
        (2e-3, None, {"image_tuning": "locked"}, one),
    ):
        optimizer = OptimizerConfig(lr=lr, new_lr=new_lr)
        _, tuning = tuned("clip", tmp_path, settings={"optimizer": optimizer}, **changes)
        assert tuning.warning() == warning


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("head", ["linear", "mlp", "glu"])
def test_heads(head):
    torch.manual_seed(0)
    projection, x = new_projection(5, 3, head).double(), torch.randn(4, 7, 5, dtype=torch.float64)
    weights = dict(projection.named_parameters())
    if head == "linear":
        expected = x @ weights["weight"].T
    elif head == "mlp":
        hidden = x @ weights["0.weight"].T + weights["0.bias"]
        expected = (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) @ weights["2.weight"].T
    else:
        gate, value = (x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"] for name in ("gate", "value"))
        expected = (gate.clamp(0, 6) * value) @ weights["out.weight"].T + weights["out.bias"]
    torch.testing.assert_close(projection(x), expected)
    assert projection(x).shape == (4, 7, 3)


def test_the_mlp_head_has_the_form_of_open_clips_timm_adapter():
    theirs = open_clip.timm_model.TimmModel("test_resnet", 16, image_size=32, proj="mlp", pretrained=False).head.mlp
    width = theirs.fc1.in_features
    ours = new_projection(width, 16, "mlp")
    ours.load_state_dict({"0.weight": theirs.fc1.weight, "0.bias": theirs.fc1.bias, "2.weight": theirs.fc2.weight})
    x = torch.randn(2, width)
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x) - (0 if theirs.fc2.bias is None else theirs.fc2.bias))


@pytest.mark.parametrize("head", ["mlp", "glu"])
@pytest.mark.parametrize("name", TWO_TOWERS)
def test_every_two_tower_method_trains_with_each_head(tmp_path, name, head, monkeypatch):
    import helpers.builders as builders

    original = builders.TowerSpec
    monkeypatch.setattr(builders, "TowerSpec", lambda *args, **options: original(*args, **options, head=head))
    method = pretrained(name, tmp_path)
    tuning = Tuning(method, TrainConfig(name, method.config, head=head, image_tuning="locked", text_tuning="locked"))
    assert not any(isinstance(module, nn.Linear) for module in method.projections().values())
    train_steps(method, tuning)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "parts", "settings", "message"),
    [
        ("clip", (), {"image_tuning": "locked"}, "--image-tuning locked needs pretrained weights, but the image encoder starts"),
        ("clip", ("trunk",), {"text_tuning": "last:4"}, "--text-tuning last:4 is more than the 3 blocks of the text encoder"),
        ("oner", (), {"head": "mlp"}, "--head needs a method with an image and a text encoder, such as clip; oner has one"),
        ("oner", (), {"text_layer_decay": 0.5}, "--text-layer-decay needs a method with an image and a text encoder"),
        ("clip", ("trunk", "projection"), {"image_tuning": "locked", "text_tuning": "locked"}, "Nothing is left to train"),
        ("slip", ("trunk", "projection"), {"image_tuning": "locked", "text_tuning": "locked"}, "Nothing is left to train"),
        ("mcd", ("trunk", "projection"), {"image_tuning": "locked", "text_tuning": "locked"}, "Nothing is left to train"),
        ("clip", ("trunk", "projection"), {"head_epochs": 1}, "--head-epochs trains new parts first, but all parts"),
        ("clip", (), {"head_epochs": 1}, "--head-epochs is for pretrained encoders that are trained afterwards"),
        (
            "clip",
            ("trunk",),
            {"head_epochs": 1, "image_tuning": "locked", "text_tuning": "locked"},
            "--head-epochs is for pretrained encoders that are trained afterwards",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, name, parts, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tuned(name, tmp_path, DEEP, parts=parts, **settings)


def test_a_residual_head_can_be_trained_alone(tmp_path):
    """UniCLIP's is new, and embeds images."""
    method, tuning = tuned(
        "uniclip", tmp_path, parts=("trunk", "projection"), image_tuning="locked", text_tuning="locked"
    )
    assert not any(parameter.requires_grad for parameter in method.image.trunk.parameters())
    assert sum(tuning.num_trained().values()) > 1  # more than the temperature


def test_layer_decay_needs_blocks():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3))
    tower = ImageTower(trunk, 4, 16, 32)
    assert set(block_depths(tower).values()) == {0}
