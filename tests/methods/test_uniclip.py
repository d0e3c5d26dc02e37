import math

import pytest
import torch
from builders import build_method, make_batch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.recipes import recipe
from coalign.recipes.uniclip import ABLATIONS, UniCLIPConfig
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
    embeds = torch.randn(pairs, len(method.similarity.domains), 5, generator=g).double()
    return {"embeds": F.normalize(embeds, dim=-1).requires_grad_(), "caption_ids": torch.tensor([3, 1, 3, 2])[:pairs]}


def mean(values):
    return sum(values) / len(values)


def naive(method, features):
    """The batch's loss by loops over the sets of the paper: members (pair, view), D(i, j), P_i, N_i."""
    config, z, ids = method.config, features["embeds"], features["caption_ids"].tolist()
    num_images, size = len(config.views), len(config.views) + config.text_views
    members = [(pair, view) for pair in range(len(z)) for view in range(size)]
    weights = [1 / num_images**2, 1 / (2 * num_images * config.text_views), 1 / config.text_views**2]

    def kind(i, j):
        return (i[1] >= num_images) + (j[1] >= num_images)

    def s(i, j):
        d = kind(i, j) if config.domain_similarity else 0
        b = 0.0 if method.similarity.offsets is None else method.similarity.offsets[d]
        return torch.exp(method.similarity.log_logit_scales[d].exp() * ((z[i] * z[j]).sum() - b))

    losses = []
    for i in members:
        for kinds in [(0, 1, 2)] if config.unified_supervision else [(0,), (1,), (2,)]:
            p_i = [j for j in members if j[0] == i[0] and j != i and kind(i, j) in kinds]
            n_i = sum(
                s(i, j)
                for j in members
                if j[0] != i[0] and kind(i, j) in kinds and not (config.multi_positive and ids[j[0]] == ids[i[0]])
            )
            if config.loss in ("mp-nce", "mp-nce-unweighted") and kind(i, i) in kinds:
                p_i.append(i)
            if config.loss.startswith("mp-nce"):
                for p in p_i:
                    w = weights[kind(i, p)] if config.loss == "mp-nce" else 1
                    losses.append(-w * torch.log(s(i, p) / (s(i, p) + n_i)))
            elif p_i:
                below = sum(s(i, p) for p in p_i) + n_i
                if config.loss == "supcon":
                    losses.append(mean([-torch.log(s(i, p) / below) for p in p_i]))
                else:
                    losses.append(-torch.log(sum(s(i, p) for p in p_i) / below))
    return mean(losses)


@pytest.mark.parametrize("views", [(3, 1), (2, 2)])
@pytest.mark.parametrize(("own_similarity", "unified"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["mp-nce", "mp-nce-unweighted", "mp-nce-no-trivial", "supcon", "mil-nce"])
def test_objective_equals_the_paper_written_as_loops(tmp_path, name, own_similarity, unified, views):
    method = build_method(
        "uniclip", tmp_path, views=("weak", "strong", "strong")[: views[0]], text_views=views[1], loss=name,
        domain_similarity=own_similarity, unified_supervision=unified, multi_positive=unified,
    )  # fmt: skip
    values = [p for p in (method.similarity.log_logit_scales, method.similarity.offsets) if p is not None]
    for value in values:
        torch.nn.init.uniform_(value, 0.5, 2.0)
    features = random_features(method)
    one, other = loss(method, features), naive(method, features)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, [features["embeds"], *values]) for x in (one, other))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- temperatures and offsets


def with_given_offsets(method, offsets):
    """The gradient of three offsets that stand in for the method's own (or for the one that is shared)."""
    scales, _ = method.similarity()
    chosen = offsets[method.similarity.domains]
    method.similarity.forward = lambda: (scales, chosen)
    return torch.autograd.grad(loss(method, random_features(method)), offsets)[0]


