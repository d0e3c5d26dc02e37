import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.builders import TRANSFORMER, build_method, make_batch
from helpers.processes import on_two_processes
from helpers.steps import ALONE, BATCH, STEP, assert_complete, assert_equal_steps, batch_for, half_steps, run_step
from torch.nn import functional as F

from coalign.config import OptimizerConfig, TrainConfig
from coalign.data.loading.train import PairLoader
from coalign.data.sources.open import open_source
from coalign.data.text.tokenizer import train_bpe
from coalign.embeds import fields, take
from coalign.errors import UserError
from coalign.methods.oner import method as module
from coalign.methods.oner.config import RECIPES, OneRConfig
from coalign.methods.oner.method import OneR
from coalign.methods.oner.tables import ABLATIONS
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.unified import States, join, pool
from coalign.optim import build_optimizers
from coalign.runs.run import build_method as build_run_method
from coalign.runs.run import image_size, patch_grid
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward, move_statistics
from coalign.types import STRONG, WEAK, StepInfo, dot_product

GATHER, PAIRS, WIDTH = RankGather(ALONE), 5, 32
START, END = StepInfo(0, 10), StepInfo(10, 10)
PLAIN = {"mlm": False, "mim": False}
EVERY_LOSS = {"losses": ("itc", "xmc", "cic", "cmc")}


def build(folder, **changes):
    return build_method("oner", folder, **changes)


def unmasked(caption):
    """Returns the ids of a caption before masking."""
    return caption.ids if caption.labels is None else torch.where(caption.labels >= 0, caption.labels, caption.ids)


def with_mask_tokens(batch):
    """Replaces every token with a label by the mask token, so that the masked caption differs from the original."""
    caption = batch.texts["caption"]
    caption.ids = torch.where(caption.labels >= 0, 50, caption.ids)
    return batch


# ---------------------------------------------------------------- the equations


def naive_ctr(queries, keys, tau, labels=()):
    """Computes ctr of Eq. 1 with loops; queries and keys are both sides, (A, B)."""

    def nce(left, right):
        total = 0.0
        for i, q in enumerate(left):
            others = [j for j in range(len(right)) if j == i or all(x[i] != x[j] for x in labels)]
            total = total - torch.log(
                torch.exp(q @ right[i] / tau) / sum(torch.exp(q @ right[j] / tau) for j in others)
            )
        return total / len(left)

    unit = [[F.normalize(x, dim=-1) for x in side] for side in (queries, keys)]
    return (nce(unit[0][0], unit[1][1]) + nce(unit[0][1], unit[1][0])) / 2


class LinearHeads(OneR):
    """OneR with a fixed linear map for each branch as its heads, so that the loss reveals which branch projected what."""

    def __init__(self, config, towers):
        super().__init__(config, towers)
        torch.manual_seed(3)
        self.maps = {name: torch.randn(WIDTH, WIDTH, dtype=torch.float64) for name in ("online", "predict", "momentum")}

    def _project(self, projectors, rows, sum_over_ranks):
        name = "momentum" if projectors is self.momentum_projectors else "online"
        return {kind: x @ self.maps[name] for kind, x in rows.items()}

    def mapped(self):
        self.predictor.forward = lambda rows, sum_over_ranks: {
            kind: x @ self.maps["predict"] for kind, x in rows.items()
        }
        return self


KINDS = ("image", "text", "joint", "crossed")


def random_features(seed):
    g = torch.Generator().manual_seed(seed)
    names = {f"{kind}_features" for kind in KINDS}
    values = {n: torch.randn(PAIRS, WIDTH, dtype=torch.float64, generator=g).requires_grad_() for n in sorted(names)}
    return {**values, "caption_ids": torch.tensor([1, 2, 3, 2, 4]), "paired": torch.ones(PAIRS, dtype=torch.bool)}


def naive_losses(method, features, targets, labels=()):
    """Computes every loss of Table 2."""
    online, predict, momentum = (method.maps[name] for name in ("online", "predict", "momentum"))

    def sides(of):
        image, text, joint, crossed = (of[f"{kind}_features"] for kind in KINDS)
        mixed = (image + text) / 2
        return {"itc": (image, text), "xmc": (mixed, mixed), "cic": (crossed, mixed), "cmc": (joint, mixed)}

    queries = {name: [x @ online @ predict for x in pair] for name, pair in sides(features).items()}
    if method.config.teacher == "ema":
        keys = {name: [x.detach() @ momentum for x in pair] for name, pair in sides(targets).items()}
    else:
        keys = {name: [x @ online for x in pair] for name, pair in sides(features).items()}
    return {n: naive_ctr(queries[n], keys[n], method.config.temperature, labels) for n in method.config.losses}


