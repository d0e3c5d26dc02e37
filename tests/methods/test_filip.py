import math
from dataclasses import replace

import pytest
import torch
from helpers.builders import BATCH_NORM, build_method, make_batch
from torch.nn import functional as F

from coalign import embeds
from coalign.errors import UserError
from coalign.losses import tiled
from coalign.methods import recipe
from coalign.methods.filip.config import FILIPConfig
from coalign.methods.filip.method import FILIP, TokenEmbeds, token_similarities
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.types import ImageView, StepInfo, TextView

WORLD = World(0, 1, torch.device("cpu"))
GATHER, STEP = RankGather(WORLD), StepInfo(0, 10)


def tokens(samples, length, seed, dim=6, ragged=True):
    """Random normalized tokens, of 1 to `length` valid ones per sample; what is at padding is random, too."""
    g = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(samples, length, dim, dtype=torch.float64, generator=g), dim=-1)
    lengths = torch.randint(1, length + 1, (samples, 1), generator=g) if ragged else torch.full((samples, 1), length)
    return TokenEmbeds(vectors, torch.arange(length) < lengths)


def similarities_by_loops(queries, keys):
    """Eqs. 3-5: for every two samples, the mean over the query's tokens of the largest product with a token of the key."""
    rows = []
    for query, query_valid in zip(*queries):
        row = []
        for key, key_valid in zip(*keys):
            own = [q for q, valid in zip(query, query_valid) if valid]
            others = [k for k, valid in zip(key, key_valid) if valid]
            row.append(sum(max(float(q @ k) for k in others) for q in own) / len(own))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def loss_by_loops(images, texts, scale, *labels):
    """Eqs. 1 and 2, halved. Pairs that share a caption or a group are not negatives of each other."""
    total = 0.0
    for similarities in (similarities_by_loops(images, texts), similarities_by_loops(texts, images)):
        for i, row in enumerate(similarities.tolist()):
            terms = [math.exp(scale * s) for j, s in enumerate(row) if j == i or all(x[j] != x[i] for x in labels)]
            total -= math.log(math.exp(scale * row[i]) / sum(terms))
    return total / (2 * len(images.vectors))


def loss(method, features):
    (term,) = method.objective(features, {}, GATHER, STEP)
    return term.total / term.count


def gradients(vectors, value):
    return torch.autograd.grad(value, vectors)


@pytest.fixture
def filip(tmp_path):
    return build_method("filip", tmp_path)


def test_similarities_equal_the_equations_written_as_loops():
    images, texts = tokens(4, 5, seed=0), tokens(3, 7, seed=1)
    image_to_text, text_to_image = token_similarities(images, texts)
    torch.testing.assert_close(image_to_text, similarities_by_loops(images, texts))
    torch.testing.assert_close(text_to_image, similarities_by_loops(texts, images).T)
    assert not torch.allclose(image_to_text, text_to_image)
    torch.testing.assert_close(FILIP.similarity(images, texts), (image_to_text + text_to_image) / 2)


def test_one_token_per_sample_gives_the_cosine():
    images, texts = tokens(4, 1, seed=0), tokens(3, 1, seed=1)
    torch.testing.assert_close(FILIP.similarity(images, texts), images.vectors[:, 0] @ texts.vectors[:, 0].T)


def test_chunks_of_images_change_neither_similarities_nor_gradients(monkeypatch):
    images, texts = tokens(5, 4, seed=0), tokens(3, 6, seed=1)
    vectors = [part.vectors.requires_grad_() for part in (images, texts)]
    weights = torch.randn(2, 5, 3, dtype=torch.float64)

    def run():
        both = torch.stack(token_similarities(images, texts))
        return [both, *gradients(vectors, (weights * both).sum())]

    whole = run()
    monkeypatch.setattr(tiled, "TILE", 12)  # 12² / (4 · 3 · 6) = 2 images
    torch.testing.assert_close(run(), whole)


def test_memory_of_a_step_is_bounded():
    """256 pairs of 49 patches and 32 tokens have 103 million similarities of two tokens, 0.4 GB, of which autograd would keep several
    copies. What it keeps here is little more than the embeds and the two matrices."""
    images, texts = (tokens(256, length, seed=0, dim=2, ragged=False) for length in (49, 32))
    images = TokenEmbeds(images.vectors.float().requires_grad_(), images.valid)
    texts = TokenEmbeds(texts.vectors.float(), texts.valid)
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_similarities(images, texts)
    assert kept < 4e6


