import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method, make_batch
from helpers.processes import on_two_processes
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.losses.contrastive import info_nce
from coalign.losses.masked import masked_language_loss
from coalign.methods import recipe, recipes
from coalign.methods.declip.config import DeCLIPConfig
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.optim import build_optimizers
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward, move_statistics
from coalign.types import StepInfo

WORLD = World(0, 1, torch.device("cpu"))
GATHER, STEP = RankGather(WORLD), StepInfo(5, 10)
SMALL = {"projector_width": 16, "predictor_width": 8, "queue_size": 20}
CODE = {"loss_weighting": "released_code", "neighbor_pairs": "released_code", "neighbor_not_own": False}


@pytest.fixture
def declip(tmp_path):
    return lambda **changes: build_method("declip", tmp_path, **{**SMALL, **changes})


def objective(method, features, step=STEP):
    return {term.name: term for term in method.objective(features, {}, GATHER, step)}


def mean(term):
    return term.total / term.count


def total(terms):
    return sum(term.weight * mean(term) for term in terms.values())


def push(method, embeds, indices, caption_ids):
    method.queue.push(embeds=F.normalize(embeds, dim=-1), indices=indices, caption_ids=caption_ids)


def train(method, batches, world=WORLD, slices=None, first=0):
    """Runs steps without an optimizer. Returns the losses, the last step's gradients, and the buffers."""
    losses = []
    for index, batch in enumerate(batches, first):
        step = StepInfo(index, 10)
        method.zero_grad()
        result = forward_backward(method, batch, step, world, slices=slices)
        losses.append(result.loss)
        move_statistics(method, world, keep=True)
        method.after_step(result.features, result.targets, RankGather(world), step)
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return losses, gradients, {name: buffer.clone() for name, buffer in method.named_buffers()}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=0)
    for ours, theirs in zip(one[1:], other[1:]):
        assert ours.keys() == theirs.keys()
        for name in ours:
            error = (ours[name] - theirs[name]).double().norm()
            assert error <= 1e-9 * ours[name].double().norm() + 1e-14, name


# ---------------------------------------------------------------- the released code


@pytest.mark.parametrize("name", ["declip_full", "declip_full_clamped"])
def test_objective_equals_released_code(oracles, tmp_path, name):
    oracle = oracles("declip")
    par = {key.removeprefix("declip_full.par."): value for key, value in oracle.items() if ".par." in key}
    changes = {**SMALL, **CODE, "queue_size": 32, "neighbor_start": 0.0}
    declip = build_method("declip", tmp_path, {**TRANSFORMER, "embed_dim": 12}, **changes)
    load_heads(declip, par)
    declip.queue.push(embeds=par["bank0"].T, indices=torch.full((32,), -1), caption_ids=torch.full((32,), -1))
    # the released code clamps in the forward pass
    declip.logit_scale.log.data[0] = min(oracle[f"{name}.in.log_scale"].item(), math.log(100))
    raw = {
        key: oracle[f"declip_full.in.{key}"].requires_grad_()
        for key in ("image1", "image2", "text", "text_aug", "word")
    }
    labels = oracle["declip_full.in.mlm_labels"]
    mlm = masked_language_loss(raw["word"], labels, lambda x: F.linear(x, par["mlm_weight"], par["mlm_bias"]))
    features = {
        "image_projected": torch.stack([raw["image1"], raw["image2"]], 1),
        "text_embeds": F.normalize(torch.stack([raw["text"], raw["text_aug"]], 1), dim=-1),
        "caption_ids": torch.arange(8),
        "indices": torch.arange(8),
        "mlm_total": mlm[0],
        "mlm_count": mlm[1],
    }
    terms = objective(declip, features)
    loss = total(terms)
    loss.backward()
    close = {"rtol": 1e-7, "atol": 1e-8}
    torch.testing.assert_close(loss.detach().squeeze(), oracle[f"{name}.out.loss"], **close)
    for key, value in raw.items():
        torch.testing.assert_close(value.grad, oracle[f"{name}.out.grad_{key}"], **close)
    if name == "declip_full_clamped":
        return
    torch.testing.assert_close(declip.logit_scale.log.grad, oracle["declip_full.out.grad_log_scale"], **close)
    for term, key in (("image_ss", "simsiam_loss"), ("text_ss", "text_mlm_loss"), ("nns", "clip_nn_text_loss")):
        torch.testing.assert_close(mean(terms[term]).detach().squeeze(), oracle[f"declip_full.out.{key}"], **close)
    pairs = (mean(terms["clip"]) + mean(terms["mvs"])) / 4
    torch.testing.assert_close(pairs.detach().squeeze(), oracle["declip_full.out.clip_loss"], **close)
    declip.after_step(features, {}, GATHER, STEP)
    torch.testing.assert_close(declip.queue["embeds"].float(), oracle["declip_full.out.bank1"].T)
    assert declip.queue.num_pushed.item() % 32 == oracle["declip_full.out.bank_ptr1"].item()