@pytest.mark.parametrize("groups", [None, [7, 7, 8, 9, 8]])
@pytest.mark.parametrize(
    "changes",
    [
        EVERY_LOSS,
        {},
        {"losses": ("itc", "xmc")},
        {**EVERY_LOSS, "multi_positive": True},
        {**EVERY_LOSS, "teacher": "none"},
    ],
)
def test_objective_equals_naive_loops(tmp_path, changes, groups):
    method = build(tmp_path, cls=LinearHeads, **PLAIN, **changes).mapped()
    features, targets = random_features(1), random_features(2)
    labels = [features["caption_ids"]] * method.config.multi_positive
    if groups is not None:
        features["group_ids"] = torch.tensor(groups)
        labels.append(features["group_ids"])
    terms = method.objective(features, targets, GATHER, START)
    expected = naive_losses(method, features, targets, labels)
    for term in terms:
        torch.testing.assert_close(term.total / term.count, expected[term.name], rtol=1e-9, atol=0)
    inputs = [x for x in features.values() if x.is_floating_point()]
    ours, theirs = (
        torch.autograd.grad(total, inputs, allow_unused=True)
        for total in (sum(t.weight * t.total / t.count for t in terms), sum(expected.values()))
    )
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(x.grad is None for x in targets.values() if x.is_floating_point())


@pytest.mark.parametrize("name", ["mocov3", "mocov3_t02"])
def test_itc_equals_mocov3_up_to_a_factor(oracles, tmp_path, name):
    oracle = oracles("mocov3")
    tau = oracle[f"{name}.par.T"].item()
    method = build(tmp_path, losses=("itc",), temperature=tau, **PLAIN)
    method._project = lambda projectors, rows, sum_over_ranks: rows
    method.predictor.forward = lambda rows, sum_over_ranks: rows
    get = {key: oracle[f"{name}.in.{key}"] for key in ("q1", "q2", "k1", "k2")}
    queries = {kind: get[key].requires_grad_() for kind, key in (("image_features", "q1"), ("text_features", "q2"))}
    targets = {"image_features": get["k1"], "text_features": get["k2"]}
    others = {"caption_ids": torch.arange(8), "paired": torch.ones(8, dtype=torch.bool)}
    (term,) = method.objective({**queries, **others}, targets, GATHER, START)
    loss = 4 * tau * term.total / term.count  # 2τ per term, and the sum instead of the mean
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"])
    for key, value in zip(("q1", "q2"), queries.values()):
        torch.testing.assert_close(value.grad, oracle[f"{name}.out.grad_{key}"])


# ---------------------------------------------------------------- one masked pass, and an unmasked pass of the EMA copy


def test_online_pass_is_masked_and_teacher_pass_is_not(tmp_path):
    method = build(tmp_path, **EVERY_LOSS)
    batch = with_mask_tokens(make_batch(method.view_plan, BATCH))
    view, caption = batch.images["image"], batch.texts["caption"]
    ratio = 0.1 + 0.4 * 3 / 10
    tower = method.tower
    for features, ids, masked in (
        (method.encode(batch, STEP), caption.ids, view.patch_ranks.flatten(1) < ratio),
        # before the first step, the copy equals the tower
        (method.encode_targets(batch, STEP), unmasked(caption), None),
    ):
        image, text = tower.embed_image(view.pixels, masked), tower.embed_text(ids, caption.lengths)
        crossed = [pool(tower.given(*pair), "mean") for pair in ((image, text), (text, image))]
        expected = {
            "image": pool(tower(image), "mean"),
            "text": pool(tower(text), "mean"),
            "joint": pool(tower(join(image, text)), "mean"),
            "crossed": sum(crossed) / 2,
        }
        for kind, value in expected.items():
            torch.testing.assert_close(features[f"{kind}_features"], value)
    assert masked is None
    assert not torch.equal(caption.ids, unmasked(caption))


