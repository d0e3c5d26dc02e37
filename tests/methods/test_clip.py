import math
from dataclasses import replace

import pytest
import torch
from helpers.builders import HUGGING_FACE, build_method, make_batch
from helpers.pairs import Pairs, make_loader
from helpers.steps import ALONE
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.methods.clip.config import CLIPConfig
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward
from coalign.types import StepInfo

GATHER, STEP = RankGather(ALONE), StepInfo(0, 10)


def loss(method, features):
    (term,) = method.objective(features, {}, GATHER, STEP)
    return term.total / term.count


@pytest.fixture
def clip(tmp_path):
    return build_method("clip", tmp_path)


def test_objective_equals_open_clip(oracles, clip):
    oracle = oracles("contrastive")
    clip.logit_scale.log.data[0] = oracle["openclip_clip.in.log_scale"]
    image, text = (oracle[f"openclip_clip.in.{name}"].requires_grad_() for name in ("image", "text"))
    ours = loss(clip, {"image_embeds": image, "text_embeds": text, "caption_ids": torch.arange(len(image))})
    ours.backward()
    torch.testing.assert_close(ours.detach(), oracle["openclip_clip.out.loss"])
    for value, name in ((image, "image"), (text, "text"), (clip.logit_scale.log, "log_scale")):
        torch.testing.assert_close(value.grad.squeeze(), oracle[f"openclip_clip.out.grad_{name}"])


def test_multi_positive_excludes_pairs_with_the_same_caption(tmp_path):
    batch = make_batch(build_method("clip", tmp_path).view_plan, 6)
    plain, multi = (build_method("clip", tmp_path, multi_positive=on) for on in (False, True))
    features = plain.encode(batch, STEP)
    distinct = {**features, "caption_ids": torch.arange(6)}
    torch.testing.assert_close(loss(plain, features), loss(plain, distinct))
    torch.testing.assert_close(loss(multi, distinct), loss(plain, distinct))
    assert loss(multi, features) < loss(plain, features)  # make_batch repeats captions
    equal = {**features, "caption_ids": torch.zeros(6, dtype=torch.long)}
    assert loss(multi, equal).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("multi_positive", [False, True])
def test_pairs_of_a_group_are_not_negatives_of_each_other(tmp_path, multi_positive):
    """The loss of batches that the loader makes with groups equals the loss written as loops."""

    class Products(Pairs):
        def record(self, index):
            return replace(super().record(index), captions=(captions[index],), facts={"product": product[index]})

    # samples 0 and 6 share a caption, but no product
    captions, product = [*"abcdefa", "h"], ["x", "x", "x", "y", None, "y", "", "y"]
    method = build_method("clip", tmp_path, multi_positive=multi_positive).double()
    loader = make_loader(
        Products(8), plan=method.view_plan, batch_size=8, image_size=32, context_length=12, group_column="product"
    )
    batch = next(loader.batches(0, 1)).batch
    batch.texts["caption"].ids %= 50  # the model's vocabulary
    features = method.encode(batch, STEP)
    order = batch.indices.tolist()

    def apart(i, j):
        same_product = product[i] and product[i] == product[j]
        return not same_product and not (multi_positive and captions[i] == captions[j])

    scores = method.logit_scale() * features["image_embeds"] @ features["text_embeds"].T
    expected = 0.0
    for i in range(8):
        others = [j for j in range(8) if j == i or apart(order[i], order[j])]
        expected += (scores[i, others].logsumexp(0) + scores[others, i].logsumexp(0) - 2 * scores[i, i]).item() / 16
    assert loss(method, features).item() == pytest.approx(expected)


def test_logit_scale_initialization_and_clamp(clip):
    assert clip.scalars()["logit_scale"].item() == pytest.approx(1 / 0.07)
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        clip.logit_scale.log.data.fill_(value)
        clip.after_step({}, {}, GATHER, STEP)
        assert clip.logit_scale.log.item() == pytest.approx(clamped)


def test_training_and_inference_embeddings_agree(clip):
    batch = make_batch(clip.view_plan, 4)
    features, caption = clip.encode(batch, STEP), batch.texts["caption"]
    torch.testing.assert_close(features["image_embeds"], clip.encode_image(batch.images["image"].pixels))
    torch.testing.assert_close(features["text_embeds"], clip.encode_text(caption.ids, caption.lengths))
    torch.testing.assert_close(features["text_embeds"].norm(dim=-1), torch.ones(4, dtype=torch.float64))


# ---------------------------------------------------------------- strong views


def projected(projector, features):
    """The normalized outputs of a projector, by torch's functions."""
    *hidden, last = projector.layers
    for layer, norm in zip(hidden, projector.norms, strict=True):
        features = F.batch_norm(layer(features), None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        features = features.relu()
    return F.normalize(last(features), dim=-1)


def test_loss_of_strong_views_equals_dense_logits(tmp_path):
    method = build_method("clip-strong", tmp_path, text_dropout=0.0, multi_positive=False)
    batch, rows = make_batch(method.view_plan, 6), torch.arange(6)

    def both_ways(images, texts, scale, **options):
        logits = scale * images @ texts.T
        return (F.cross_entropy(logits, rows, **options) + F.cross_entropy(logits.T, rows, **options)) / 2

    result = forward_backward(method, batch, STEP, ALONE)
    features = result.features
    images, texts = (
        [projected(projector, view) for view in features[name].unbind(1)]
        for projector, name in ((method.image_projector, "strong_images"), (method.text_projector, "strong_texts"))
    )
    assert len(images) == len(texts) == 2
    strong = sum(both_ways(image, text, 10, label_smoothing=0.1) for image in images for text in texts).item() / 4
    weak = both_ways(features["image_embeds"], features["text_embeds"], 1 / 0.07).item()
    assert result.terms == pytest.approx({"clip": weak, "strong": strong})
    assert result.loss == pytest.approx((weak + 2 * strong) / 3)


def test_dropout_changes_the_strong_captions_in_training_only(tmp_path):
    method = build_method("clip-strong", tmp_path)
    batch = make_batch(method.view_plan, 6)

    def encode(seed):
        torch.manual_seed(seed)
        return method.encode(batch, STEP)

    def changed(one, other):
        return {name for name in one if not torch.equal(one[name], other[name])}

    assert changed(encode(0), encode(1)) == {"strong_texts"}
    assert not changed(encode(0), encode(0))
    method.text.frozen = (method.text.transformer,)  # as of a locked encoder
    method.train()
    assert not changed(encode(0), encode(1))
    method.text.frozen = ()
    method.eval()
    assert not changed(encode(0), encode(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strong_views": -1}, "strong_views is -1, but must be at least 0"),
        ({"strong_views": 1, "label_smoothing": 1.0}, "label_smoothing is 1.0, but must be at least 0 and below 1"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1, but applies to strong views only; set strong_views"),
        ({"text_dropout": 0.1}, "text_dropout is 0.1, but applies to strong views only; set strong_views"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        CLIPConfig(**options)


def test_hugging_face_encoders_have_no_text_dropout(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="use --text-dropout 0"):
        build_method("clip-strong", tmp_path, HUGGING_FACE)
    build_method("clip-strong", tmp_path, HUGGING_FACE, text_dropout=0.0)