@pytest.mark.parametrize(("file", "name"), [("contrastive", "declip_infonce"), ("declip", "declip_infonce_rank1")])
def test_info_nce_equals_released_code(oracles, file, name):
    """The released code takes logits, so the keys are unit vectors here. The second case has rows 4 to 7 of the global batch."""
    oracle = oracles(file)
    logits = [oracle[f"{name}.in.logits_per_{side}"].requires_grad_() for side in ("image", "text")]
    positives = oracle[f"{name}.out.labels"]
    keys = torch.eye(8, dtype=torch.float64)
    loss = sum(info_nce(each, keys, positives, 1.0) for each in logits) / (2 * len(positives))
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"])
    for each, side in zip(logits, ("image", "text")):
        torch.testing.assert_close(each.grad, oracle[f"{name}.out.grad_logits_per_{side}"])


def load_heads(declip, par):
    """Loads the released code's projector and predictor, whose layers have different names."""
    for head, layers in (
        (declip.projector, ("projector.linear1", "projector.linear2", "projector.linear3")),
        (declip.predictor, ("predictor.linear1", "predictor.layer2")),
    ):
        for ours, theirs in zip(head.layers, layers, strict=True):
            ours.load_state_dict({key: par[f"{theirs}.{key}"] for key in ("weight", "bias")})
        for number, norm in enumerate(head.norms, 1):
            theirs = f"{layers[0].split('.')[0]}.bn{number}"
            for key in ("weight", "bias"):
                getattr(norm, key).data.copy_(par[f"{theirs}.{key}"])


# ---------------------------------------------------------------- Eq. 2 and its options


def test_objective_equals_equation_2(declip):
    """Computes each term from its formula, with the paper's weighting and §3.3's neighbors."""
    method = declip(neighbor_start=0.0)
    batch = make_batch(method.view_plan, 6)
    with torch.no_grad():
        queued = torch.randn(15, 16, dtype=torch.float64)
        push(method, queued, torch.arange(100, 115), torch.arange(100, 115))
        features = method.encode(batch, STEP)
        terms = objective(method, features)
        image, image_aug = F.normalize(features["image_projected"], dim=-1).unbind(1)
        text, text_aug = features["text_embeds"].unbind(1)
        neighbor = F.normalize(queued, dim=-1)[(text @ queued.T / queued.norm(dim=-1)).argmax(1)]
        scale, labels = method.logit_scale(), torch.arange(6)

        def one_way(queries, keys):
            return F.cross_entropy(scale * queries @ keys.T, labels)

        def infonce(a, b):
            return (one_way(a, b) + one_way(b, a)) / 2

        method.eval()  # apply_head uses batch statistics
        z, z_aug = (apply_head(method.projector, x) for x in features["image_projected"].unbind(1))
        p, p_aug = (apply_head(method.predictor, x) for x in (z, z_aug))
        simsiam = -(F.cosine_similarity(p, z_aug).mean() + F.cosine_similarity(p_aug, z).mean()) / 2
        masked = batch.texts["text_1"]
        tokens = method.text(masked.ids, masked.lengths, with_tokens=True).tokens
        mlm = F.cross_entropy(method.mlm_head(tokens.flatten(0, 1)), masked.labels.flatten())
        mvs = infonce(image, text_aug) + infonce(image_aug, text) + infonce(image_aug, text_aug)
        nns = (one_way(image, neighbor) + one_way(image_aug, neighbor)) / 2
        expected = 0.4 * infonce(image, text) + 0.2 * (simsiam + mlm) + 0.2 * mvs + 0.2 * nns
    torch.testing.assert_close(total(terms).squeeze(), expected)


