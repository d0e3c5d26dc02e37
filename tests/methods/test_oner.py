import itertools
import json
import math

import pytest
import torch
from builders import TRANSFORMER, build_method, make_batch
from processes import on_two_processes
from test_step_equality import ALONE, BATCH, STEP, assert_complete, assert_equal_steps, batch_for, half_steps, run_step
from torch.nn import functional as F

from coalign.config import TrainConfig
from coalign.data.loader import PairLoader
from coalign.data.sources import open_source
from coalign.data.tokenizer import train_bpe
from coalign.errors import UserError
from coalign.methods.oner import OneR
from coalign.networks.towers import TowerSpec
from coalign.networks.unified import States, join, pool
from coalign.optim import OptimiserConfig, build_optimisers
from coalign.recipes.oner import ABLATIONS, RECIPES, OneRConfig
from coalign.run import model as runs
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward, move_statistics
from coalign.types import STRONG, WEAK, StepInfo

GATHER, PAIRS, WIDTH = RankGather(ALONE), 5, 32
START, END = StepInfo(0, 10), StepInfo(10, 10)
PLAIN = {"mlm": False, "mim": False}
EVERY_LOSS = {"losses": ("itc", "xmc", "cic", "cmc")}


def build(folder, **changes):
    return build_method("oner", folder, **changes)


def clean(caption):
    """The caption before it was masked."""
    return caption.ids if caption.labels is None else torch.where(caption.labels >= 0, caption.labels, caption.ids)


def with_mask_tokens(batch):
    """The batch with every chosen token become the mask, so that a masked caption is another than the clean one."""
    caption = batch.texts["caption"]
    caption.ids = torch.where(caption.labels >= 0, 50, caption.ids)
    return batch


# ---------------------------------------------------------------- the equations


def naive_ctr(queries, keys, tau, same=None):
    """ctr of Eq. 1 as loops: queries and keys are of both sides, (A, B)."""

    def nce(left, right):
        total = 0.0
        for i, q in enumerate(left):
            others = [j for j in range(len(right)) if j == i or not (same and same[i] == same[j])]
            total = total - torch.log(
                torch.exp(q @ right[i] / tau) / sum(torch.exp(q @ right[j] / tau) for j in others)
            )
        return total / len(left)

    unit = [[F.normalize(x, dim=-1) for x in side] for side in (queries, keys)]
    return (nce(unit[0][0], unit[1][1]) + nce(unit[0][1], unit[1][0])) / 2


class Doubled(OneR):
    """Heads that scale each kind of row by a number of its own: what they are given, and by which branch, shows in the loss."""

    def __init__(self, config, towers):
        super().__init__(config, towers)
        torch.manual_seed(3)
        self.maps = {name: torch.randn(WIDTH, WIDTH, dtype=torch.float64) for name in ("online", "predict", "momentum")}

    def _project(self, projectors, rows, gather):
        name = "momentum" if projectors is self.momentum_projectors else "online"
        return {kind: x @ self.maps[name] for kind, x in rows.items()}

    def mapped(self):
        self.predictor.forward = lambda rows, gather: {kind: x @ self.maps["predict"] for kind, x in rows.items()}
        return self


KINDS = ("image", "text", "joint", "crossed")


def features_of(seed):
    g = torch.Generator().manual_seed(seed)
    names = {f"{kind}_features" for kind in KINDS}
    values = {n: torch.randn(PAIRS, WIDTH, dtype=torch.float64, generator=g).requires_grad_() for n in sorted(names)}
    return {**values, "caption_ids": torch.tensor([1, 2, 3, 2, 4]), "paired": torch.ones(PAIRS, dtype=torch.bool)}


def naive_losses(method, features, targets, same=None):
    """Table 2, row by row."""
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
    return {n: naive_ctr(queries[n], keys[n], method.config.temperature, same) for n in method.config.losses}


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
def test_objective_equals_table_2_as_loops(tmp_path, changes):
    method = build(tmp_path, cls=Doubled, **PLAIN, **changes).mapped()
    features, targets = features_of(1), features_of(2)
    same = features["caption_ids"].tolist() if method.config.multi_positive else None
    terms = method.objective(features, targets, GATHER, START)
    expected = naive_losses(method, features, targets, same)
    for term in terms:
        torch.testing.assert_close(term.total / term.count, expected[term.name], rtol=1e-9, atol=0)
    inputs = [x for x in features.values() if x.is_floating_point()]
    ours, theirs = (
        torch.autograd.grad(total, inputs, allow_unused=True)
        for total in (sum(t.weight * t.total / t.count for t in terms), sum(expected.values()))
    )
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert all(x.grad is None for x in targets.values() if x.is_floating_point())


