import json
from dataclasses import replace

import pytest
import torch
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method, make_batch
from helpers.processes import on_two_processes
from helpers.steps import ALONE, STEP, assert_complete, assert_equal_steps, run_step
from torch.nn import functional as F

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.methods.mct.config import RECIPES, VIEW, MCTConfig, mct
from coalign.methods.mct.method import MCT
from coalign.methods.mct.tables import ABLATIONS, CHANGES
from coalign.networks.ema import momentum_for
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.optim import build_optimizers
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward, move_statistics
from coalign.types import StepInfo, TextPolicy, ViewPlan

GATHER = RankGather(ALONE)
PAIRS, QUEUE, DIMS = 6, 10, {"intra": 5, "inter": 7}
HAS_CAPTION = torch.tensor([True, True, False, True, False, True])
HAS_IMAGE = torch.tensor([True, True, True, True, True, False])
TAGS = [[0, 1, 2, 3], [1, 2, 3], [2, 3, 5, 6], [], [], [7]]  # samples with and without captions and tags


def unit(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def padded(lists, width=4):
    return torch.tensor([(tags + [-1] * width)[:width] for tags in lists])


@pytest.fixture
def new(tmp_path):
    def new(model=TRANSFORMER, **changes):
        settings = {"intra_dim": 5, "inter_dim": 7, "queue_size": QUEUE, "max_tags": 4, "margin_negatives": 25}
        return build_method("mct", tmp_path, model, **settings | changes)

    return new


def with_missing(batch):
    """Removes captions and tags from some samples, both from others, and the image from the last one."""
    has_caption = torch.arange(len(batch)) % 2 == 0
    has_caption[-1], has_image = True, torch.arange(len(batch)) < len(batch) - 1
    tags = None if batch.tags is None else batch.tags.masked_fill((torch.arange(len(batch)) % 4 < 2)[:, None], -1)
    texts = {}
    for name, view in batch.texts.items():
        lengths = view.lengths.where(has_caption, 2)
        texts[name] = replace(view, lengths=lengths)
    return replace(batch, has_caption=has_caption, has_image=has_image, tags=tags, texts=texts)


def random_embeds(method, heads, seed):
    return {
        head: unit(PAIRS, method._dim(head), seed=seed + number).requires_grad_() for number, head in enumerate(heads)
    }


def fill_queues(method, rows=QUEUE):
    """Fills the queues with keys of the batch's samples and captions, and of others. Returns the method."""
    for number, head in enumerate(method.key_heads):
        values = {
            "embeds": unit(rows, method._dim(head), seed=50 + number),
            "indices": torch.arange(rows) + 3,
            "caption_ids": (torch.arange(rows) + number) % 5,
            "tags": padded(
                [[0, 1, 2], [1, 2, 3, 4], [], [5, 6, 2, 3], [7, 8], [3], [0, 1, 2, 3], [9], [2, 3, 5], [6]][:rows]
            ),
        }
        queue = method.queues[head]
        queue.push(**{name: values[name] for name in queue.columns})
    return method


def random_inputs(method, seed=1):
    features = random_embeds(method, method.query_heads, seed) | {
        "indices": torch.arange(PAIRS),
        "caption_ids": torch.tensor([0, 1, 70, 2, 71, 1]),
        "has_caption": HAS_CAPTION,
        "has_image": HAS_IMAGE,
        "tags": padded(TAGS),
    }
    targets = {name: value.detach() for name, value in random_embeds(method, method.key_heads, seed + 20).items()}
    return features, targets


def objective(method, features, targets):
    return {term.name: term for term in method.objective(features, targets, GATHER, STEP)}


def loss_of(terms):
    return sum(term.weight * term.total / term.count for term in terms.values())


# ---------------------------------------------------------------- the equations


def naive_loss(method, features, targets):
    """Computes Eq. 15 with loops over samples and slots."""
    config = method.config

    def negatives(name, i, queue):
        same = [torch.zeros(queue.size, dtype=torch.bool)]
        if config.multi_positive or "group_ids" in features:
            same.append(features["indices"][i] == queue["indices"])
        if config.multi_positive and name not in ("j_ii", "j_tag"):
            same.append(features["caption_ids"][i] == queue["caption_ids"])
        return [j for j in range(int(queue.num_pushed)) if not torch.stack(same)[:, j].any()]

    def info_nce(name, i, positives=()):
        query, key = method.terms[name]
        queue = method.queues[key]
        q, k = features[query][i], targets[key][i]
        denominator = torch.exp(q @ k / config.temperature)
        for j in negatives(name, i, queue):
            denominator = denominator + torch.exp(q @ queue["embeds"][j] / config.temperature)
        logs = [
            torch.log(torch.exp(q @ p / config.temperature) / denominator)
            for p in (k, *(queue["embeds"][j] for j in positives))
        ]
        return -sum(logs) / len(logs)

    def hinges(name, i):
        query, key = method.terms[name]
        queue = method.queues[key]
        q, k, slots = features[query][i], targets[key][i], negatives(name, i, queue)
        return 25 / len(slots) * sum(torch.relu(0.2 - q @ k + q @ queue["embeds"][j]) for j in slots)

    def epsilon(queue):
        """Returns the configured ε, or the smallest at which at most 2 % of the slots share more tags."""
        num_filled = int(queue.filled.sum())
        slots = [set(row) - {-1} for row in queue["tags"][:num_filled].tolist()]
        common = [len(set(TAGS[i]) & slot) for i in tagged for slot in slots]
        smallest = next(e for e in range(99) if sum(n > e for n in common) <= len(common) / 50)
        return smallest if config.tag_threshold is None else config.tag_threshold

    def sharing(i):
        queue = method.queues[method.terms["j_tag"][1]]
        threshold, own = epsilon(queue), set(TAGS[i])
        return [
            j for j in negatives("j_tag", i, queue) if len(own & (set(queue["tags"][j].tolist()) - {-1})) > threshold
        ]

    imaged, captioned = (has.nonzero().flatten().tolist() for has in (HAS_IMAGE, HAS_CAPTION))
    tagged, paired = [i for i in imaged if TAGS[i]], [i for i in imaged if i in captioned]
    means = {
        "j_ii": lambda: sum(info_nce("j_ii", i) for i in imaged) / len(imaged),
        "j_tag": lambda: sum(info_nce("j_tag", i, sharing(i)) for i in tagged) / len(tagged),
        "j_cc": lambda: 0.7 * sum(info_nce("j_cc", i) for i in captioned) / len(captioned),
        "j_ic": lambda: 0.01 * sum(hinges("j_ic", i) for i in paired) / len(paired),
        "j_ci": lambda: 0.01 * sum(hinges("j_ci", i) for i in paired) / len(paired),
    }
    if config.j_tag and not config.multi_positive and config.tag_threshold is not None:
        assert [len(sharing(i)) for i in tagged] != [0] * len(tagged)
    return sum(mean() for name, mean in means.items() if name in method.terms)


SETTINGS = [
    {},
    {"multi_positive": True},
    {"tag_threshold": 1},
    {"tag_threshold": None},
    {"heads": "unified", "intra_dim": 6, "inter_dim": 6},
    *({name: False} for name in ("j_ii", "j_tag", "j_cc", "j_ic", "j_ci")),
]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", [QUEUE, 7])
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_objective_equals_naive_loops(new, changes, rows, grouped):
    method = fill_queues(new(**changes, text_weight=0.7, inter_weight=0.01), rows)
    features, targets = random_inputs(method)
    if grouped:  # groups 3 to 8 are in the queue
        features["indices"] = features["group_ids"] = torch.tensor([3, 3, 1, 5, 20, 8])
    ours, theirs = loss_of(objective(method, features, targets)), naive_loss(method, features, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    queries = [features[head] for head in method.query_heads]
    for a, b in zip(torch.autograd.grad(ours, queries), torch.autograd.grad(theirs, queries)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_margin_terms_with_a_full_queue_are_sums(new):
    method = fill_queues(new(margin_negatives=QUEUE))
    features, targets = random_inputs(method)
    terms = objective(method, features, targets)
    for name in ("j_ic", "j_ci"):
        query, key = method.terms[name]
        total = 0.0
        for i in (HAS_CAPTION & HAS_IMAGE).nonzero().flatten():
            q = features[query][i]
            total = total + (0.2 - q @ targets[key][i] + method.queues[key]["embeds"] @ q).clamp(min=0).sum()
        torch.testing.assert_close(terms[name].weight * terms[name].total, 1e-4 * total)


def test_term_weights_and_counts(new):
    terms = objective(*((method := fill_queues(new(margin_negatives=32_768))), *random_inputs(method)))
    assert {name: (term.weight, term.count) for name, term in terms.items()} == {
        "j_ii": (1.0, 5), "j_tag": (1.0, 3), "j_cc": (1.0, 4), "j_ic": (3.2768, 3), "j_ci": (3.2768, 3),
    }  # fmt: skip


# ---------------------------------------------------------------- queues


def test_first_step_with_empty_queues_has_zero_gradient(new):
    method = new()
    first = forward_backward(method, make_batch(method.view_plan, 8), STEP, ALONE)
    assert first.loss == 0
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
    assert not method.scalars()["queue_fill"]
    method.after_step(first.features, first.targets, GATHER, STEP)
    second = forward_backward(method, make_batch(method.view_plan, 8, seed=1), STEP, ALONE)
    assert min(second.terms.values()) > 0
    assert all(p.grad.any() for p in method.parameters() if p.requires_grad)
    assert method.scalars()["queue_fill"] == pytest.approx(0.8)


def test_empty_slots_are_ignored(new):
    method, smaller = fill_queues(new(), rows=4), fill_queues(new(queue_size=4), rows=4)
    ours, theirs = (objective(each, *random_inputs(each)) for each in (method, smaller))
    for name, term in ours.items():
        torch.testing.assert_close(term.total, theirs[name].total)


def test_keys_pushed_to_the_queues(new):
    """Only keys of existing images and captions are pushed, with the images' tags aligned."""
    method = new()
    batch = with_missing(make_batch(method.view_plan, 8))
    with torch.no_grad():
        features, targets = method.encode(batch, STEP), method.encode_targets(batch, STEP)
    method.after_step(features, targets, GATHER, STEP)
    for head, queue in method.queues.items():
        rows = batch.has_caption if head.startswith("text") else batch.has_image
        count = int(rows.sum())
        assert queue.filled.sum() == count
        torch.testing.assert_close(queue["embeds"][:count], targets[head][rows])
        assert torch.equal(queue["indices"][:count], batch.indices[rows])
        assert torch.equal(queue["caption_ids"][:count], batch.caption_ids[rows])
        assert ("tags" in queue.columns) == (head == "image_intra")
    assert torch.equal(method.queues["image_intra"]["tags"][:7, :3], batch.tags[:7])
    assert (method.queues["image_intra"]["tags"][:7, 3] == -1).all()
    assert {name for name in method.state_dict() if name.endswith("tags")} == {"queues.image_intra.tags"}


def test_queues_store_the_groups_of_data_with_groups(new):
    method = new()
    batch = replace(make_batch(method.view_plan, 8), group_ids=torch.tensor([70, 70, 2, 3, 71, 71, 71, 7]))
    with torch.no_grad():
        features, targets = method.encode(batch, STEP), method.encode_targets(batch, STEP)
    method.after_step(features, targets, GATHER, STEP)
    for queue in method.queues.values():
        assert torch.equal(queue["indices"][:8], batch.group_ids)
        assert torch.equal(queue["caption_ids"][:8], batch.caption_ids)


def test_queue_larger_than_the_dataset(new):
    """Repeats four samples: with multi_positive, earlier keys of a sample are not its negatives."""
    batch, losses = None, {}
    for multi_positive in (False, True):
        method = new(queue_size=20, multi_positive=multi_positive)
        batch = make_batch(method.view_plan, 4)
        for _ in range(3):
            result = forward_backward(method, batch, STEP, ALONE)
            method.after_step(result.features, result.targets, GATHER, STEP)
        for head, queue in method.queues.items():
            assert queue.filled.sum() == 12, head
        losses[multi_positive] = result
    # from the second step on, without multi_positive a sample's earlier key is its negative
    assert losses[True].terms["j_ii"] < losses[False].terms["j_ii"]
    method = new(queue_size=20, multi_positive=True)
    single = batch[slice(0, 1)]
    for _ in range(3):
        result = forward_backward(method, single, STEP, ALONE)
        method.after_step(result.features, result.targets, GATHER, STEP)
    assert result.loss == pytest.approx(0, abs=1e-12)  # a single sample has no negatives


def test_resume_restores_the_queues(new):
    method, resumed = new(), new()
    batch = with_missing(make_batch(method.view_plan, 8))
    run_step(method, batch, ALONE)
    resumed.load_state_dict(method.state_dict())
    assert_equal_steps(run_step(method, batch, ALONE), run_step(resumed, batch, ALONE))


# ---------------------------------------------------------------- samples without captions or tags


def test_placeholders_do_not_affect_the_step(new):
    method = new()
    batch = with_missing(make_batch(method.view_plan, 8))
    expected = run_step(method, batch, ALONE)
    texts = {
        name: replace(view, ids=torch.where(batch.has_caption[:, None], view.ids, view.ids.flip(0)))
        for name, view in batch.texts.items()
    }
    images = {
        name: replace(view, pixels=torch.where(batch.has_image[:, None, None, None], view.pixels, 255 - view.pixels))
        for name, view in batch.images.items()
    }
    assert_equal_steps(expected, run_step(new(), replace(batch, texts=texts, images=images), ALONE))


def test_texts_without_images_only_train_j_cc(new):
    method = new()
    batch = replace(make_batch(method.view_plan, 8), has_image=torch.zeros(8, dtype=torch.bool))
    _, gradients, _ = run_step(method, batch, ALONE)
    assert any(gradient.any() for name, gradient in gradients.items() if name.startswith("text."))
    assert not any(gradient.any() for name, gradient in gradients.items() if name.startswith("image."))
    result = forward_backward(method, batch, STEP, ALONE)
    assert {name for name, value in result.terms.items() if value} == {"j_cc"}
    assert all(value.isfinite() for value in method.scalars().values())
    assert {method.queues[name].filled.sum().item() for name in method.queues if name.startswith("image")} == {0}


@pytest.mark.parametrize("missing", ["captions", "tags", "both"])
def test_batches_without_captions_or_tags(new, missing):
    method = new()
    batch = make_batch(method.view_plan, 8)
    if missing != "tags":
        batch = replace(batch, has_caption=torch.zeros(8, dtype=torch.bool))
    if missing != "captions":
        batch = replace(batch, tags=torch.full((8, 1), -1))
    loss, gradients, _ = run_step(method, batch, ALONE)
    assert loss > 0
    assert any(name.startswith("text.") for name in gradients) == (missing == "tags")
    result = forward_backward(method, batch, STEP, ALONE)
    zero = {"captions": {"j_cc", "j_ic", "j_ci"}, "tags": {"j_tag"}, "both": {"j_cc", "j_ic", "j_ci", "j_tag"}}[missing]
    assert {name for name, value in result.terms.items() if value == 0} == zero
    assert all(value.isfinite() for value in method.scalars().values())


def test_batch_without_pairs_has_zero_loss(new):
    method = new(**CHANGES["inter-only"])
    batch = replace(make_batch(method.view_plan, 4), has_caption=torch.zeros(4, dtype=torch.bool))
    loss, gradients, _ = run_step(method, batch, ALONE)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_single_tag_vocabulary(new):
    method = fill_queues(new())
    features, targets = random_inputs(method)
    features["tags"] = torch.tensor([[0, -1, -1, -1]]).repeat(PAIRS, 1)
    method.queues["image_intra"]["tags"].fill_(-1)[:, 0] = 0
    terms = objective(method, features, targets)
    torch.testing.assert_close(terms["j_tag"].total, terms["j_ii"].total)
    assert method.scalars()["tag_positives"] == 0
    method.config = replace(method.config, tag_threshold=0)  # now all images are positives
    terms = objective(method, features, targets)
    assert method.scalars()["tag_positives"] == 1
    assert terms["j_tag"].total > terms["j_ii"].total


def test_derived_tag_threshold(new):
    """Of 400 slots, 300 share one tag with every sample, 60 two, 32 three and 8 four."""
    method = new(queue_size=500, tag_threshold=None)
    features, targets = random_inputs(method)
    features["tags"] = torch.arange(4).repeat(PAIRS, 1)
    tags = torch.full((400, 4), -1)
    for number, first in enumerate((400, 100, 40, 8)):
        tags[:first, number] = number
    zeros = torch.zeros(400, dtype=torch.long)
    method.queues["image_intra"].push(embeds=unit(400, 5, seed=9), indices=zeros, caption_ids=zeros, tags=tags)
    objective(method, features, targets)
    assert method.scalars()["tag_threshold"] == 3  # more than two: 10 %; more than three: 2 %
    assert method.scalars()["tag_positives"] == pytest.approx(0.02)
    features["tags"][3:] = -1  # samples without tags do not count
    objective(method, features, targets)
    assert method.scalars()["tag_threshold"] == 3


def test_max_tags_drops_the_rarest(new):
    method = new(max_tags=2)
    batch = replace(make_batch(method.view_plan, 2), tags=torch.tensor([[1, 4, 9], [3, -1, -1]]))
    assert method.encode(batch, STEP)["tags"].tolist() == [[1, 4], [3, -1]]


@pytest.mark.parametrize("model", [TRANSFORMER, BATCH_NORM], ids=["transformer", "batch norm"])
def test_micro_batches_with_missing_captions_and_images(new, model):
    whole = run_step(method := new(model), batch := with_missing(make_batch(method.view_plan, 8)), ALONE)
    assert_equal_steps(whole, run_step(new(model), batch, ALONE, [slice(0, 2), slice(2, 8)]))


TWO_PROCESS_CHANGES = [{}, {"multi_positive": True, "heads": "unified", "intra_dim": 16, "tag_threshold": None}]


def captions_on_one_rank(batch):
    first = torch.arange(len(batch)) < 4
    return replace(batch, has_caption=first, tags=batch.tags.masked_fill(first[:, None], -1))


def rank_steps(world, folder):
    steps = []
    for changes in TWO_PROCESS_CHANGES:
        for kind in (with_missing, captions_on_one_rank):
            method = build_method("mct", folder, BATCH_NORM, **changes)
            half = kind(make_batch(method.view_plan, 8))[4 * world.rank : 4 * world.rank + 4]
            steps.append(run_step(method, half, world, [slice(0, 2), slice(2, 4)]))
    return steps


@pytest.mark.slow
def test_two_processes_with_missing_captions_and_images(tmp_path):
    ranks = on_two_processes(rank_steps, tmp_path)
    for number, (changes, kind) in enumerate(
        (c, k) for c in TWO_PROCESS_CHANGES for k in (with_missing, captions_on_one_rank)
    ):
        method = build_method("mct", tmp_path, BATCH_NORM, **changes)
        whole = run_step(method, kind(make_batch(method.view_plan, 8)), ALONE)
        for rank in ranks:
            assert_equal_steps(whole, rank[number])


# ---------------------------------------------------------------- keys and momentum encoders


def test_key_depends_only_on_its_own_image(new):
    """Otherwise, batch statistics shared with its query would distinguish a key from the queue's keys."""
    method = new(BATCH_NORM).train()
    batch = make_batch(method.view_plan, 8)
    run_step(method, batch, ALONE)  # moves the running statistics from their initial values
    others = replace(
        batch,
        images={
            name: replace(view, pixels=torch.cat([view.pixels[:1], view.pixels[1:].flip(2)]))
            for name, view in batch.images.items()
        },
    )
    with torch.no_grad():
        keys, changed = (method.encode_targets(each, STEP)["image_intra"][0] for each in (batch, others))
        single = method.encode_targets(batch[slice(0, 1)], STEP)["image_intra"][0]
        queries, moved = (method.encode(each, STEP)["image_intra"][0] for each in (batch, others))
    torch.testing.assert_close(keys, changed)
    torch.testing.assert_close(keys, single)
    assert (queries - moved).norm() > 1e-3
    assert not any(module.training for module in method.momentum_towers.modules())


def test_momentum_encoder_updates(new):
    method = new(BATCH_NORM, teacher_momentum=0.75)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    batch = make_batch(method.view_plan, 8)
    for _ in range(2):
        result = forward_backward(method, batch, STEP, ALONE)
        with torch.no_grad():
            for p in method.parameters():
                if p.requires_grad:
                    p += 0.1
        move_statistics(method, ALONE, keep=True)
        method.after_step(result.features, result.targets, GATHER, STEP)
    after = method.state_dict()
    num_checked = 0
    for name, value in after.items():
        online = name.replace("momentum_towers.", "").replace("momentum_heads", "heads")
        if name != online and value.is_floating_point():
            start = before[name]
            if online in dict(method.named_parameters()):
                expected = start + 0.1 * (0.25 + 0.4375)  # two steps of 0.1, each with an update at rate 0.25
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
                num_checked += 1
            else:
                assert not torch.equal(value, start)  # running statistics
    assert num_checked > 10
    assert method.scalars()["teacher_momentum"] == 0.75
    method = new()
    objective(method, *random_inputs(method))
    assert method.scalars()["teacher_momentum"] == pytest.approx(0.99)
    assert method._momentum(StepInfo(3, 46_000)) == method._momentum(StepInfo(9, 10**6)) == pytest.approx(0.999)


def test_views_and_inference_embeddings(new):
    method = new()
    plan = method.view_plan
    assert plan.images == {"query": VIEW, "key": VIEW}
    assert {name: policy.kind for name, policy in plan.texts.items()} == {"query": "paraphrase", "key": "paraphrase"}
    assert plan.captionless
    assert plan.tags == method.config.num_tags
    batch = make_batch(plan, 4)
    features = method.encode(batch, STEP)
    text = batch.texts["query"]
    torch.testing.assert_close(method.encode_image(batch.images["query"].pixels), features["image_inter"])
    torch.testing.assert_close(method.encode_text(text.ids, text.lengths), features["text_inter"])
    targets = method.encode_targets(batch, STEP)
    # before the first update, both encoders are equal
    torch.testing.assert_close(method.encode_image(batch.images["key"].pixels), targets["image_inter"])
    for value in (*targets.values(), features["image_intra"], features["text_intra"]):
        torch.testing.assert_close(value.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    assert {name: value.shape[1] for name, value in targets.items()} == {
        f"{modality}_{space}": dim for modality in ("image", "text") for space, dim in DIMS.items()
    }


def test_training_matches_captions_to_images(new):
    """Eight solid colors, each with its own words; queues of two batches. Chance level is 1/8."""
    method = new(queue_size=16, teacher_momentum=0.9, inter_weight=0.04, multi_positive=True, j_tag=False)
    batch = make_batch(method.view_plan, 8)
    colors = torch.arange(8)[:, None] * torch.tensor([29, 57, 91]) % 256
    pixels = colors.to(torch.uint8)[:, :, None, None].expand(8, 3, 32, 32).contiguous()
    images = {name: replace(view, pixels=pixels) for name, view in batch.images.items()}
    ids = torch.stack([torch.full((8,), 48), 1 + torch.arange(8), 11 + torch.arange(8), torch.full((8,), 49)], 1)
    texts = {name: replace(view, ids=ids, lengths=torch.full((8,), 4)) for name, view in batch.texts.items()}
    batch = replace(batch, images=images, texts=texts, caption_ids=torch.arange(8))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)

    def accuracy():
        with torch.no_grad():
            similarity = method.encode_image(pixels) @ method.encode_text(ids, texts["query"].lengths).T
        return (similarity.argmax(1) == torch.arange(8)).double().mean()

    initial = accuracy()
    for index in range(80):
        optimizer.zero_grad()
        result = forward_backward(method, batch, StepInfo(index, 80), ALONE)
        optimizer.step()
        method.after_step(result.features, result.targets, GATHER, StepInfo(index, 80))
    assert initial <= 0.5
    assert accuracy() == 1
    assert result.terms["j_ii"] < 0.5
    assert all(value > 0.3 for name, value in method.scalars().items() if name.endswith("spread"))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_a_step(tmp_path, name):
    config = replace(ABLATIONS[name], queue_size=16, head_hidden=32)
    (tmp_path / "m.json").write_text(json.dumps(TRANSFORMER))
    torch.manual_seed(0)
    method = MCT(config, TowerSpec(str(tmp_path / "m.json"), 50, 12)).double()
    batch = with_missing(make_batch(method.view_plan, 8))
    step = run_step(method, batch, ALONE)
    assert step[0] > 0
    assert_complete(method, step)
    trains_text = bool({"j_cc", "j_ci"} & set(config.terms))
    assert any(name.startswith("text.") for name in step[1]) == trains_text
    assert bool(batch.texts) == trains_text
    assert (batch.tags is not None) == config.j_tag
    optimizers = build_optimizers(method.parameter_groups(), RECIPES["mct-coco"](1).optimizer, method)
    optimizers.step()
    assert set(method.parameter_groups()) == {"image", "text"}
    image, text = batch.images["query"].pixels, make_batch(ViewPlan({}, {"query": TextPolicy()}), 8).texts["query"]
    assert method.encode_image(image).shape == method.encode_text(text.ids, text.lengths).shape == (8, config.inter_dim)


def test_ablations_match_the_paper():
    assert ABLATIONS["all"] == MCTConfig()
    dims = {(row.heads, row.intra_dim, row.inter_dim) for name, row in ABLATIONS.items() if name[-1].isdigit()}
    assert dims == {(heads, dim, dim) for heads in ("unified", "distinct") for dim in (128, 1024, 1152)}
    terms = {name: row.terms for name, row in ABLATIONS.items()}
    assert terms["j_ii"] == ("j_ii",)
    assert terms["j_ii+j_tag"] == ("j_ii", "j_tag")
    assert terms["inter-only"] == ("j_ic", "j_ci")
    assert terms["captions"] == terms["unified-128"] == ("j_ii", "j_cc", "j_ic", "j_ci")


def test_j_ic_alone_does_not_train_the_text_tower(new):
    method = new(j_ii=False, j_tag=False, j_cc=False, j_ci=False)
    step = run_step(method, make_batch(method.view_plan, 8), ALONE)
    assert_complete(method, step)
    assert not [name for name in step[1] if "text" in name]
    assert (list(method.view_plan.images), list(method.view_plan.texts)) == (["query"], ["key"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"j_ii": False, "j_tag": False, "j_ic": False}, "No enabled term trains the image tower"),
        ({"heads": "unified"}, "intra_dim is 128 and inter_dim is 1024; make them equal"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"max_tags": 256}, "max_tags is 256"),
        ({"tag_threshold": -1}, "tag_threshold is -1"),
        ({"inter_weight": -1.0}, "inter_weight is -1.0"),
        ({"teacher_momentum": 1.5}, "teacher_momentum is 1.5"),
        ({"heads": "both"}, "heads is 'both'"),
        ({"text_attention": "none"}, "text_attention is 'none'"),
    ],
)
def test_invalid_settings_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        MCTConfig(**changes)