@pytest.mark.parametrize("side", ["images", "texts"])
def test_further_padding_changes_nothing(side):
    images, texts = tokens(4, 5, seed=0), tokens(3, 7, seed=1)
    padded = {"images": images, "texts": texts}
    own = padded[side]
    for filler in (0.0, 9.0, torch.nan):  # a half-precision model normalizes a padded zero vector to NaN
        padded[side] = TokenEmbeds(F.pad(own.vectors, (0, 0, 0, 3), value=filler), F.pad(own.valid, (0, 3)))
        similarity = FILIP.similarity(**padded)
        torch.testing.assert_close(similarity, FILIP.similarity(images, texts), rtol=1e-14, atol=1e-14)


def test_padding_receives_no_gradient():
    images, texts = tokens(4, 5, seed=0), tokens(3, 7, seed=1)
    vectors = texts.vectors.requires_grad_()
    (gradient,) = gradients([vectors], FILIP.similarity(images, texts).square().sum())
    assert not gradient[~texts.valid].any()
    assert gradient[texts.valid].any(-1).float().mean() > 0.9


def test_any_two_embeds_can_be_compared(filip):
    batch = make_batch(filip.view_plan, 6)
    caption = batch.texts["caption"]
    with torch.no_grad():
        images, texts = (
            filip.encode_image(batch.images["image"].pixels),
            filip.encode_text(caption.ids, caption.lengths),
        )
    assert type(images) is type(texts)
    for one, other in ((images, texts), (images, images), (texts, texts)):
        torch.testing.assert_close(filip.similarity(one, other), filip.similarity(other, one).T)
    for same in (images, texts):
        torch.testing.assert_close(filip.similarity(same, same).diagonal(), torch.ones(6, dtype=torch.float64))


def test_evaluation_in_batches_equals_one_batch(filip, monkeypatch):
    """Batches have texts of different lengths, and similarities are computed in blocks."""
    caption = make_batch(filip.view_plan, 6).texts["caption"]
    order = caption.lengths.argsort()
    ids, lengths = caption.ids[order], caption.lengths[order]
    images = filip.encode_image(make_batch(filip.view_plan, 5).images["image"].pixels)
    parts = [filip.encode_text(ids[rows, : lengths[rows].max()], lengths[rows]) for rows in (slice(0, 3), slice(3, 6))]
    assert parts[0].vectors.shape[1] < parts[1].vectors.shape[1]
    expected = filip.similarity(images, filip.encode_text(ids, lengths)).float()
    monkeypatch.setattr(embeds, "_CHUNK", 100)
    torch.testing.assert_close(embeds.similarities(filip.similarity, images, embeds.concatenate(parts)), expected)


def test_embeds_are_the_projected_patches_and_tokens(filip):
    batch = make_batch(filip.view_plan, 4)
    features, caption = filip.encode(batch, STEP), batch.texts["caption"]
    images, texts = filip.encode_image(batch.images["image"].pixels), filip.encode_text(caption.ids, caption.lengths)
    assert images.vectors.shape == (4, 2 * 2, 16)  # 32 pixels, patches of 16
    assert images.valid.all()
    assert texts.valid.sum(1).tolist() == caption.lengths.tolist()  # with start and end token
    assert texts.vectors.shape == (*caption.ids.shape, 16)
    torch.testing.assert_close(features["patch_embeds"], images.vectors)
    torch.testing.assert_close(features["token_embeds"], texts.vectors)
    for part in (images, texts):
        norms = part.vectors.norm(dim=-1)[part.valid]
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2, 1, 3]])
@pytest.mark.parametrize("multi_positive", [False, True])
def test_step_loss_equals_the_equations_written_as_loops(tmp_path, multi_positive, groups):
    method = build_method("filip", tmp_path, multi_positive=multi_positive)
    batch = make_batch(method.view_plan, 6)
    batch.group_ids = None if groups is None else torch.tensor(groups)
    result = forward_backward(method, batch, STEP, WORLD)
    images = TokenEmbeds(result.features["patch_embeds"], torch.ones(6, 4))
    texts = TokenEmbeds(result.features["token_embeds"], result.features["token_valid"])
    captions = batch.caption_ids.tolist() if multi_positive else range(6)
    assert len(set(captions)) < 6 or not multi_positive
    assert result.loss == pytest.approx(loss_by_loops(images, texts, 1 / 0.07, captions, groups or range(6)), rel=1e-6)


def test_pairs_with_one_caption_have_no_loss(tmp_path):
    method = build_method("filip", tmp_path, multi_positive=True)
    features = method.encode(make_batch(method.view_plan, 4), STEP)
    equal = loss(method, {**features, "caption_ids": torch.zeros(4, dtype=torch.long)})
    assert equal.item() == pytest.approx(0, abs=1e-12)
    equal.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in method.parameters())