def apply_head(head, x):
    for number, layer in enumerate(head.layers):
        x = layer(x)
        if number < len(head.norms):
            norm = head.norms[number]
            x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        if number < len(head.layers) - 1:
            x = F.relu(x)
    return x


OFF = {"multi_view": False, "image_ss": False, "text_ss": False, "neighbors": False}


@pytest.mark.parametrize(
    ("changes", "views", "weights", "code_weights"),
    [
        (OFF, (1, 1), {"clip": 1}, {"clip": 1}),
        (OFF | {"multi_view": True}, (2, 2), {"clip": 0.8, "mvs": 0.2}, {"clip": 0.25, "mvs": 0.25}),
        (OFF | {"image_ss": True}, (2, 1), {"clip": 0.8, "image_ss": 0.2}, {"clip": 0.8, "image_ss": 0.2}),
        (OFF | {"text_ss": True}, (1, 1), {"clip": 0.8, "text_ss": 0.2}, {"clip": 0.8, "text_ss": 0.2}),
        (OFF | {"neighbors": True}, (2, 1), {"clip": 0.8, "nns": 0.2}, {"clip": 0.8, "nns": 0.2}),
        (
            {"neighbors": False},
            (2, 2),
            {"clip": 0.6, "mvs": 0.2, "image_ss": 0.2, "text_ss": 0.2},
            {"clip": 0.15, "mvs": 0.15, "image_ss": 0.2, "text_ss": 0.2},
        ),
        (
            {},
            (2, 2),
            {"clip": 0.4, "mvs": 0.2, "image_ss": 0.2, "text_ss": 0.2, "nns": 0.2},
            {"clip": 0.1, "mvs": 0.1, "image_ss": 0.2, "text_ss": 0.2, "nns": 0.2},
        ),
    ],
)
def test_disabled_terms_need_no_views_or_modules(declip, changes, views, weights, code_weights):
    for weighting, expected in (("paper", weights), ("released_code", code_weights)):
        method = declip(**changes, loss_weighting=weighting)
        plan = method.view_plan
        assert (len(plan.images), len(plan.texts)) == views
        batch = make_batch(plan, 6)
        terms = objective(method, method.encode(batch, STEP))
        assert {name: term.weight for name, term in terms.items()} == pytest.approx(expected)
    assert hasattr(method, "projector") == ("image_ss" in expected)
    assert hasattr(method, "queue") == ("nns" in expected)
    assert hasattr(method, "mlm_head") == ("text_ss" in expected)
    assert method.text.transformer.token_embedding.num_embeddings == 50 + ("text_ss" in expected)  # the mask token


def test_text_views(declip):
    kinds = {
        "original": {"text_1": ("original", 0.15), "text_2": ("eda", 0.0)},
        "two_eda": {"text_1": ("eda", 0.15), "text_2": ("eda", 0.0)},
        "separate": {"text_1": ("original", 0.0), "text_2": ("eda", 0.0), "masked_text": ("original", 0.15)},
    }
    for changes, expected in (
        ({}, kinds["original"]),
        ({"text_views": "two_eda"}, kinds["two_eda"]),
        ({"contrast_masked_text": False}, kinds["separate"]),
    ):
        plan = declip(**changes).view_plan
        assert {name: (policy.kind, policy.mask_p) for name, policy in plan.texts.items()} == expected


def test_contrast_masked_text(declip):
    """Changing only the masked view changes MLM, and changes the contrasted features only if they are the masked view's."""
    for contrast, name in ((True, "text_1"), (False, "masked_text")):
        method = declip(contrast_masked_text=contrast)
        batch = make_batch(method.view_plan, 6)
        before = method.encode(batch, STEP)
        view = batch.texts[name]
        batch.texts[name] = replace(view, ids=(view.ids + 1) % 50)
        after = method.encode(batch, STEP)
        assert not torch.allclose(before["mlm_total"], after["mlm_total"])
        assert torch.allclose(before["text_embeds"], after["text_embeds"]) != contrast