def test_settings_match_the_paper():
    coco, stock = (RECIPES[name](118_000) for name in ("mct-coco-bert", "mct-stock"))
    assert (coco.batch_size, coco.epochs, stock.epochs, coco.model) == (512, 200, 60, "MCT-RN50")
    assert (coco.text_tower, stock.text_tower, stock.model) == ("hf:bert-base-uncased", None, "MCT-RN50")
    assert (coco.method_config.queue_size, stock.method_config.queue_size) == (32_768, 65_536)
    assert stock.method_config.margin_negatives == 65_536
    assert stock.method_config.num_tags == 18_157
    image, text = (coco.optimizer.for_role(role) for role in ("image", "text"))
    assert (image.kind, image.lr, image.momentum, image.weight_decay) == ("sgd", 0.03, 0.9, 1e-4)
    assert (text.kind, text.lr, text.momentum, text.weight_decay) == ("sgd", 4e-5, 0.9, 1e-4)
    assert RECIPES["mct-coco"](1).optimizer.for_role("text").kind == "adamw"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_roles_match_parameter_groups(new, name):
    method = new()
    optimizers = build_optimizers(method.parameter_groups(), RECIPES[name](5000).optimizer, method)
    assert set(optimizers.set_lr(0, 10)) == {"image", "text"}


@pytest.mark.parametrize("pairs", [2, 40, 1000, 7000, 60_000, 400_000, 20_000_000])
def test_short_runs_have_short_queues(pairs):
    config = mct(pairs)
    assert isinstance(config, TrainConfig)
    steps = config.epochs * (pairs // config.batch_size)
    limit = 0.02 * config.batch_size / (1 - momentum_for(int(steps), 46, 0.001, 0.01))
    queue_size = config.method_config.queue_size
    assert queue_size == pytest.approx(max(1, min(32_768, pairs // 4, limit)), abs=1)
    assert config.method_config.multi_positive


def test_model_sizes():
    with torch.device("meta"):
        spec = TowerSpec("MCT-RN50", 49_408)
        image, text = build_image_tower(spec), build_text_tower(spec, "bidirectional", "start")
    assert sum(p.numel() for p in image.trunk.parameters()) == 23_508_032  # ResNet-50 without its classifier
    assert (image.width, text.width) == (2048, 768)
    blocks = sum(p.numel() for p in text.transformer.transformer.parameters())
    assert blocks == 85_054_464  # the 12 layers of BERT-base
