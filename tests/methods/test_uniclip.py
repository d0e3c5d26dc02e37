import math

import pytest
import torch
from helpers.builders import build_method, make_batch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.methods import recipe
from coalign.methods.uniclip.config import UniCLIPConfig
from coalign.methods.uniclip.tables import ABLATIONS
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.types import STRONG, WEAK, AugmentationParams, StepInfo, TextPolicy

ALONE = World(0, 1, torch.device("cpu"))
GATHER, STEP = RankGather(ALONE), StepInfo(0, 10)


def loss(method, features):
    (term,) = method.objective(features, {}, GATHER, STEP)
    return term.total / term.count


def random_features(method, pairs=4):
    g = torch.Generator().manual_seed(1)
    embeds = torch.randn(pairs, len(method.domain_similarity.domains), 5, generator=g).double()
    return {"embeds": F.normalize(embeds, dim=-1).requires_grad_(), "caption_ids": torch.tensor([3, 1, 3, 2])[:pairs]}


def mean(values):
    return sum(values) / len(values)


def naive(method, features):
    """Computes the batch's loss with loops over the paper's sets: members (pair, view), D(i, j), P_i, N_i."""
    config, z = method.config, features["embeds"]
    labels = ["caption_ids"] * config.multi_positive + ["group_ids"] * ("group_ids" in features)
    num_images, size = len(config.views), len(config.views) + config.text_views
    members = [(pair, view) for pair in range(len(z)) for view in range(size)]
    weights = [1 / num_images**2, 1 / (2 * num_images * config.text_views), 1 / config.text_views**2]

    def kind(i, j):
        return (i[1] >= num_images) + (j[1] >= num_images)

    def s(i, j):
        d = kind(i, j) if config.domain_similarity else 0
        b = 0.0 if method.domain_similarity.offsets is None else method.domain_similarity.offsets[d]
        return torch.exp(method.domain_similarity.log_logit_scales[d].exp() * ((z[i] * z[j]).sum() - b))

    losses = []
    for i in members:
        for kinds in [(0, 1, 2)] if config.unified_supervision else [(0,), (1,), (2,)]:
            p_i = [j for j in members if j[0] == i[0] and j != i and kind(i, j) in kinds]
            n_i = sum(
                s(i, j)
                for j in members
                if j[0] != i[0] and kind(i, j) in kinds and all(features[x][j[0]] != features[x][i[0]] for x in labels)
            )
            if config.loss in ("mp-nce", "mp-nce-unweighted") and kind(i, i) in kinds:
                p_i.append(i)
            if config.loss.startswith("mp-nce"):
                for p in p_i:
                    w = weights[kind(i, p)] if config.loss == "mp-nce" else 1
                    losses.append(-w * torch.log(s(i, p) / (s(i, p) + n_i)))
            elif p_i:
                denominator = sum(s(i, p) for p in p_i) + n_i
                if config.loss == "supcon":
                    losses.append(mean([-torch.log(s(i, p) / denominator) for p in p_i]))
                else:
                    losses.append(-torch.log(sum(s(i, p) for p in p_i) / denominator))
    return mean(losses)


@pytest.mark.parametrize(("views", "groups"), [((3, 1), None), ((2, 2), None), ((2, 1), [4, 4, 5, 5])])
@pytest.mark.parametrize(("own_similarity", "unified"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["mp-nce", "mp-nce-unweighted", "mp-nce-no-trivial", "supcon", "mil-nce"])
def test_objective_equals_naive_loops(tmp_path, name, own_similarity, unified, views, groups):
    method = build_method(
        "uniclip", tmp_path, views=("weak", "strong", "strong")[: views[0]], text_views=views[1], loss=name,
        domain_similarity=own_similarity, unified_supervision=unified, multi_positive=unified,
    )  # fmt: skip
    values = [p for p in (method.domain_similarity.log_logit_scales, method.domain_similarity.offsets) if p is not None]
    for value in values:
        torch.nn.init.uniform_(value, 0.5, 2.0)
    features = random_features(method)
    if groups is not None:
        features["group_ids"] = torch.tensor(groups)
    ours, expected = loss(method, features), naive(method, features)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, [features["embeds"], *values]) for x in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- temperatures and offsets


def gradient_of_offsets(method, offsets):
    """Returns the gradient of three offsets that replace the method's own (or the shared one)."""
    scales, _ = method.domain_similarity()
    pairwise = offsets[method.domain_similarity.domains]
    method.domain_similarity.forward = lambda: (scales, pairwise)
    return torch.autograd.grad(loss(method, random_features(method)), offsets)[0]