@pytest.mark.parametrize("name", ["mocov3", "mocov3_t02"])
def test_itc_is_mocov3s_loss_but_its_factor(oracles, tmp_path, name):
    oracle = oracles("mocov3")
    tau = oracle[f"{name}.par.T"].item()
    method = build(tmp_path, losses=("itc",), temperature=tau, **PLAIN)
    method._project = lambda projectors, rows, gather: rows
    method.predictor.forward = lambda rows, gather: rows
    get = {key: oracle[f"{name}.in.{key}"] for key in ("q1", "q2", "k1", "k2")}
    queries = {kind: get[key].requires_grad_() for kind, key in (("image_features", "q1"), ("text_features", "q2"))}
    targets = {"image_features": get["k1"], "text_features": get["k2"]}
    others = {"caption_ids": torch.arange(8), "paired": torch.ones(8, dtype=torch.bool)}
    (term,) = method.objective({**queries, **others}, targets, GATHER, START)
    loss = 4 * tau * term.total / term.count  # 2τ a term, and their sum instead of their mean
    loss.backward()
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"])
    for key, value in zip(("q1", "q2"), queries.values()):
        torch.testing.assert_close(value.grad, oracle[f"{name}.out.grad_{key}"])


# ---------------------------------------------------------------- one pass, masked; the copy sees it clean