def test_masked_losses_are_means_over_masked_tokens_and_patches(tmp_path):
    """Computes MLM and MIM of single inputs and of the joint sequence from hidden states, ids and pixels."""
    method = build(tmp_path)
    batch = with_mask_tokens(make_batch(method.view_plan, BATCH))
    view, caption = batch.images["image"], batch.texts["caption"]
    ranks = view.patch_ranks.flatten(1)
    caption.labels[:, 0] = -100  # a start token is never masked
    terms = forward_backward(method, batch, STEP, ALONE).terms
    masked, chosen = ranks < 0.22, caption.labels >= 0
    image, text = method.tower.embed_image(view.pixels, masked), method.tower.embed_text(caption.ids, caption.lengths)
    image_states, text_states = method.tower(image), method.tower(text)
    joint_states = method.tower(join(image, text))
    words = {"mlm_text": text_states.words, "mlm_joint": joint_states.words}
    for name, hidden in words.items():
        at_ids = torch.zeros(*caption.ids.shape, WIDTH, dtype=torch.float64)
        at_ids[:, 1:-1] = hidden
        logits = method.mlm_head(at_ids[chosen])
        assert logits.shape[1] == 50
        assert terms[name] == pytest.approx(F.cross_entropy(logits, caption.labels[chosen]).item())
    # [batch, 3 · 16 · 16, patch], channel by channel
    blocks = F.unfold(method.tower.normalize(view.pixels), 16, stride=16)
    blocks = blocks.transpose(1, 2).unflatten(2, (3, 256)).transpose(2, 3).flatten(2)
    targets = (blocks - blocks.mean(-1, keepdim=True)) / (blocks.var(-1, keepdim=True) + 1e-6).sqrt()
    for name, hidden in {"mim_image": image_states.patches, "mim_joint": joint_states.patches}.items():
        errors = (method.mim_head(hidden) - targets)[masked]
        assert terms[name] == pytest.approx(errors.square().mean().item())
    weights = {
        t.name: t.weight
        for t in method.objective(method.encode(batch, STEP), method.encode_targets(batch, STEP), GATHER, STEP)
    }
    assert weights == {"itc": 1, "cmc": 1, "mlm_text": 0.5, "mlm_joint": 0.5, "mim_image": 0.5, "mim_joint": 0.5}


def test_texts_without_image_only_contribute_to_mlm(tmp_path):
    """Adding two such texts does not change the terms of the pairs, except that their masked words count for MLM."""
    paired = torch.tensor([0, 2, 3, 5, 6, 7])
    method = build(tmp_path)
    batch = with_mask_tokens(make_batch(method.view_plan, BATCH))
    batch.has_image = torch.zeros(BATCH, dtype=torch.bool).index_fill(0, paired, True)
    mixed = forward_backward(method, batch, STEP, ALONE)
    pairs = forward_backward(build(tmp_path), batch[paired], STEP, ALONE)
    assert mixed.terms.keys() == pairs.terms.keys()
    for name in mixed.terms.keys() - {"mlm_text"}:
        assert mixed.terms[name] == pytest.approx(pairs.terms[name]), name
    assert mixed.terms["mlm_text"] != pytest.approx(pairs.terms["mlm_text"])
    batch.has_image = None
    everything = forward_backward(build(tmp_path), batch, STEP, ALONE)
    assert mixed.terms["mlm_text"] == pytest.approx(everything.terms["mlm_text"])

    batch.has_image = torch.zeros(BATCH, dtype=torch.bool)
    texts_only = forward_backward(method, batch, STEP, ALONE)
    assert texts_only.terms["mlm_text"] == pytest.approx(everything.terms["mlm_text"])
    assert texts_only.loss == pytest.approx(0.5 * texts_only.terms["mlm_text"])
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_mim_ratio_ramps_over_the_run(tmp_path):
    method = build(tmp_path)
    batch = make_batch(method.view_plan, 64)
    ranks = batch.images["image"].patch_ranks
    for step, ratio in ((START, 0.1), (StepInfo(5, 10), 0.3), (END, 0.5)):
        features = method.encode(batch, step)
        assert features["mim_image_count"].tolist() == (ranks < ratio).flatten(1).sum(1).tolist()
        method.objective(features, method.encode_targets(batch, step), GATHER, step)
        assert method.scalars()["mim_ratio"].item() == pytest.approx(ratio)