@pytest.mark.parametrize("name", ["mp-nce", "mp-nce-no-trivial", "supcon", "mil-nce"])
@pytest.mark.parametrize(
    "changes",
    [{"domain_similarity": False}, {"unified_supervision": False}, {"domain_similarity": False, "unified_supervision": False}],
)  # fmt: skip
def test_offsets_that_cancel_are_not_parameters(tmp_path, changes, name):
    """Eq. 15: b has zero gradient if it is shared, or if positives and negatives have the same domain combination."""
    method = build_method("uniclip", tmp_path, loss=name, **changes)
    assert method.domain_similarity.offsets is None
    assert not any("offset" in parameter for parameter, _ in method.named_parameters())
    offsets = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert gradient_of_offsets(method, offsets).abs().max() < 1e-13


def test_domain_offsets_are_trained(tmp_path):
    method = build_method("uniclip", tmp_path)
    offsets = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert gradient_of_offsets(method, offsets).abs().min() > 1e-3
    assert any(p is method.domain_similarity.offsets for p in method.parameter_groups()["scale"])


def test_scalars_and_clamp(tmp_path):
    method = build_method("uniclip", tmp_path)
    assert {name: value.item() for name, value in method.scalars().items()} == pytest.approx(
        {f"logit_scale{name}": 1 / 0.07 for name in ("", "_image_image", "_text_text")}
        | {f"offset_{name}": 0.0 for name in ("image_image", "image_text", "text_text")}
    )
    method.domain_similarity.log_logit_scales.data.copy_(torch.tensor([9.0, 2.0, -1.0]))
    method.after_step({}, {}, GATHER, STEP)
    scales = method.scalars()
    assert scales["logit_scale_image_image"].item() == pytest.approx(100)
    assert scales["logit_scale"].item() == pytest.approx(math.exp(2))
    assert scales["logit_scale_text_text"].item() == pytest.approx(1)
    assert list(build_method("uniclip", tmp_path, domain_similarity=False).scalars()) == ["logit_scale"]


# ---------------------------------------------------------------- the augmentation


def randomized(tmp_path, **changes):
    """Returns a method with a random head, since residual blocks are initialized to the identity."""
    method = build_method("uniclip", tmp_path, **changes)
    for parameter in method.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return method


def encode_with_features(method, batch):
    """Returns the image encoder's features and the image embeds [batch, view, dim]."""
    features = []
    handle = method.image.register_forward_hook(lambda module, inputs, output: features.append(output.pooled))
    embeds = method.encode(batch, STEP)["embeds"][:, : len(method.config.views)]
    handle.remove()
    return torch.cat(features), embeds


@pytest.mark.parametrize("head", ["linear", "mlp-3", "residual-1", "residual-3"])
@pytest.mark.parametrize("change", ["shuffled", "identity"])
def test_only_the_head_depends_on_the_augmentation(tmp_path, head, change):
    method = randomized(tmp_path, image_head=head)
    batch, other = make_batch(method.view_plan, 4), make_batch(method.view_plan, 4)
    for view in other.images.values():
        identity = torch.tensor(AugmentationParams().vector()).expand(4, -1)
        view.params = view.params.roll(1, 0) if change == "shuffled" else identity
    (features, embeds), (other_features, other_embeds) = (
        encode_with_features(method, batch),
        encode_with_features(method, other),
    )
    assert torch.equal(features, other_features)
    assert ((embeds - other_embeds).norm(dim=-1) > 1e-4).all()


def test_head_without_embedding_ignores_the_augmentation(tmp_path):
    method = randomized(tmp_path, augmentation_embedding=False)
    batch, other = make_batch(method.view_plan, 4), make_batch(method.view_plan, 4)
    for view in other.images.values():
        view.params = view.params.flip(0)
    assert torch.equal(encode_with_features(method, batch)[1], encode_with_features(method, other)[1])
    assert not any("augmentation" in name for name, _ in method.named_parameters())


def test_foreign_parameters_condition_the_head_on_another_sample(tmp_path):
    method, control = randomized(tmp_path), randomized(tmp_path, foreign_parameters=True)
    control.load_state_dict(method.state_dict())
    batch, other = make_batch(method.view_plan, 4), make_batch(method.view_plan, 4)
    for view in other.images.values():
        view.params = torch.stack([view.params[number - 1] for number in range(4)])
    assert torch.equal(encode_with_features(control, batch)[1], encode_with_features(method, other)[1])
    pixels = next(iter(batch.images.values())).pixels
    assert torch.equal(control.encode_image(pixels), method.encode_image(pixels))