def test_contrast_and_masked_losses_are_of_one_masked_pass_and_the_copy_sees_clean_input(tmp_path):
    method = build(tmp_path, **EVERY_LOSS)
    batch = with_mask_tokens(make_batch(method.view_plan, BATCH))
    view, caption = batch.images["image"], batch.texts["caption"]
    ratio = 0.1 + 0.4 * 3 / 10
    tower = method.tower
    for found, ids, masked in (
        (method.encode(batch, STEP), caption.ids, view.patch_ranks.flatten(1) < ratio),
        (method.encode_targets(batch, STEP), clean(caption), None),  # the copy's weights are the tower's at the start
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
            torch.testing.assert_close(found[f"{kind}_features"], value)
    assert masked is None
    assert not torch.equal(caption.ids, clean(caption))


def test_masked_losses_are_means_over_what_is_masked(tmp_path):
    """MLM and MIM of the input alone and of the joint sequence, from the hidden states and the ids and pixels of each place."""
    method = build(tmp_path)
    batch = with_mask_tokens(make_batch(method.view_plan, BATCH))
    view, caption = batch.images["image"], batch.texts["caption"]
    ranks = view.patch_ranks.flatten(1)
    caption.labels[:, 0] = -100  # a start token is never masked
    terms = forward_backward(method, batch, STEP, ALONE).terms
    masked, chosen = ranks < 0.22, caption.labels >= 0
    image, text = method.tower.embed_image(view.pixels, masked), method.tower.embed_text(caption.ids, caption.lengths)
    alone = method.tower(image), method.tower(text)
    both = method.tower(join(image, text))
    words = {"mlm_text": alone[1].words, "mlm_joint": both.words}
    for name, hidden in words.items():
        at_ids = torch.zeros(*caption.ids.shape, WIDTH, dtype=torch.float64)
        at_ids[:, 1:-1] = hidden
        logits = method.mlm_head(at_ids[chosen])
        assert logits.shape[1] == 50
        assert terms[name] == pytest.approx(F.cross_entropy(logits, caption.labels[chosen]).item())
    blocks = F.unfold(
        method.tower.normalise(view.pixels), 16, stride=16
    )  # [batch, 3 · 16 · 16, patch], channel by channel
    blocks = blocks.transpose(1, 2).unflatten(2, (3, 256)).transpose(2, 3).flatten(2)
    wanted = (blocks - blocks.mean(-1, keepdim=True)) / (blocks.var(-1, keepdim=True) + 1e-6).sqrt()
    for name, hidden in {"mim_image": alone[0].patches, "mim_joint": both.patches}.items():
        errors = (method.mim_head(hidden) - wanted)[masked]
        assert terms[name] == pytest.approx(errors.square().mean().item())
    weights = {
        t.name: t.weight
        for t in method.objective(method.encode(batch, STEP), method.encode_targets(batch, STEP), GATHER, STEP)
    }
    assert weights == {"itc": 1, "cmc": 1, "mlm_text": 0.5, "mlm_joint": 0.5, "mim_image": 0.5, "mim_joint": 0.5}


def test_texts_without_an_image_take_part_in_their_masked_loss_alone(tmp_path):
    """Beside two such texts the pairs' own terms are those of the pairs by themselves, and the texts' masked words count among all."""
    kept = torch.tensor([0, 2, 3, 5, 6, 7])
    method = build(tmp_path)
    batch = with_mask_tokens(make_batch(method.view_plan, BATCH))
    batch.has_image = torch.zeros(BATCH, dtype=torch.bool).index_fill(0, kept, True)
    mixed = forward_backward(method, batch, STEP, ALONE)
    pairs = forward_backward(build(tmp_path), batch[kept], STEP, ALONE)
    assert mixed.terms.keys() == pairs.terms.keys()
    for name in mixed.terms.keys() - {"mlm_text"}:
        assert mixed.terms[name] == pytest.approx(pairs.terms[name]), name
    assert mixed.terms["mlm_text"] != pytest.approx(pairs.terms["mlm_text"])
    batch.has_image = None
    everything = forward_backward(build(tmp_path), batch, STEP, ALONE)
    assert mixed.terms["mlm_text"] == pytest.approx(everything.terms["mlm_text"])

    batch.has_image = torch.zeros(BATCH, dtype=torch.bool)  # texts alone
    alone = forward_backward(method, batch, STEP, ALONE)
    assert alone.terms["mlm_text"] == pytest.approx(everything.terms["mlm_text"])
    assert alone.loss == pytest.approx(0.5 * alone.terms["mlm_text"])
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_the_share_of_masked_patches_rises_over_the_run(tmp_path):
    method = build(tmp_path)
    batch = make_batch(method.view_plan, 64)
    ranks = batch.images["image"].patch_ranks
    for step, ratio in ((START, 0.1), (StepInfo(5, 10), 0.3), (END, 0.5)):
        features = method.encode(batch, step)
        assert features["mim_image_count"].tolist() == (ranks < ratio).flatten(1).sum(1).tolist()
        method.objective(features, method.encode_targets(batch, step), GATHER, step)
        assert method.scalars()["mim_ratio"].item() == pytest.approx(ratio)


def test_a_caption_without_masked_words_and_an_image_without_masked_patches_count_nothing(tmp_path):
    method = build(tmp_path)
    batch = make_batch(method.view_plan, BATCH)
    batch.texts["caption"].labels[:] = -100
    batch.images["image"].patch_ranks[:] = 0.9
    result = forward_backward(method, batch, STEP, ALONE)
    assert math.isfinite(result.loss)
    assert [result.terms[f"{name}"] for name in ("mlm_text", "mlm_joint", "mim_image", "mim_joint")] == [0] * 4


# ---------------------------------------------------------------- slices, processes, settings

SETTINGS = [
    EVERY_LOSS,
    {"losses": ("itc",), "heads": "two"},
    {**EVERY_LOSS, "head_norm": "batch_apart"},
    {"head_norm": "layer", "pooling": "cls", **PLAIN},
    {"teacher": "none", "pooling": "balanced"},
    {"losses": ("cmc",), "mlm": False},
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_slices_of_every_other_setting(tmp_path, changes):
    whole = run_step(
        build(tmp_path, **changes), batch := make_batch(build(tmp_path, **changes).view_plan, BATCH), ALONE
    )
    assert_complete(build(tmp_path, **changes), whole)
    assert_equal_steps(whole, run_step(build(tmp_path, **changes), batch, ALONE, [slice(0, 5), slice(5, 8)]))


@pytest.mark.slow
def test_every_other_setting_on_two_processes(tmp_path):
    cases = [("oner", "transformer", changes, None, [slice(0, 3), slice(3, 4)]) for changes in SETTINGS]
    ranks = on_two_processes(half_steps, tmp_path, cases)
    for number, changes in enumerate(SETTINGS):
        method = build(tmp_path, **changes)
        whole = run_step(method, batch_for(method), ALONE)
        for rank in ranks:
            assert_equal_steps(whole, rank[number])


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_of_the_tables_takes_a_step(tmp_path, name):
    config = ABLATIONS[name]
    changes = {key: value for key, value in vars(config).items() if key not in ("head_hidden", "head_dim")}
    method = build(tmp_path, **changes).train()
    optimisers = build_optimisers(method.parameter_groups(), OptimiserConfig(), method)
    result = forward_backward(method, make_batch(method.view_plan, BATCH), STEP, ALONE)
    masked = {f"mlm_{kind}" for kind in ("text", "joint") if "no-mlm" not in name}
    masked |= {f"mim_{kind}" for kind in ("image", "joint") if "no-mim" not in name}
    contrasts = {word for word in name.split("-") if word in ("itc", "xmc", "cic", "cmc")} or {"itc", "cmc"}
    assert result.terms.keys() == contrasts | masked
    assert math.isfinite(result.loss)
    assert (method.momentum_tower is None) == (name == "e-no-teacher")
    assert method.view_plan.images == {"image": STRONG if name == "e-strong-augmentation" else WEAK}
    before = {n: p.clone() for n, p in method.named_parameters() if p.requires_grad}
    optimisers.set_lr(4, 10)
    optimisers.step()
    method.after_step(result.features, result.targets, GATHER, STEP)
    assert all(not torch.equal(before[n], p) for n, p in method.named_parameters() if n in before and p.grad.any())


def test_nothing_is_built_that_is_not_trained(tmp_path):
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


# ---------------------------------------------------------------- the copy


@pytest.mark.parametrize(
    ("given", "steps", "momentum"), [(None, 10**6, 0.996), (None, 2000, 1 - 113 / 2000), (0.99, 2000, 0.99)]
)
def test_the_copy_follows_with_a_fixed_momentum(tmp_path, given, steps, momentum):
    method = build(tmp_path, teacher_momentum=given)
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


def train_on_few_pairs(folder, **changes):
    """60 steps on 16 pairs of noise. Gives the method and, of both directions, how many pairs find each other: by the projector's
    embeddings, and as the contrast compares them, the predictor's output with the projector's."""
    method = build(folder, **PLAIN, **changes).float().train()
    batch = make_batch(method.view_plan, 16)
    optimisers = build_optimisers(method.parameter_groups(), OptimiserConfig(lr=3e-3, weight_decay=0.1), method)
    for number in range(60):
        step = StepInfo(number, 60)
        optimisers.set_lr(number, 60)
        result = forward_backward(method, batch, step, ALONE)
        optimisers.step()
        move_statistics(method, ALONE, keep=True)
        method.after_step(result.features, result.targets, GATHER, step)
        optimisers.zero_grad()
    method.eval()
    caption = batch.texts["caption"]
    with torch.no_grad():
        embeds = {"image": method.encode_image(batch.images["image"].pixels)}
        embeds["text"] = method.encode_text(caption.ids, caption.lengths)
        rows = {kind: result.features[f"{kind}_features"] for kind in ("image", "text")}
        z = method._project(method.projectors, rows, GATHER)
        q = z if method.predictor is None else method.predictor(z, GATHER)
        z, q = ({kind: F.normalize(x, dim=-1) for kind, x in values.items()} for values in (z, q))
    similarities = embeds["image"] @ embeds["text"].T, q["image"] @ z["text"].T + z["image"] @ q["text"].T
    own = torch.arange(16)
    return [((s.argmax(0) == own).sum() + (s.argmax(1) == own).sum()).item() / 32 for s in similarities]


def test_itc_alone_leaves_the_modalities_apart(tmp_path):
    """Naive ITC fits its loss by a predictor that exchanges the modalities; a mixture, which it must leave as it is, prevents that, and
    two projectors without a predictor do (the order of Table 1)."""
    (naive, fitted), (two, _), (mixed, _) = (
        train_on_few_pairs(tmp_path, **changes)
        for changes in ({"losses": ("itc",)}, {"losses": ("itc",), "heads": "two"}, {})
    )
    assert fitted > 0.7
    assert naive < 0.3
    assert two > 0.8
    assert mixed > naive + 0.15


def test_the_modality_gap_is_followed(tmp_path):
    method = build(tmp_path, **PLAIN)
    assert method.scalars() == {"logit_scale": torch.tensor(5.0)}
    features = features_of(1)
    method.objective(features, features_of(2), GATHER, START)
    images, texts = (
        [row / sum(v * v for v in row) ** 0.5 for row in features[f"{kind}_features"].detach()]
        for kind in ("image", "text")
    )
    gap = [sum(i[k] for i in images) / PAIRS - sum(t[k] for t in texts) / PAIRS for k in range(WIDTH)]
    assert method.scalars()["modality_gap"].item() == pytest.approx(math.sqrt(sum(g * g for g in gap)), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"head_norm": "batch_apart"}, {"head_norm": "layer", "pooling": "balanced"}])