def test_half_precision_features_are_compared_in_float32(filip):
    features = filip.encode(make_batch(filip.view_plan, 4), STEP)
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in features.items()}
    exact = {name: t.float() if t.is_floating_point() else t for name, t in rounded.items()}
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss(filip, rounded)
    torch.testing.assert_close(under_autocast, loss(filip, exact), rtol=1e-6, atol=0)


def test_logit_scale_initialization_and_clamp(filip):
    assert filip.scalars()["logit_scale"].item() == pytest.approx(1 / 0.07)
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        filip.logit_scale.log.data.fill_(value)
        filip.after_step({}, {}, GATHER, STEP)
        assert filip.logit_scale.log.item() == pytest.approx(clamped)


@pytest.mark.parametrize("model", [None, BATCH_NORM], ids=["transformer", "batch norm"])
def test_localize_equals_loops(tmp_path, model):
    method = build_method("filip", tmp_path, **({"model": model} if model else {})).eval()
    batch = make_batch(method.view_plan, 3, image_size=64 if model else 32)
    pixels, caption = batch.images["image"].pixels, batch.texts["caption"]
    lengths = torch.tensor([2, *caption.lengths[1:]])  # the first text has no words
    with torch.no_grad():
        images, texts = method.encode_image(pixels), method.encode_text(caption.ids, lengths)
        maps = method.localize(pixels, caption.ids, lengths)
        rows, columns = method.image(pixels, with_patches=True).patches.shape[1:3]
    assert maps.shape == (3, rows, columns)
    assert rows > 1
    for sample, length in enumerate(lengths):
        words = texts.vectors[sample, 1 : length - 1]
        for patch, vector in enumerate(images.vectors[sample]):
            expected = max([float(vector @ word) for word in words], default=-1.0)
            assert float(maps[sample, patch // columns, patch % columns]) == pytest.approx(expected)


def test_image_features_are_the_mean_of_the_patches(filip):
    pixels = make_batch(filip.view_plan, 3).images["image"].pixels
    patches = filip.image(pixels, with_patches=True).patches
    expected = torch.stack([sum(patch for row in image for patch in row) / 4 for image in patches])
    torch.testing.assert_close(filip.image_features(pixels), expected)


def test_training_lowers_the_loss_and_retrieves_better_than_chance(tmp_path):
    """A caption names the color of the left half of its image, then that of the right half. No color alone identifies the pair."""
    method = build_method("filip", tmp_path).float()
    left, right = torch.arange(16) // 4, torch.arange(16) % 4
    colors = torch.tensor([[0, 0, 99], [255, 0, 99], [0, 255, 99], [255, 255, 99]], dtype=torch.uint8)
    halves = [colors[side][:, :, None, None].expand(16, 3, 32, 16) for side in (left, right)]
    start, end = torch.full((2, 16), 1) + torch.tensor([[0], [1]])
    pixels, ids = torch.cat(halves, dim=3), torch.stack([start, 10 + left, 20 + right, end], 1)
    lengths = torch.full((16,), 4)
    batch = replace(
        make_batch(method.view_plan, 16),
        images={"image": ImageView(pixels, torch.zeros(16, 11))},
        texts={"caption": TextView(ids, lengths)},
        caption_ids=torch.arange(16),
    )
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(forward_backward(method, batch, STEP, WORLD).loss)
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        similarity = method.similarity(method.encode_image(pixels), method.encode_text(ids, lengths))
    for ranks in (similarity, similarity.T):
        assert (ranks.argmax(1) == torch.arange(16)).float().mean() > 0.5  # chance: 1/16


def test_caption_view_and_recipes(tmp_path):
    assert build_method("filip", tmp_path).view_plan.texts["caption"].kind == "original"
    assert build_method("filip", tmp_path, text_view="paraphrase").view_plan.texts["caption"].kind == "paraphrase"
    assert recipe("filip")(5000).method_config == FILIPConfig(multi_positive=True)
    benchmark = recipe("filip-yfcc15m")(15_000_000)
    assert (benchmark.method_config.multi_positive, benchmark.model, benchmark.batch_size) == (False, "ViT-B-32", 4096)
    assert (benchmark.optimizer.lr, benchmark.optimizer.weight_decay) == (5e-4, 0.5)


@pytest.mark.parametrize("invalid", [{"temperature": 0}, {"temperature": math.inf}, {"max_logit_scale": 0.5}])
def test_invalid_settings_are_rejected(invalid):
    with pytest.raises(UserError, match=next(iter(invalid))):
        FILIPConfig(**invalid)