def test_unmasked_samples_do_not_count(tmp_path):
    method = build(tmp_path)
    batch = make_batch(method.view_plan, BATCH)
    batch.texts["caption"].labels[:] = -100
    batch.images["image"].patch_ranks[:] = 0.9
    result = forward_backward(method, batch, STEP, ALONE)
    assert math.isfinite(result.loss)
    assert [result.terms[f"{name}"] for name in ("mlm_text", "mlm_joint", "mim_image", "mim_joint")] == [0] * 4


# ---------------------------------------------------------------- micro-batches, processes, settings

SETTINGS = [
    EVERY_LOSS,
    {"losses": ("itc",), "heads": "two"},
    {**EVERY_LOSS, "head_norm": "batch_apart"},
    {"head_norm": "layer", "pooling": "cls", **PLAIN},
    {"teacher": "none", "pooling": "balanced"},
    {"losses": ("cmc",), "mlm": False},
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_micro_batches_with_other_settings(tmp_path, changes):
    whole = run_step(
        build(tmp_path, **changes), batch := make_batch(build(tmp_path, **changes).view_plan, BATCH), ALONE
    )
    assert_complete(build(tmp_path, **changes), whole)
    assert_equal_steps(whole, run_step(build(tmp_path, **changes), batch, ALONE, [slice(0, 5), slice(5, 8)]))


@pytest.mark.slow
def test_two_processes_with_other_settings(tmp_path):
    cases = [("oner", "transformer", changes, None, [slice(0, 3), slice(3, 4)]) for changes in SETTINGS]
    ranks = on_two_processes(half_steps, tmp_path, cases)
    for number, changes in enumerate(SETTINGS):
        method = build(tmp_path, **changes)
        whole = run_step(method, batch_for(method), ALONE)
        for rank in ranks:
            assert_equal_steps(whole, rank[number])


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_a_step(tmp_path, name):
    config = ABLATIONS[name]
    changes = {key: value for key, value in vars(config).items() if key not in ("head_hidden", "head_dim")}
    method = build(tmp_path, **changes).train()
    optimizers = build_optimizers(method.parameter_groups(), OptimizerConfig(), method)
    result = forward_backward(method, make_batch(method.view_plan, BATCH), STEP, ALONE)
    masked = {f"mlm_{kind}" for kind in ("text", "joint") if "no-mlm" not in name}
    masked |= {f"mim_{kind}" for kind in ("image", "joint") if "no-mim" not in name}
    contrasts = {word for word in name.split("-") if word in ("itc", "xmc", "cic", "cmc")} or {"itc", "cmc"}
    assert result.terms.keys() == contrasts | masked
    assert math.isfinite(result.loss)
    assert (method.momentum_tower is None) == (name == "e-no-teacher")
    assert method.view_plan.images == {"image": STRONG if name == "e-strong-augmentation" else WEAK}
    before = {n: p.clone() for n, p in method.named_parameters() if p.requires_grad}
    optimizers.set_lr(4, 10)
    optimizers.step()
    method.after_step(result.features, result.targets, GATHER, STEP)
    assert all(not torch.equal(before[n], p) for n, p in method.named_parameters() if n in before and p.grad.any())


def test_disabled_parts_are_not_built(tmp_path):
    method = build(tmp_path, teacher="none", **PLAIN)
    assert not method.view_plan.patch_ranks
    assert method.view_plan.texts["caption"].mask_p == 0
    assert method.tower.word_embedding.num_embeddings == 50
    assert not any(word in name for name in method.state_dict() for word in ("momentum", "mask", "mlm", "mim"))
    assert method.encode_targets(make_batch(method.view_plan, 4), START) == {}
    assert build(tmp_path).tower.word_embedding.num_embeddings == 51


def test_bfloat16(tmp_path):
    method = build(tmp_path, **EVERY_LOSS).float()
    batch = make_batch(method.view_plan, BATCH)
    exact = forward_backward(method, batch, STEP, ALONE).loss
    half = forward_backward(method, batch, STEP, ALONE, autocast=torch.bfloat16).loss
    assert half == pytest.approx(exact, rel=0.05)


# ---------------------------------------------------------------- the EMA copy


@pytest.mark.parametrize(
    ("setting", "steps", "momentum"), [(None, 10**6, 0.996), (None, 2000, 1 - 113 / 2000), (0.99, 2000, 0.99)]
)
def test_ema_copy_has_fixed_momentum(tmp_path, setting, steps, momentum):
    method = build(tmp_path, teacher_momentum=setting)
    parameters = [(method.tower.cls, method.momentum_tower.cls)]
    parameters.append(tuple(p["all"].layers[0].weight for p in (method.projectors, method.momentum_projectors)))
    for number in (0, steps // 2):
        for online, copy in parameters:
            online.data += 1
            expected = momentum * copy + (1 - momentum) * online
            copy.expected = expected.detach()
        method.after_step({}, {}, GATHER, StepInfo(number, steps))
        for _, copy in parameters:
            torch.testing.assert_close(copy.detach(), copy.expected)
            assert not copy.requires_grad


# ---------------------------------------------------------------- a unified space


def train_on_few_pairs(folder, steps=60, **changes):
    """Trains on 16 pairs of noise. Returns the method, in evaluation mode, and the batch."""
    method = build(folder, **PLAIN, **changes).float().train()
    batch = make_batch(method.view_plan, 16)
    optimizers = build_optimizers(method.parameter_groups(), OptimizerConfig(lr=3e-3, weight_decay=0.1), method)
    for number in range(steps):
        step = StepInfo(number, steps)
        optimizers.set_lr(number, steps)
        result = forward_backward(method, batch, step, ALONE)
        optimizers.step()
        move_statistics(method, ALONE, keep=True)
        method.after_step(result.features, result.targets, GATHER, step)
        optimizers.zero_grad()
    return method.eval(), batch


@torch.no_grad()
def embed(method, batch):
    caption = batch.texts["caption"]
    return method.encode_image(batch.images["image"].pixels), method.encode_text(caption.ids, caption.lengths)


def by_projector(method, folder):
    """Returns the same model with the similarity "projector"."""
    config = replace(method.config, similarity="projector")
    other = OneR(config, TowerSpec(str(folder / "model.json"), vocab_size=50, context_length=12))
    other.load_state_dict(method.state_dict())
    return other.to(next(method.parameters()).dtype).eval()


def test_itc_alone_does_not_align_modalities(tmp_path):
    """With ITC alone, the predictor fits the loss by swapping the modalities. Mixed features, which it must map to themselves, prevent
    this, and so do two projectors without a predictor (the order of Table 1)."""

    def recalls(**changes):
        """R@1, averaged over both directions, by the projector and by the trained similarity."""
        method, batch = train_on_few_pairs(tmp_path, **changes)
        labels = torch.arange(16)
        for model in (by_projector(method, tmp_path), method):
            s = model.similarity(*embed(model, batch))
            yield ((s.argmax(0) == labels).sum() + (s.argmax(1) == labels).sum()).item() / 32

    settings = {"losses": ("itc",)}, {"losses": ("itc",), "heads": "two"}, {}
    (naive, fitted), (two, _), (mixed, _) = (recalls(**changes) for changes in settings)
    assert fitted > 0.7
    assert naive < 0.3
    assert two > 0.8
    assert mixed > naive + 0.15


# ---------------------------------------------------------------- similarity


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": "none"},
        {"losses": ("itc",), "heads": "two"},
        {"losses": ("itc",), "heads": "two", "teacher": "none"},
        {"head_norm": "batch_apart", "losses": ("itc", "xmc")},
    ],
)
def test_similarity_is_what_the_loss_compares(tmp_path, monkeypatch, changes):
    """The mean of the logits of ITC in both directions, in evaluation mode without masks, times τ."""
    method, batch = train_on_few_pairs(tmp_path, steps=3, **changes)
    compared = []
    info_nce = module.info_nce

    def recording(queries, keys, *others):
        compared.append(queries @ keys.T)
        return info_nce(queries, keys, *others)

    monkeypatch.setattr(module, "info_nce", recording)
    with torch.no_grad():
        method.objective(method.encode(batch, END), method.encode_targets(batch, END), GATHER, END)
    image_to_text, text_to_image = compared[:2]
    images, texts = embed(method, batch)
    assert images._fields == ("query", "key")
    found = method.similarity(images, texts)
    torch.testing.assert_close(found, (image_to_text + text_to_image.T) / 2)
    torch.testing.assert_close(method.similarity(texts, images), found.T)
    torch.testing.assert_close(method.similarity(take(images, slice(2, 5)), take(texts, [7])), found[2:5, 7:8])
    without = changes.get("heads") == "two" and changes.get("teacher") == "none"
    assert torch.equal(images.query, images.key) == without
    if not without:  # each of the two directions is a different comparison
        assert (image_to_text - text_to_image.T).abs().max() > 1e-3