@pytest.mark.parametrize("name", ["mp-nce", "mp-nce-no-trivial", "supcon", "mil-nce"])
@pytest.mark.parametrize(
    "changes",
    [{"domain_similarity": False}, {"unified_supervision": False}, {"domain_similarity": False, "unified_supervision": False}],
)  # fmt: skip
def test_an_offset_that_cancels_is_not_trained(tmp_path, changes, name):
    """Eq. 15: whether shared, or of positives and negatives of the same combination, b has gradient zero."""
    method = build_method("uniclip", tmp_path, loss=name, **changes)
    assert method.similarity.offsets is None
    assert not any("offset" in parameter for parameter, _ in method.named_parameters())
    offsets = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert with_given_offsets(method, offsets).abs().max() < 1e-13


def test_offsets_of_domains_are_trained(tmp_path):
    method = build_method("uniclip", tmp_path)
    offsets = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert with_given_offsets(method, offsets).abs().min() > 1e-3
    assert any(p is method.similarity.offsets for p in method.parameter_groups()["scale"])


def test_scalars_and_the_clamp(tmp_path):
    method = build_method("uniclip", tmp_path)
    assert {name: value.item() for name, value in method.scalars().items()} == pytest.approx(
        {f"logit_scale{name}": 1 / 0.07 for name in ("", "_image_image", "_text_text")}
        | {f"offset_{name}": 0.0 for name in ("image_image", "image_text", "text_text")}
    )
    method.similarity.log_logit_scales.data.copy_(torch.tensor([9.0, 2.0, -1.0]))
    method.after_step({}, {}, GATHER, STEP)
    scales = method.scalars()
    assert scales["logit_scale_image_image"].item() == pytest.approx(100)
    assert scales["logit_scale"].item() == pytest.approx(math.exp(2))
    assert scales["logit_scale_text_text"].item() == pytest.approx(1)
    assert list(build_method("uniclip", tmp_path, domain_similarity=False).scalars()) == ["logit_scale"]


# ---------------------------------------------------------------- the augmentation


def aware(tmp_path, **changes):
    """A method whose residual blocks have left their start, at which they are the identity."""
    method = build_method("uniclip", tmp_path, **changes)
    for parameter in method.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return method


def encoded(method, batch):
    """What the image encoder gave, and the image embeds [batch, view, dim]."""
    seen = []
    handle = method.image.register_forward_hook(lambda module, inputs, output: seen.append(output))
    embeds = method.encode(batch, STEP)["embeds"][:, : len(method.config.views)]
    handle.remove()
    return torch.cat(seen), embeds


@pytest.mark.parametrize("head", ["linear", "mlp-3", "residual-1", "residual-3"])
@pytest.mark.parametrize("change", ["shuffled", "identity"])
def test_only_the_head_sees_the_augmentation(tmp_path, head, change):
    method = aware(tmp_path, head=head)
    batch, other = make_batch(method.view_plan, 4), make_batch(method.view_plan, 4)
    for view in other.images.values():
        identity = torch.tensor(AugmentationParams().vector()).expand(4, -1)
        view.params = view.params.roll(1, 0) if change == "shuffled" else identity
    (features, embeds), (other_features, other_embeds) = encoded(method, batch), encoded(method, other)
    assert torch.equal(features, other_features)
    assert ((embeds - other_embeds).norm(dim=-1) > 1e-4).all()


def test_without_the_embedding_the_head_is_agnostic_too(tmp_path):
    method = aware(tmp_path, augmentation_embedding=False)
    batch, other = make_batch(method.view_plan, 4), make_batch(method.view_plan, 4)
    for view in other.images.values():
        view.params = view.params.flip(0)
    assert torch.equal(encoded(method, batch)[1], encoded(method, other)[1])
    assert not any("augmentation" in name for name, _ in method.named_parameters())


def test_the_control_tells_the_head_how_another_samples_view_was_made(tmp_path):
    method, control = aware(tmp_path), aware(tmp_path, foreign_parameters=True)
    control.load_state_dict(method.state_dict())
    batch, other = make_batch(method.view_plan, 4), make_batch(method.view_plan, 4)
    for view in other.images.values():
        view.params = torch.stack([view.params[number - 1] for number in range(4)])
    assert torch.equal(encoded(control, batch)[1], encoded(method, other)[1])
    pixels = next(iter(batch.images.values())).pixels
    assert torch.equal(control.encode_image(pixels), method.encode_image(pixels))