def test_images_texts_and_both_are_embedded_alike(tmp_path, changes):
    method = build(tmp_path, **changes).eval()
    batch = make_batch(method.view_plan, 4)
    pixels, caption = batch.images["image"].pixels, batch.texts["caption"]
    given = pixels, caption.ids, caption.lengths
    embeds = {
        "image": method.encode_image(pixels),
        "text": method.encode_text(*given[1:]),
        "joint": method.encode_joint(*given),
    }
    for kind, value in embeds.items():
        assert value.shape == (4, 16)
        torch.testing.assert_close(value.norm(dim=-1), torch.ones(4, dtype=torch.float64))
        rows = {"image": given[:1], "text": given[1:], "joint": given}[kind]
        alone = {"image": method.encode_image, "text": method.encode_text, "joint": method.encode_joint}[kind]
        torch.testing.assert_close(alone(*(x[1:3] for x in rows)), value[1:3])  # whatever else is in the batch
    assert (embeds["joint"] - embeds["image"]).norm() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"losses": ("itc",), "heads": "two"}, {"losses": ("itc", "xmc"), "head_norm": "batch_apart"}]
)
def test_heads_that_tell_modalities_apart_have_no_joint_embedding(tmp_path, changes):
    method = build(tmp_path, **changes).eval()
    batch = make_batch(method.view_plan, 4)
    caption = batch.texts["caption"]
    with pytest.raises(UserError, match="no embedding of both"):
        method.encode_joint(batch.images["image"].pixels, caption.ids, caption.lengths)