def test_projector_is_one_vector_compared_by_its_cosine(tmp_path):
    method, batch = train_on_few_pairs(tmp_path, steps=3)
    other = by_projector(method, tmp_path)
    assert other.similarity is dot_product
    images, texts = embed(other, batch)
    with torch.no_grad():
        features = method.encode(batch, END)
        rows = {kind: features[f"{kind}_features"] for kind in ("image", "text")}
        expected = method._project(method.projectors, rows, GATHER.sum)
    torch.testing.assert_close(images, F.normalize(expected["image"], dim=-1))
    torch.testing.assert_close(texts, F.normalize(expected["text"], dim=-1))
    trained = embed(method, batch)
    assert (other.similarity(images, texts) - method.similarity(*trained)).abs().max() > 1e-2


# ---------------------------------------------------------------- embeddings and features


def test_modality_gap_is_logged(tmp_path):
    method = build(tmp_path, **PLAIN)
    assert method.scalars() == {"logit_scale": torch.tensor(5.0)}
    features = random_features(1)
    method.objective(features, random_features(2), GATHER, START)
    images, texts = (
        [row / sum(v * v for v in row) ** 0.5 for row in features[f"{kind}_features"].detach()]
        for kind in ("image", "text")
    )
    gap = [sum(i[k] for i in images) / PAIRS - sum(t[k] for t in texts) / PAIRS for k in range(WIDTH)]
    assert method.scalars()["modality_gap"].item() == pytest.approx(math.sqrt(sum(g * g for g in gap)), rel=1e-5)