def test_evaluation_embeds_an_unchanged_image(tmp_path):
    method = aware(tmp_path)
    batch = make_batch(method.view_plan, 4)
    for view in batch.images.values():
        view.params = torch.tensor([[0.0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]]).repeat(4, 1)
    embeds = encoded(method, batch)[1]
    for number, view in enumerate(batch.images.values()):
        torch.testing.assert_close(method.encode_image(view.pixels), embeds[:, number])
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4, 3, dtype=torch.float64))


# ---------------------------------------------------------------- views and texts


def test_views_are_the_papers(tmp_path):
    plan = build_method("uniclip", tmp_path).view_plan
    assert list(plan.images.values()) == [WEAK, STRONG, STRONG]
    assert list(plan.texts.values()) == [TextPolicy()]
    plan = build_method("uniclip", tmp_path, views=("weak",) * 3, text_views=3).view_plan
    assert list(plan.images.values()) == [WEAK] * 3
    assert list(plan.texts.values()) == [TextPolicy(), TextPolicy("eda"), TextPolicy("eda")]


def test_embeds_hold_image_views_then_text_views(tmp_path):
    method = build_method("uniclip", tmp_path, text_views=2)
    batch = make_batch(method.view_plan, 4)
    embeds = method.encode(batch, STEP)["embeds"]
    assert embeds.shape == (4, 5, 16)
    for number, view in enumerate(batch.images.values()):
        expected = method.project_image(method.image(view.pixels), view.params)
        torch.testing.assert_close(embeds[:, number], expected)
    for number, caption in enumerate(batch.texts.values(), 3):
        torch.testing.assert_close(embeds[:, number], method.encode_text(caption.ids, caption.lengths))


def test_text_is_read_at_the_start_token_by_bidirectional_attention(tmp_path):
    method = build_method("uniclip", tmp_path)
    ids, lengths = torch.arange(1, 9).repeat(2, 1), torch.tensor([6, 6])
    ids[1, 5] = 40  # the last token, which causal attention hides from the start
    one, other = method.encode_text(ids, lengths)
    assert (one - other).norm() > 1e-3
    ids[1] = torch.tensor([1, 2, 3, 4, 5, 6, 40, 41])  # only the padding differs
    torch.testing.assert_close(*method.encode_text(ids, lengths))
    features = method.text(ids, lengths, with_tokens=True)
    torch.testing.assert_close(features.pooled, features.tokens[:, 0])


# ---------------------------------------------------------------- the tables and the recipes


def test_every_row_of_the_ablation_tables_is_there():
    rows = {table: [name for name in ABLATIONS if name.startswith(table)] for table in ("4a", "4b", "5", "6")}
    assert {table: len(names) for table, names in rows.items()} == {"4a": 9, "4b": 6, "5": 3, "6": 5}
    paper = UniCLIPConfig(multi_positive=True)  # the last row of every table is the method itself
    ours = {name for name, config in ABLATIONS.items() if config == paper}
    assert ours == {"4a-aware-residual-3", "4b-aware-1-weak-2-strong", "5-domain-unified", "6-mp-nce"}
    assert len({*ABLATIONS.values()}) == 23 - 3 - 1  # 4a and 4b share the plain head on one weak and two strong views


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_of_the_ablation_tables_trains(tmp_path, name):
    method = build_method("uniclip", tmp_path, **vars(ABLATIONS[name]))
    batch = make_batch(method.view_plan, 6)
    optimiser = torch.optim.AdamW([p for group in method.parameter_groups().values() for p in group], lr=3e-3)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append(forward_backward(method, batch, STEP, ALONE).loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
        optimiser.step()
    assert all(p.grad.any() for name, p in method.named_parameters() if "bias" not in name)  # biases of keys have none
    assert losses[-1] < losses[0]


def test_recipes_are_the_papers():
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
def test_senseless_settings(changes, message):
    with pytest.raises(UserError, match=message):
        UniCLIPConfig(**changes)