# ---------------------------------------------------------------- neighbors


def random_features(size, dim=16):
    features = torch.randn(2, size, 2, dim, dtype=torch.float64)
    ids = {"caption_ids": torch.arange(size), "indices": torch.arange(size)}
    return {"image_projected": features[0], "text_embeds": F.normalize(features[1], dim=-1), **ids}


ONLY_NEIGHBORS = OFF | {"neighbors": True}


def test_neighbor_pairs(declip):
    features = random_features(5)
    queued = F.normalize(torch.randn(20, 16, dtype=torch.float64), dim=-1)
    images, texts = F.normalize(features["image_projected"], dim=-1), features["text_embeds"]
    nearest = [queued[(texts[:, view] @ queued.T).argmax(1)] for view in (0, 1)]
    for pairs, both_ways, expected in (
        ("paper", False, [(0, 0), (1, 0)]),
        ("paper", True, [(0, 0), (1, 0)]),
        ("algorithm_1", False, [(1, 0)]),
        ("released_code", False, [(0, 0), (1, 0), (0, 1), (1, 1)]),
    ):
        method = declip(**ONLY_NEIGHBORS, neighbor_pairs=pairs, neighbor_both_ways=both_ways)
        push(method, queued, torch.arange(100, 120), torch.arange(100, 120))
        losses = []
        for image, text in expected:
            logits = method.logit_scale() * images[:, image] @ nearest[text].T
            losses.append(F.cross_entropy(logits, torch.arange(5)))
            if both_ways:
                losses.append(F.cross_entropy(logits.T, torch.arange(5)))
        torch.testing.assert_close(mean(objective(method, features)["nns"]), torch.stack(losses).mean())


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("multi_positive", [False, True])
def test_neighbors_of_a_group_are_not_negatives_in_it(declip, multi_positive, both_ways):
    """L_NNS equals loops: a neighbor is no negative of an image of its own group, nor of one whose text or neighbor shares a group."""
    size, groups = 6, [20, 20, 21, 22, 5, 6]
    settings = {"neighbor_not_own": False, "neighbor_both_ways": both_ways, "multi_positive": multi_positive}
    method = declip(**ONLY_NEIGHBORS, **settings)
    features = random_features(size) | {"indices": torch.tensor(groups), "group_ids": torch.tensor(groups)}
    features["caption_ids"] = torch.tensor([0, 1, 2, 1, 3, 4])
    queued = F.normalize(torch.randn(16, 16, dtype=torch.float64), dim=-1)
    queued_groups, queued_captions = torch.arange(16) % 4 + 20, torch.arange(16) % 5 + 1
    push(method, queued, queued_groups, queued_captions)
    images, texts = F.normalize(features["image_projected"], dim=-1), features["text_embeds"]
    slots = (texts[:, 0] @ queued.T).argmax(1)
    found = queued_groups[slots].tolist()
    captions, found_captions = features["caption_ids"].tolist(), queued_captions[slots].tolist()

    def is_negative(image, neighbor):
        same_group = {groups[image], found[image]} & {found[neighbor]} or groups[image] == groups[neighbor]
        caption = captions[image] == captions[neighbor] or found_captions[image] == found_captions[neighbor]
        return not same_group and not (multi_positive and caption)

    losses = []
    for view in (0, 1):
        scores = method.logit_scale() * images[:, view] @ queued[slots].T  # [image, neighbor]
        for i in range(size):
            row = [i, *(j for j in range(size) if j != i and is_negative(i, j))]
            losses.append(scores[i, row].logsumexp(0) - scores[i, i])
            if both_ways:
                column = [i, *(j for j in range(size) if j != i and is_negative(j, i))]
                losses.append(scores[column, i].logsumexp(0) - scores[i, i])
    assert 0 < sum(is_negative(i, j) for i in range(size) for j in range(size)) < size * (size - 1)
    torch.testing.assert_close(mean(objective(method, features)["nns"]), torch.stack(losses).mean())