def test_hidden_states_for_localisation_lie_where_patches_and_tokens_do(tmp_path):
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


def test_the_loaders_patch_ranks_are_on_the_models_grid(tmp_path, pairs):
    source = open_source(str(pairs))
    tokenizer = train_bpe((c for i in range(len(source)) for c in source.record(i).captions), 300)
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**TRANSFORMER, "vision_cfg": {**TRANSFORMER["vision_cfg"], "patch_size": 8}}))
    config = TrainConfig(
        "oner", OneRConfig(head_hidden=16, head_dim=8), model=str(path), context_length=12, image_size=48
    )
    method = runs.build_method(config, tokenizer)
    assert (runs.image_size(method), runs.patch_grid(method)) == (48, (6, 6))
    loader = PairLoader(
        source, range(len(source)), method.view_plan, tokenizer, image_size=runs.image_size(method), context_length=12,
        batch_size=8, seed=0, patch_grid=runs.patch_grid(method),
    )  # fmt: skip
    (loaded,) = itertools.islice(loader.batches(0, 1), 1)
    view, caption = loaded.batch.images["image"], loaded.batch.texts["caption"]
    assert view.patch_ranks.shape == (8, 6, 6)
    assert (clean(caption) < tokenizer.vocab_size).all()
    features = method.encode(loaded.batch, END)
    assert features["mim_image_count"].sum() == (view.patch_ranks < 0.5).sum()
    assert features["mlm_text_count"].sum() == (caption.labels >= 0).sum()


def test_methods_with_two_towers_mask_no_patches(tmp_path):
    clip = build_method("clip", tmp_path)
    assert (runs.image_size(clip), runs.patch_grid(clip)) == (32, None)


def test_a_second_stage_takes_the_weights_to_a_larger_size(tmp_path):
    method = build(tmp_path)
    run_step(method, make_batch(method.view_plan, BATCH), ALONE)  # the copy is another by now
    larger = OneR(method.config, TowerSpec(str(tmp_path / "model.json"), 50, 12, image_size=64)).double()
    larger.load_state_dict(method.state_dict())
    assert runs.patch_grid(larger) == (4, 4)
    batch = make_batch(larger.view_plan, BATCH, image_size=64)
    batch.images["image"].patch_ranks = torch.rand(BATCH, 4, 4)
    result = forward_backward(larger, batch, STEP, ALONE)
    assert math.isfinite(result.loss)
    caption = batch.texts["caption"]
    same = [m.eval().encode_text(clean(caption), caption.lengths) for m in (method, larger)]
    torch.testing.assert_close(*same, rtol=0, atol=0)


def test_recipes_are_the_papers():
    paper = RECIPES["oner-cc3m"](2_900_000)
    assert paper.method_config == OneRConfig()
    assert (paper.model, paper.epochs, paper.batch_size) == ("ViT-B-16", 40, 4096)
    assert (paper.optimiser.lr, paper.optimiser.weight_decay) == (pytest.approx(1.6e-3), 0.1)
    assert paper.optimiser.num_warmup_steps(4000) == 400
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
        ("temperature", 0.0),
        ("teacher_momentum", 1.1),
        ("mlm_weight", -1.0),
        ("mask_p", 0.0),
        ("mim_ratio", (0.0, 0.5)),
    ],
)
def test_senseless_values_are_refused(field, value):
    with pytest.raises(UserError, match=f"^{field} is "):
        OneRConfig(**{field: value})


def test_statistics_apart_need_images_and_texts_alone():
    with pytest.raises(UserError, match="without itc"):
        OneRConfig(losses=("cmc",), head_norm="batch_apart")