@pytest.mark.parametrize("similarity", ["trained", "projector"])
@pytest.mark.parametrize("changes", [{}, {"head_norm": "batch_apart"}, {"head_norm": "layer", "pooling": "balanced"}])
def test_image_text_and_joint_embeddings(tmp_path, changes, similarity):
    method = build(tmp_path, similarity=similarity, **changes).eval()
    batch = make_batch(method.view_plan, 4)
    pixels, caption = batch.images["image"].pixels, batch.texts["caption"]
    inputs = pixels, caption.ids, caption.lengths
    embeds = {
        "image": method.encode_image(pixels),
        "text": method.encode_text(*inputs[1:]),
        "joint": method.encode_joint(*inputs),
    }
    for kind, value in embeds.items():
        assert len(fields(value)) == (2 if similarity == "trained" else 1)
        for vectors in fields(value).values():
            assert vectors.shape == (4, 16)
            torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4, dtype=torch.float64))
        rows = {"image": inputs[:1], "text": inputs[1:], "joint": inputs}[kind]
        encode = {"image": method.encode_image, "text": method.encode_text, "joint": method.encode_joint}[kind]
        # independent of the rest of the batch
        torch.testing.assert_close(encode(*(x[1:3] for x in rows)), take(value, slice(1, 3)))
    similarities = [method.similarity(embeds["image"], embeds[kind]) for kind in ("image", "joint")]
    assert (similarities[0] - similarities[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"losses": ("itc",), "heads": "two"}, {"losses": ("itc", "xmc"), "head_norm": "batch_apart"}]
)
def test_modality_specific_heads_have_no_joint_embedding(tmp_path, changes):
    method = build(tmp_path, **changes).eval()
    batch = make_batch(method.view_plan, 4)
    caption = batch.texts["caption"]
    with pytest.raises(UserError, match="cannot embed image and text jointly"):
        method.encode_joint(batch.images["image"].pixels, caption.ids, caption.lengths)


def test_patch_and_token_features_are_aligned(tmp_path):
    method = build(tmp_path).eval()
    batch = make_batch(method.view_plan, 3)
    pixels, caption = batch.images["image"].pixels, batch.texts["caption"]
    patches, tokens = method.patch_features(pixels), method.token_features(caption.ids, caption.lengths)
    assert patches.shape == (3, 2, 2, WIDTH)
    assert tokens.shape == (*caption.ids.shape, WIDTH)
    states = method.tower(method.tower.embed_image(pixels))
    assert isinstance(states, States)
    torch.testing.assert_close(patches[:, 1, 0], states.patches[:, 2])
    present = tokens.abs().sum(-1) > 0
    number = torch.arange(caption.ids.shape[1])
    assert torch.equal(present, (number > 0) & (number < caption.lengths[:, None] - 1))
    mean = (states.cls + states.patches.sum(1)) / 5
    torch.testing.assert_close(pool(states, "mean"), mean)