def test_evaluation_uses_identity_parameters(tmp_path):
    method = randomized(tmp_path)
    batch = make_batch(method.view_plan, 4)
    for view in batch.images.values():
        view.params = torch.tensor([[0.0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]]).repeat(4, 1)
    embeds = encode_with_features(method, batch)[1]
    for number, view in enumerate(batch.images.values()):
        torch.testing.assert_close(method.encode_image(view.pixels), embeds[:, number])
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4, 3, dtype=torch.float64))


# ---------------------------------------------------------------- views and texts


def test_views_match_the_paper(tmp_path):
    plan = build_method("uniclip", tmp_path).view_plan
    assert list(plan.images.values()) == [WEAK, STRONG, STRONG]
    assert list(plan.texts.values()) == [TextPolicy()]
    plan = build_method("uniclip", tmp_path, views=("weak",) * 3, text_views=3).view_plan
    assert list(plan.images.values()) == [WEAK] * 3
    assert list(plan.texts.values()) == [TextPolicy(), TextPolicy("eda"), TextPolicy("eda")]


def test_embeds_order_image_views_before_text_views(tmp_path):
    method = build_method("uniclip", tmp_path, text_views=2)
    batch = make_batch(method.view_plan, 4)
    embeds = method.encode(batch, STEP)["embeds"]
    assert embeds.shape == (4, 5, 16)
    for number, view in enumerate(batch.images.values()):
        expected = method.project_image(method.image(view.pixels).pooled, view.params)
        torch.testing.assert_close(embeds[:, number], expected)
    for number, caption in enumerate(batch.texts.values(), 3):
        torch.testing.assert_close(embeds[:, number], method.encode_text(caption.ids, caption.lengths))


def test_text_is_pooled_at_the_start_token_with_bidirectional_attention(tmp_path):
    method = build_method("uniclip", tmp_path)
    ids, lengths = torch.arange(1, 9).repeat(2, 1), torch.tensor([6, 6])
    ids[1, 5] = 40  # the last token, which the start token could not attend to under causal attention
    first, second = method.encode_text(ids, lengths)
    assert (first - second).norm() > 1e-3
    ids[1] = torch.tensor([1, 2, 3, 4, 5, 6, 40, 41])  # differs only in the padding
    torch.testing.assert_close(*method.encode_text(ids, lengths))
    features = method.text(ids, lengths, with_tokens=True)
    torch.testing.assert_close(features.pooled, features.tokens[:, 0])


# ---------------------------------------------------------------- the tables and the recipes


def test_ablations_cover_the_papers_tables():
    rows = {table: [name for name in ABLATIONS if name.startswith(table)] for table in ("4a", "4b", "5", "6")}
    assert {table: len(names) for table, names in rows.items()} == {"4a": 9, "4b": 6, "5": 3, "6": 5}
    paper = UniCLIPConfig(multi_positive=True)  # the last row of every table is the method itself
    unchanged = {name for name, config in ABLATIONS.items() if config == paper}
    assert unchanged == {"4a-aware-residual-3", "4b-aware-1-weak-2-strong", "5-domain-unified", "6-mp-nce"}
    assert len({*ABLATIONS.values()}) == 23 - 3 - 1  # 4a and 4b share the plain head with one weak and two strong views


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains(tmp_path, name):
    method = build_method("uniclip", tmp_path, **vars(ABLATIONS[name]))
    batch = make_batch(method.view_plan, 6)
    optimizer = torch.optim.AdamW([p for group in method.parameter_groups().values() for p in group], lr=3e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(forward_backward(method, batch, STEP, ALONE).loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
        optimizer.step()
    # the biases of keys cancel in softmax
    assert all(p.grad.any() for name, p in method.named_parameters() if "bias" not in name)
    assert losses[-1] < losses[0]


def test_recipes_match_the_paper():
    cc3m, yfcc15m = recipe("uniclip-cc3m")(2_900_000), recipe("uniclip-yfcc15m")(15_000_000)
    assert (cc3m.model, cc3m.epochs, cc3m.method_config) == ("ViT-B-16", 50, UniCLIPConfig())
    assert (yfcc15m.model, yfcc15m.epochs, yfcc15m.method_config) == ("ViT-B-32", 32, UniCLIPConfig())
    small = recipe("uniclip")(10_000)
    assert small.method_config.multi_positive


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": ()}, "at least one image view"),
        ({"text_views": 0}, "text_views is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"max_logit_scale": math.nan}, "max_logit_scale is nan"),
    ],
)
def test_invalid_settings_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        UniCLIPConfig(**changes)
