import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from helpers.builders import BATCH_NORM, TRANSFORMER, build_method, make_batch
from helpers.steps import ALONE, BATCH, MODELS, STEP, assert_complete, assert_equal_steps, run_step
from torch.nn import functional as F

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.mcd.config import RECIPES, MCDConfig
from coalign.methods.mcd.method import MCD
from coalign.methods.mcd.tables import TABLE_5
from coalign.optim import build_optimizers
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward, move_statistics
from coalign.training.trainer import Trainer
from coalign.types import STRONG, WEAK, StepInfo

GATHER, PAIRS = RankGather(ALONE), 5
START, HALF, END = StepInfo(0, 10), StepInfo(5, 10), StepInfo(10, 10)
MODES = [{"norm": norm, "noisy_pairs": pairs} for norm in ("squared", "absolute") for pairs in ("pairs", "texts")]


def unit(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


@pytest.fixture
def features():
    """Embeds of ṽ, v and t, and the MLM sums of each caption."""
    return {
        "embeds": unit(PAIRS, 3, 8, seed=1).requires_grad_(),
        "caption_ids": torch.tensor([1, 2, 3, 2, 4]),
        "mlm_total": torch.tensor([1.5, 0.0, 2.0, 4.0, 0.5], dtype=torch.float64),
        "mlm_count": torch.tensor([1, 0, 2, 3, 1]),
    }


def random_teacher(method):
    """Returns teacher embeds that differ from the student's, for the views that the method needs."""
    config = method.config
    views = slice(0, 2) if config.distill_positive or config.distill_negative else slice(1, 2)
    return {"teacher_embeds": unit(PAIRS, 2, 8, seed=2)[:, views]} if config.distills else {}


def with_random_scales(method):
    for parameter in (method.domain_similarity.log_logit_scales, method.domain_similarity.offsets):
        if parameter is not None:
            parameter.data += torch.linspace(-0.3, 0.4, len(parameter), dtype=torch.float64)
    return method


def loss_of(terms):
    return sum(term.weight * term.total / term.count for term in terms)


def naive_contrast(method, embeds, views, weights, labels=()):
    """Computes UniCLIP's Eq. 12 without augmentation encoding with loops over embeddings, times (V + U)²/3."""
    terms = []
    members = list(itertools.product(range(len(embeds)), views))

    def x(i, j):
        number = (i[1] == 2) + (j[1] == 2) if method.domain_similarity.offsets is not None else 0
        offset = method.domain_similarity.offsets[number] if method.domain_similarity.offsets is not None else 0.0
        return (embeds[i] @ embeds[j] - offset) * method.domain_similarity.log_logit_scales[number].exp()

    for i in members:
        negatives = [n for n in members if n[0] != i[0] and all(x[n[0]] != x[i[0]] for x in labels)]
        negative_sum = sum(torch.exp(x(i, n)) for n in negatives)
        for p in members:
            if p[0] == i[0]:
                weight = weights[(i[1] == 2) + (p[1] == 2)]
                terms.append(-weight * torch.log(torch.exp(x(i, p)) / (torch.exp(x(i, p)) + negative_sum)))
    return torch.stack(terms).mean() * len(views) ** 2 / 3


def naive_distillation(config, embeds, teacher):
    """Computes Eq. 10 with loops: the mean of each term over its indices, from explicit distances."""
    augmented, v, t = embeds.unbind(1)
    teacher_augmented, teacher_v, fixed = teacher[:, 0], teacher[:, -1], t.detach()

    def log_distance(a, b):
        return torch.log(torch.sqrt(((a - b) ** 2).sum() + 1e-4 / len(a)) + 1e-6)

    def log_ratio(ab, cd, teacher_ab, teacher_cd):
        error = log_distance(*ab) - log_distance(*cd) - log_distance(*teacher_ab) + log_distance(*teacher_cd)
        return error**2 if config.norm == "squared" else abs(error)

    terms = {"positive": [], "negative": [], "noisy": []}
    for i, j in itertools.product(range(len(v)), range(len(v))):
        if i == j or config.distill_negative:
            terms["positive" if i == j else "negative"].append(
                log_ratio(
                    (v[i], t[j]), (augmented[i], t[j]), (teacher_v[i], fixed[j]), (teacher_augmented[i], fixed[j])
                )
            )
        if i != j:
            image = j if config.noisy_pairs == "pairs" else i
            terms["noisy"].append(
                log_ratio((v[i], t[i]), (v[image], t[j]), (teacher_v[i], fixed[i]), (teacher_v[image], fixed[j]))
            )
    enabled = {name: getattr(config, f"distill_{name}") for name in terms}
    return sum(torch.stack(terms[name]).mean() for name in terms if enabled[name])


def naive_loss(method, features, teacher, step):
    """Computes Eq. 13."""
    config, embeds = method.config, features["embeds"]
    labels = [features["caption_ids"]] * config.multi_positive
    labels += [features["group_ids"]] if "group_ids" in features else []
    weight = 0.5 - 0.5 * math.cos(math.pi * step.step / step.total_steps)
    all_views = naive_contrast(method, embeds, (0, 1, 2), (1 / 4, 1 / 4, 1), labels)
    original = naive_contrast(method, embeds, (1, 2), (1, 1 / 2, 1), labels)
    distillation = naive_distillation(config, embeds, teacher["teacher_embeds"]) if config.distills else 0.0
    mlm = 0.2 * (8 / 7) if config.mlm else 0.0
    if not config.progressive:
        return all_views + distillation + mlm
    return (1 - weight) * all_views + weight * (original + distillation) + mlm


SETTINGS = [
    *MODES,
    {"domain_similarity": False},
    {"multi_positive": True},
    {"progressive": False},
    {"mlm": False},
    {"distill_positive": False},
    {"distill_negative": False},
    {"distill_noisy": False},
    {"distill_positive": False, "distill_negative": False},
    {"distill_positive": False, "distill_negative": False, "distill_noisy": False},
]


@pytest.mark.parametrize("step", [START, HALF, END], ids=["start", "half", "end"])
@pytest.mark.parametrize("groups", [None, [7, 7, 8, 9, 8]])
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_objective_equals_naive_loops(tmp_path, features, changes, groups, step):
    method = with_random_scales(build_method("mcd", tmp_path, **changes))
    teacher = random_teacher(method)
    if groups is not None:
        features["group_ids"] = torch.tensor(groups)
    ours = loss_of(method.objective(features, teacher, GATHER, step))
    theirs = naive_loss(method, features, teacher, step)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    inputs = [
        x
        for x in (features["embeds"], method.domain_similarity.log_logit_scales, method.domain_similarity.offsets)
        if x is not None
    ]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_loss_starts_as_mp_nce_and_ends_without_the_augmented_view(tmp_path, features):
    method = with_random_scales(build_method("mcd", tmp_path, mlm=False))
    embeds, teacher = features["embeds"], random_teacher(method)
    first = loss_of(method.objective(features, teacher, GATHER, START))
    torch.testing.assert_close(first, naive_contrast(method, embeds, (0, 1, 2), (1 / 4, 1 / 4, 1)))
    ramp_only = with_random_scales(build_method("mcd", tmp_path, **vars(TABLE_5["ramp-only, no mlm"])))
    last = loss_of(ramp_only.objective(features, {}, GATHER, END))
    (gradient,) = torch.autograd.grad(last, embeds)
    assert gradient[:, 0].abs().max() == 0
    assert gradient[:, 1:].abs().min() > 0
    torch.testing.assert_close(last, naive_contrast(method, embeds, (1, 2), (1, 1 / 2, 1)))
    weights = {t.name: t.weight for t in method.objective(features, teacher, GATHER, HALF)}
    assert weights == pytest.approx(dict.fromkeys(weights, 0.5))
    assert set(weights) == {"contrastive", "contrastive_original", "positive", "negative", "noisy"}


class ReplayGather:
    """`gather` of one rank of several, which returns the tensors recorded for the whole batch."""

    def __init__(self, rows, recorded):
        self.rows, self.recorded = rows, iter(recorded)

    def __call__(self, tensor):
        whole = next(self.recorded)
        torch.testing.assert_close(tensor, whole[self.rows])
        return whole

    def global_indices(self, tensor):
        return torch.arange(PAIRS)[self.rows]


class RecordingGather(RankGather):
    def __init__(self):
        super().__init__(ALONE)
        self.recorded = []

    def __call__(self, tensor):
        self.recorded.append(tensor)
        return tensor


@pytest.mark.parametrize("changes", [*MODES, {"multi_positive": True}], ids=str)
def test_losses_of_ranks_add_up(tmp_path, features, changes):
    method, record = with_random_scales(build_method("mcd", tmp_path, **changes)), RecordingGather()
    teacher = random_teacher(method)
    whole = method.objective(features, teacher, record, HALF)
    parts = []
    for rows in (slice(0, 3), slice(3, 5)):
        local, targets = ({name: x[rows] for name, x in values.items()} for values in (features, teacher))
        parts.append(method.objective(local, targets, ReplayGather(rows, record.recorded), HALF))
    counts = [sum(float(term.count) for term in terms) for terms in zip(*parts)]
    assert counts == [float(term.count) for term in whole]
    summed = sum(term.weight * term.total / count for terms, count in zip(zip(*parts), counts) for term in terms)
    torch.testing.assert_close(summed, loss_of(whole))
    inputs = [features["embeds"], method.domain_similarity.log_logit_scales, method.domain_similarity.offsets]
    expected = torch.autograd.grad(loss_of(whole), inputs, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(summed, inputs), expected):
        torch.testing.assert_close(ours, theirs)


def test_degenerate_batches_are_finite(tmp_path):
    method = build_method("mcd", tmp_path, mlm=False)
    same = unit(1, 1, 8, seed=3).expand(4, 3, 8)
    for embeds in (unit(1, 3, 8, seed=3), same, torch.zeros(4, 3, 8, dtype=torch.float64)):
        embeds = embeds.clone().requires_grad_()
        teacher = {"teacher_embeds": embeds.detach()[:, :2]}
        terms = method.objective({"embeds": embeds, "caption_ids": torch.arange(4)}, teacher, GATHER, HALF)
        total = sum(term.total for term in terms)
        assert torch.isfinite(total)
        assert torch.isfinite(torch.autograd.grad(total, embeds)[0]).all()
        assert {t.name: float(t.count) for t in terms}["noisy"] == len(embeds) * (len(embeds) - 1)


# ---------------------------------------------------------------- the teacher


class PerturbedTeacher(MCD):
    """MCD with a teacher that differs from the student, as in the middle of a run, so that log-ratios are not zero."""

    def __init__(self, config, towers):
        super().__init__(config, towers)
        g = torch.Generator().manual_seed(5)
        for parameter in self.teacher.parameters() if self.teacher is not None else ():
            parameter += parameter.abs().mean() * torch.randn(parameter.shape, generator=g)


@pytest.mark.parametrize("changes", MODES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_with_a_perturbed_teacher(tmp_path, model, changes):
    def step(slices=None):
        method = build_method("mcd", tmp_path, MODELS[model], cls=PerturbedTeacher, **changes)
        result = run_step(method, make_batch(method.view_plan, BATCH), ALONE, slices)
        assert_complete(method, result)
        return result

    assert_equal_steps(step(), step([slice(0, 4), slice(4, 6), slice(6, 8)]))


def test_perturbing_the_teacher_changes_the_step(tmp_path):
    """Ensures that the test above compares nonzero losses."""
    losses = []
    for cls in (MCD, PerturbedTeacher):
        method = build_method("mcd", tmp_path, cls=cls)
        result = forward_backward(method, make_batch(method.view_plan, BATCH), STEP, ALONE)
        losses.append({name: result.terms[name] for name in ("positive", "negative", "noisy")})
    assert all(abs(value) < 1e-12 for value in losses[0].values())
    assert all(value > 1e-4 for value in losses[1].values()), losses


@pytest.mark.parametrize("model", MODELS)
def test_teacher_equals_student_at_the_first_step(tmp_path, model):
    method = build_method("mcd", tmp_path, MODELS[model]).train()
    batch = make_batch(method.view_plan, BATCH)
    with torch.no_grad():
        student, teacher = method.encode(batch, START)["embeds"], method.encode_targets(batch, START)["teacher_embeds"]
    torch.testing.assert_close(teacher, student[:, :2], rtol=0, atol=0)


@dataclass
class Loaded:
    batch: object
    bad: list = field(default_factory=list)


def test_teacher_is_updated_except_on_skipped_steps(tmp_path):
    """Eq. 12 in the trainer, with non-finite values in the third step."""
    method = build_method("mcd", tmp_path, BATCH_NORM)
    states = []

    def batches(start, stop):
        for step in range(start, stop):
            states.append({name: value.clone() for name, value in method.state_dict().items()})
            batch = make_batch(method.view_plan, BATCH, seed=step)
            if step == 2:
                batch.images["image"].pixels = batch.images["image"].pixels.double() * float("nan")
            yield Loaded(batch)

    settings = TrainConfig(
        method="mcd", method_config=method.config, batch_size=BATCH, precision="fp32", evals=0, save_every=1000,
        optimizer=OptimizerConfig(lr=1e-2, warmup_fraction=0),
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    result = Trainer(method, settings, ALONE, tmp_path / "run", batches=batches, num_pairs=BATCH, total_steps=5).fit()
    assert result.skipped_steps == 1
    states.append(method.state_dict())
    assert method.scalars()["teacher_momentum"].item() == pytest.approx(0.95 - 0.05 * math.cos(math.pi * 4 / 5))
    names = [name.removeprefix("teacher.") for name in states[0] if name.startswith("teacher.")]
    assert {"projection.weight"} <= set(names)
    assert any(name.endswith("running_var") for name in names)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        momentum = 0.95 - 0.05 * math.cos(math.pi * step / 5)  # starts at 0.9 in a run of five steps
        for name in names:
            teacher, student = before[f"teacher.{name}"], after[f"image.{name}"]
            if step == 2:
                expected = teacher
            elif student.is_floating_point():
                expected = momentum * teacher + (1 - momentum) * student
            else:
                expected = student
            torch.testing.assert_close(after[f"teacher.{name}"], expected, msg=f"step {step}: {name}")
    assert (states[-1]["teacher.projection.weight"] - states[0]["teacher.projection.weight"]).abs().max() > 0


def test_teacher_is_checkpointed_and_not_trained(tmp_path):
    method = build_method("mcd", tmp_path, cls=PerturbedTeacher)
    trained = {id(p) for group in method.parameter_groups().values() for p in group}
    assert not any(p.requires_grad or id(p) in trained for p in method.teacher.parameters())
    other = build_method("mcd", tmp_path)
    batch = make_batch(method.view_plan, 4)
    expected = method.encode_targets(batch, START)["teacher_embeds"]
    assert not torch.allclose(other.encode_targets(batch, START)["teacher_embeds"], expected)
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other.encode_targets(batch, START)["teacher_embeds"], expected, rtol=0, atol=0)


def test_teacher_passes_do_not_update_its_running_statistics(tmp_path):
    method = build_method("mcd", tmp_path, BATCH_NORM).train()
    before = {name: buffer.clone() for name, buffer in method.teacher.named_buffers()}
    forward_backward(method, make_batch(method.view_plan, BATCH), STEP, ALONE)
    move_statistics(method, ALONE, keep=True)  # updates the student's
    for name, buffer in method.teacher.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    moved = dict(method.image.named_buffers())
    assert any(not torch.equal(before[name], moved[name]) for name in before if "running" in name)


def test_no_teacher_without_distillation(tmp_path):
    method = build_method("mcd", tmp_path, **vars(TABLE_5["ramp-only"]))
    assert method.teacher is None
    assert not any("teacher" in name for name in method.state_dict())
    assert method.encode_targets(make_batch(method.view_plan, 4), START) == {}


@pytest.mark.parametrize(
    ("setting", "steps", "momentum"), [(None, 10**6, 0.996), (None, 2000, 1 - 113 / 2000), (0.99, 2000, 0.99)]
)
def test_teacher_momentum_by_run_length_or_setting(tmp_path, features, setting, steps, momentum):
    method = build_method("mcd", tmp_path, teacher_momentum=setting)
    for step, expected in ((0, momentum), (steps // 2, (1 + momentum) / 2)):
        method.objective(features, random_teacher(method), GATHER, StepInfo(step, steps))
        assert method.scalars()["teacher_momentum"].item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- views, text, evaluation


@pytest.mark.parametrize("contrast_masked_text", [True, False])
def test_training_and_inference_embeddings_agree(tmp_path, contrast_masked_text):
    method = build_method("mcd", tmp_path, cls=PerturbedTeacher, contrast_masked_text=contrast_masked_text)
    batch = make_batch(method.view_plan, 4)
    features, caption = method.encode(batch, START), batch.texts["caption"]
    student = [method.encode_image(batch.images[name].pixels) for name in ("augmented", "image")]
    expected = torch.stack([*student, method.encode_text(caption.ids, caption.lengths)], dim=1)
    torch.testing.assert_close(features["embeds"], expected)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(4, 3, dtype=torch.float64))


def test_views_match_the_paper(tmp_path):
    plans = {one: build_method("mcd", tmp_path, contrast_masked_text=one).view_plan for one in (True, False)}
    assert plans[True].images == {"augmented": STRONG, "image": WEAK}
    assert {name: policy.mask_p for name, policy in plans[True].texts.items()} == {"caption": 0.15}
    masked = {name: policy.mask_p for name, policy in plans[False].texts.items()}
    assert masked == {"caption": 0, "masked_caption": 0.15}
    method = build_method("mcd", tmp_path, mlm=False)
    assert {name: policy.mask_p for name, policy in method.view_plan.texts.items()} == {"caption": 0}
    assert method.mlm_head is None


@pytest.mark.parametrize("contrast_masked_text", [True, False])
def test_mlm_is_a_mean_over_masked_tokens(tmp_path, contrast_masked_text):
    method = build_method("mcd", tmp_path, contrast_masked_text=contrast_masked_text)
    batch = make_batch(method.view_plan, BATCH)
    masked = batch.texts[method.masked_view]
    chosen = masked.labels >= 0
    masked.ids[chosen] = 50  # the id of the mask token, after the vocabulary
    tokens = method.text(masked.ids, masked.lengths, with_tokens=True).tokens
    logits = tokens[chosen] @ method.mlm_head.decoder.weight.T + method.mlm_head.decoder.bias
    result = forward_backward(method, batch, STEP, ALONE)
    assert result.terms["mlm"] == pytest.approx(F.cross_entropy(logits, masked.labels[chosen]).item())
    masked.labels[:] = -100  # no targets: zero loss, and no gradient for the head
    method.zero_grad()
    result = forward_backward(method, batch, STEP, ALONE)
    assert result.terms["mlm"] == 0
    assert math.isfinite(result.loss)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in method.mlm_head.parameters())


def test_scale_initialization_and_clamp(tmp_path):
    method = build_method("mcd", tmp_path)
    assert method.scalars()["logit_scale"].item() == pytest.approx(1 / 0.07)
    method.domain_similarity.log_logit_scales.data[:] = torch.tensor([9.0, -1.0, 2.0])
    method.after_step({}, {}, GATHER, START)
    assert method.domain_similarity.log_logit_scales.tolist() == pytest.approx([math.log(100), 0.0, 2.0])
    batch = make_batch(method.view_plan, BATCH)
    forward_backward(method, batch, HALF, ALONE)
    scalars = method.scalars()
    assert scalars["lambda"].item() == pytest.approx(0.5)
    assert abs(scalars["log_distance_to_teacher"].item()) < 1e-12
    assert {name for name in scalars if name.startswith("offset")} == {
        "offset_image_image", "offset_image_text", "offset_text_text"
    }  # fmt: skip


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", TABLE_5)
def test_every_row_of_table_5_trains_a_step(tmp_path, name):
    config = TABLE_5[name]
    method = build_method("mcd", tmp_path, TRANSFORMER, **vars(config)).train()
    optimizers = build_optimizers(method.parameter_groups(), OptimizerConfig(), method)
    result = forward_backward(method, make_batch(method.view_plan, BATCH), STEP, ALONE)
    expected = {"contrastive"}
    expected |= {"contrastive_original"} if "mp-nce" not in name else set()
    expected |= {word for word in ("positive", "negative", "noisy") if word in name}
    expected |= {"mlm"} if "no mlm" not in name else set()
    assert result.terms.keys() == expected
    assert (method.teacher is not None) == ("positive" in name)
    before = {n: p.clone() for n, p in method.named_parameters() if p.requires_grad}
    optimizers.set_lr(4, 10)
    optimizers.step()
    method.after_step(result.features, result.targets, GATHER, STEP)
    assert math.isfinite(result.loss)
    assert any(not torch.equal(before[n], p) for n, p in method.named_parameters() if n in before)


def test_recipes_match_the_paper():
    cc3m, yfcc15m = RECIPES["mcd-cc3m"](2_900_000), RECIPES["mcd-yfcc15m"](15_000_000)
    assert (cc3m.model, cc3m.epochs, cc3m.optimizer.lr, cc3m.optimizer.weight_decay) == ("ViT-B-16", 40, 5e-4, 0.5)
    assert (yfcc15m.model, yfcc15m.epochs, yfcc15m.batch_size) == ("ViT-B-32", 32, 4096)
    assert (yfcc15m.optimizer.lr, yfcc15m.optimizer.weight_decay) == (1e-3, 0.2)
    assert cc3m.method_config == yfcc15m.method_config == MCDConfig() == TABLE_5["positive+negative+noisy"]
    assert RECIPES["mcd"](500).method_config == MCDConfig(multi_positive=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("max_logit_scale", 0.5),
        ("teacher_momentum", 1.1),
        ("mlm_weight", -1.0),
        ("mask_p", 0.0),
        ("norm", "cubed"),
        ("noisy_pairs", "images"),
    ],
)
def test_invalid_settings_are_rejected(field, value):
    with pytest.raises(UserError, match=f"^{field} is "):
        MCDConfig(**{field: value})