# ---------------------------------------------------------------- data, sizes, recipes


def test_loader_patch_ranks_match_the_models_grid(tmp_path, pairs):
    source = open_source(str(pairs))
    tokenizer = train_bpe((c for i in range(len(source)) for c in source.record(i).captions), 300)
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**TRANSFORMER, "vision_cfg": {**TRANSFORMER["vision_cfg"], "patch_size": 8}}))
    config = TrainConfig(
        "oner", OneRConfig(head_hidden=16, head_dim=8), model=str(path), context_length=12, image_size=48
    )
    method = build_run_method(config, tokenizer)
    assert (image_size(method), patch_grid(method)) == (48, (6, 6))
    loader = PairLoader(
        source, range(len(source)), method.view_plan, tokenizer, image_size=image_size(method), context_length=12,
        batch_size=8, seed=0, patch_grid=patch_grid(method),
    )  # fmt: skip
    (loaded,) = itertools.islice(loader.batches(0, 1), 1)
    view, caption = loaded.batch.images["image"], loaded.batch.texts["caption"]
    assert view.patch_ranks.shape == (8, 6, 6)
    assert (unmasked(caption) < tokenizer.vocab_size).all()
    features = method.encode(loaded.batch, END)
    assert features["mim_image_count"].sum() == (view.patch_ranks < 0.5).sum()
    assert features["mlm_text_count"].sum() == (caption.labels >= 0).sum()


def test_two_tower_methods_have_no_patch_grid(tmp_path):
    clip = build_method("clip", tmp_path)
    assert (image_size(clip), patch_grid(clip)) == (32, None)


def test_weights_load_at_a_larger_image_size(tmp_path):
    method = build(tmp_path)
    run_step(method, make_batch(method.view_plan, BATCH), ALONE)  # the EMA copy now differs from the tower
    larger = OneR(method.config, TowerSpec(str(tmp_path / "model.json"), 50, 12, image_size=64)).double()
    larger.load_state_dict(method.state_dict())
    assert patch_grid(larger) == (4, 4)
    batch = make_batch(larger.view_plan, BATCH, image_size=64)
    batch.images["image"].patch_ranks = torch.rand(BATCH, 4, 4)
    result = forward_backward(larger, batch, STEP, ALONE)
    assert math.isfinite(result.loss)
    caption = batch.texts["caption"]
    same = [m.eval().encode_text(unmasked(caption), caption.lengths) for m in (method, larger)]
    torch.testing.assert_close(*same, rtol=0, atol=0)


def test_recipes_match_the_paper():
    paper = RECIPES["oner-cc3m"](2_900_000)
    assert paper.method_config == OneRConfig()
    assert (paper.model, paper.epochs, paper.batch_size) == ("ViT-B-16", 40, 4096)
    assert (paper.optimizer.lr, paper.optimizer.weight_decay) == (pytest.approx(1.6e-3), 0.1)
    assert paper.optimizer.num_warmup_steps(4000) == 400
    models = [RECIPES["oner"](pairs).model for pairs in (500, 50_000, 500_000, 5_000_000)]
    assert models == ["oner-tiny", "oner-small", "ViT-S-32", "ViT-B-32"]
    assert RECIPES["oner"](500).method_config == ABLATIONS["1-itc-cmc"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("losses", ()),
        ("losses", ("itc", "clip")),
        ("losses", ("itc", "itc")),
        ("heads", "three"),
        ("heads", "two"),
        ("head_norm", "group"),
        ("head_hidden", 0),
        ("pooling", "max"),
        ("teacher", "bert"),
        ("similarity", "cosine"),
        ("temperature", 0.0),
        ("teacher_momentum", 1.1),
        ("mlm_weight", -1.0),
        ("mask_p", 0.0),
        ("mim_ratio", (0.0, 0.5)),
    ],
)
def test_invalid_settings_are_rejected(field, value):
    with pytest.raises(UserError, match=f"^{field} is "):
        OneRConfig(**{field: value})


def test_batch_apart_needs_itc():
    with pytest.raises(UserError, match="only itc trains the head on single images and texts"):
        OneRConfig(losses=("cmc",), head_norm="batch_apart")