def test_neighbor_not_own_excludes_same_sample_and_caption(declip):
    """Skips queue entries of the same sample and of an equal caption; without the option, a sample is its own neighbor."""
    features = random_features(4)
    texts, ids = features["text_embeds"][:, 0], torch.arange(4)
    for not_own, similarity in ((True, (texts @ texts.T).fill_diagonal_(-1).max(1).values.mean()), (False, 1.0)):
        method = declip(**ONLY_NEIGHBORS, neighbor_not_own=not_own)
        push(method, texts, ids, ids + 10)  # the same samples
        push(method, texts, ids + 10, ids)  # other samples with the same captions
        objective(method, features)
        assert method.scalars()["neighbor_similarity"].item() == pytest.approx(float(similarity))


def test_samples_without_neighbor_are_excluded(declip):
    method = declip(**ONLY_NEIGHBORS)
    features = random_features(4)
    features["caption_ids"] = torch.tensor([7, 7, 1, 2])
    push(method, torch.randn(3, 16, dtype=torch.float64), torch.arange(50, 53), torch.full((3,), 7))
    term = objective(method, features)["nns"]
    assert term.count == 4  # two rows, two image views
    remaining = {name: value[2:] for name, value in features.items()}
    torch.testing.assert_close(mean(objective(method, remaining)["nns"]), mean(term))


def test_neighbor_term_starts_after_a_tenth_of_the_run(declip):
    method = declip(queue_size=64)
    batches = [make_batch(method.view_plan, 8, seed=seed) for seed in range(3)]
    for index, fill in enumerate((0.125, 0.25, 0.375)):
        step = StepInfo(index, 20)
        result = forward_backward(method, batches[index], step, WORLD)
        method.after_step(result.features, result.targets, GATHER, step)
        assert method.scalars()["queue_fill"].item() == pytest.approx(fill)
        assert (result.terms["nns"] != 0) == (index >= 2)
        assert ("neighbor_similarity" in method.scalars()) == (index >= 2)


def test_queue_larger_than_the_dataset(declip):
    """The queue holds a sample several times, from different epochs; none of these entries is its neighbor."""
    method = declip(queue_size=50)
    batch = make_batch(method.view_plan, 8)
    train(method, [batch] * 9, first=1)
    assert method.queue.fill == 1
    assert all(count in (6, 7) for count in Counter(method.queue["indices"].tolist()).values())
    features = method.encode(batch, STEP)
    term = objective(method, features)["nns"]
    assert term.count == 16
    assert torch.isfinite(term.total)
    assert method.scalars()["neighbor_similarity"] < 1 - 1e-6  # its own entries would have 1


def test_random_neighbors_are_less_similar(declip):
    nearest, control = (declip(**ONLY_NEIGHBORS, neighbor_random=on) for on in (False, True))
    features, queued = random_features(20), torch.randn(20, 16, dtype=torch.float64)
    for method in (nearest, control):
        push(method, queued, torch.arange(50, 70), torch.arange(50, 70))
        objective(method, features)
    assert nearest.scalars()["neighbor_similarity"] > 0.4
    assert control.scalars()["neighbor_similarity"] < 0.25
    loss = mean(objective(control, features)["nns"])
    assert loss == mean(objective(control, features)["nns"])  # the random neighbors depend on the step only
    assert loss != mean(objective(control, features, StepInfo(6, 10))["nns"])


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("model", [TRANSFORMER, BATCH_NORM])
@pytest.mark.parametrize("changes", [{}, {**CODE, "multi_positive": True, "neighbor_both_ways": True}])
def test_micro_batches_with_neighbors(tmp_path, model, changes):
    def run(slices):
        method = build_method("declip", tmp_path, model, **SMALL, **changes)
        return train(method, [make_batch(method.view_plan, 8, seed=seed) for seed in range(4)], slices=slices, first=1)

    whole = run(None)
    assert whole[2]["queue.num_pushed"] == (64 if changes else 32)
    assert_same(whole, run([slice(0, 4), slice(4, 6), slice(6, 8)]))


CHANGES = [{}, {**CODE, "multi_positive": True}, {"neighbor_both_ways": True, "neighbor_random": True}]


def rank_runs(world, folder):
    results = []
    for changes in CHANGES:
        method = build_method("declip", folder, **SMALL, **changes)
        own = slice(4 * world.rank, 4 * world.rank + 4)
        batches = [make_batch(method.view_plan, 8, seed=seed)[own] for seed in range(4)]
        results.append(train(method, batches, world, first=1))
    return results


@pytest.mark.slow
def test_two_processes_push_gathered_features_once_in_order(tmp_path):
    ranks = on_two_processes(rank_runs, tmp_path)
    for number, changes in enumerate(CHANGES):
        method = build_method("declip", tmp_path, **SMALL, **changes)
        whole = train(method, [make_batch(method.view_plan, 8, seed=seed) for seed in range(4)], first=1)
        for rank in ranks:
            assert_same(whole, rank[number])


def test_resume_restores_the_queue(declip):
    method = declip()
    batches = [make_batch(method.view_plan, 8, seed=seed) for seed in range(5)]
    train(method, batches[:3], first=1)
    resumed = declip()
    resumed.load_state_dict(method.state_dict())
    assert_same(train(method, batches[3:], first=4), train(resumed, batches[3:], first=4))


def test_degenerate_batches_are_finite(declip):
    for changes in ({}, {"multi_positive": True}, {"contrast_masked_text": False}, CODE):
        method = declip(**changes)
        plain = make_batch(method.view_plan, 8)
        masked = plain.texts["masked_text" if "masked_text" in plain.texts else "text_1"]
        one_caption = replace(plain, caption_ids=torch.full((8,), 3))
        cases = {
            "one caption": one_caption,
            "nothing masked": with_labels(plain, torch.full_like(masked.labels, -100)),
            "all masked": with_labels(plain, masked.ids),
            "shortest captions": replace(
                plain, texts={name: replace(view, lengths=torch.full((8,), 2)) for name, view in plain.texts.items()}
            ),
            "blank images": replace(
                plain,
                images={
                    name: replace(view, pixels=torch.zeros_like(view.pixels)) for name, view in plain.images.items()
                },
            ),
        }
        for name, batch in cases.items():
            losses, gradients, _ = train(method, [batch, batch, batch], first=1)
            assert all(map(torch.isfinite, map(torch.tensor, losses))), name
            assert all(gradient.isfinite().all() for gradient in gradients.values()), name
            assert ("mlm_head.decoder.weight" in gradients) == (name != "nothing masked")
    method = declip(multi_positive=True)
    result = forward_backward(method, one_caption, STEP, WORLD)
    assert result.terms["clip"] == pytest.approx(0, abs=1e-12)  # there are no negatives
    assert result.terms["nns"] == 0


def with_labels(batch, labels):
    texts = {name: replace(view, labels=None if view.labels is None else labels) for name, view in batch.texts.items()}
    return replace(batch, texts=texts)


def test_training_and_inference_embeddings_agree(declip):
    method = declip(contrast_masked_text=False)
    batch = make_batch(method.view_plan, 4)
    features, text = method.encode(batch, STEP), batch.texts["text_1"]
    embeds = method.encode_text(text.ids, text.lengths)
    torch.testing.assert_close(features["text_embeds"][:, 0], embeds)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    images = method.encode_image(batch.images["image_1"].pixels)
    torch.testing.assert_close(F.normalize(features["image_projected"][:, 0], dim=-1), images)


def test_scalars_show_collapse_and_scale_is_clamped(declip):
    method = declip()
    features = {**random_features(64), "mlm_total": torch.ones(64), "mlm_count": torch.ones(64)}
    objective(method, features)
    assert method.scalars()["simsiam_std"] > 0.5
    with torch.no_grad():
        for norm in method.projector.norms:
            norm.weight.zero_()
            norm.bias.fill_(1.0)
    objective(method, features)
    assert method.scalars()["simsiam_std"] < 1e-6
    method.logit_scale.log.data.fill_(9.0)
    method.after_step(features, {}, GATHER, STEP)
    assert method.scalars()["logit_scale"].item() == pytest.approx(100)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"mask_p": 0}, "mask_p is 0"),
        ({"neighbor_start": 2}, "neighbor_start is 2"),
        ({"ss_weight": -1}, "ss_weight is -1"),
        ({"ss_weight": 0.8}, "CLIP's term has weight -0.2, but must be above 0"),
    ],
)
def test_invalid_settings_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        DeCLIPConfig(**changes)


def test_small_recipe_queue_size():
    for pairs, size in ((300, 64), (5000, 1024), (50_000, 2500), (500_000, 25_000), (20_000_000, 65_536)):
        config = recipe("declip")(pairs)
        assert config.method_config.queue_size == size == min(65_536, max(4 * config.batch_size, pairs // 20))


def test_optimizers_match_the_paper(declip):
    method = declip()
    vit = build_optimizers(method.parameter_groups(), recipe("declip-88m-vit-b-32")(1).optimizer, method)
    steps = 3200
    peak, start, end = (vit.set_lr(step, steps) for step in (100, 0, steps - 1))
    assert (start["image"], peak["image"]) == pytest.approx((1e-4, 1e-3), rel=1e-3)
    assert (start["text"], peak["text"]) == pytest.approx((1e-3, 2e-2), rel=1e-3)
    assert end["image"] == pytest.approx(0, abs=1e-9)
    kinds = {kind: {group["role"] for group in each.param_groups} for kind, each in vit.by_kind.items()}
    assert kinds == {"adamw": {"image", "scale"}, "sgd": {"text"}}
    decays = {group["role"]: group["weight_decay"] for each in vit.optimizers for group in each.param_groups[:1]}
    assert decays == {"image": 0.05, "text": 1e-4}
    resnet = build_optimizers(method.parameter_groups(), recipe("declip-88m-rn50")(1).optimizer, method)
    assert list(resnet.by_kind) == ["sgd"]
    assert resnet.set_lr(0, steps)["image"] == pytest.approx(0.01)
    assert resnet.set_lr(100, steps)["text"] == pytest.approx(0.2)


def test_table_4_recipes():
    rows = [recipe(f"declip-cc3m{row}")(3_000_000).method_config for row in ("-clip", "-mvs", "-ss", "")]
    terms = [(c.multi_view, c.image_ss, c.text_ss, c.neighbors) for c in rows]
    assert terms == [(False,) * 4, (True, False, False, False), (True, True, True, False), (True,) * 4]


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("row", "trunk", "image", "text"),
    [
        ("declip-88m-vit-b-32", 87.46, 88.24, 63.69),  # 88M in the paper
        ("declip-88m-rn50", 38.32, 38.32, 63.69),  # 24M in the paper, without CLIP's attention pool
        ("declip-88m-regnety-64gf", 276.46, 281.49, 123.84),  # 276M in the paper, without a classifier
    ],
)
def test_model_sizes_match_the_paper(row, trunk, image, text):
    config = recipes()[row](88_000_000)
    attention = config.method_config.text_attention
    with torch.device("meta"):
        spec = TowerSpec(config.model, 49408)
        image_tower = build_image_tower(spec)
        text_tower = build_text_tower(spec, attention, "start" if attention == "bidirectional" else "end")
    assert image_tower.embed_dim == text_tower.embed_dim == 1024
    counts = [millions(image_tower.trunk), millions(image_tower), millions(text_tower)]
    assert counts == pytest.approx([trunk, image, text], abs=0.06)
    if row == "declip-88m-rn50":
        assert millions(image_tower.trunk) - millions(image_tower.trunk.attnpool) == pytest.approx(23.5, abs=0.1)


def test_bidirectional_text_tower_is_pooled_at_the_start_token(declip):
    method = declip(text_attention="bidirectional")
    assert (method.text.attention, method.text.pooling) == ("bidirectional", "start")
    ids, lengths = torch.randint(1, 50, (1, 6)), torch.tensor([6])
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 50
    assert not torch.allclose(method.encode_text(ids, lengths), method.encode_text(changed, lengths))
