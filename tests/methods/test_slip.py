import pytest
import torch
from helpers.builders import build_method, make_batch
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.methods import recipe
from coalign.methods.slip.config import SLIPConfig
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.types import STRONG, WEAK, StepInfo

WORLD = World(0, 1, torch.device("cpu"))
GATHER, STEP = RankGather(WORLD), StepInfo(0, 10)


def loss(terms):
    return sum(term.weight * term.total / term.count for term in terms)


@pytest.mark.parametrize("name", ["slip_total", "slip_total_half"])
def test_objective_equals_released_code(oracles, tmp_path, name):
    oracle = oracles("slip")
    slip = build_method("slip", tmp_path, ssl_scale=oracle[f"{name}.par.ssl_scale"].item())
    slip.logit_scale.log.data[0] = oracle[f"{name}.in.log_scale"]
    slip.ssl_head.forward = lambda x, sum_over_ranks: x  # the oracle's inputs are outputs of the head
    raw = {key: oracle[f"{name}.in.{key}"].requires_grad_() for key in ("image", "text", "aug1", "aug2")}
    total = loss(
        slip.objective(
            {
                "image_embeds": F.normalize(raw["image"], dim=-1),
                "text_embeds": F.normalize(raw["text"], dim=-1),
                "ssl_1_features": raw["aug1"],
                "ssl_2_features": raw["aug2"],
                "caption_ids": torch.arange(8),
            },
            {},
            GATHER,
            STEP,
        )
    )
    total.backward()
    torch.testing.assert_close(total.detach().squeeze(), oracle[f"{name}.out.loss"])
    for key, value in raw.items():
        torch.testing.assert_close(value.grad, oracle[f"{name}.out.grad_{key}"])
    torch.testing.assert_close(slip.logit_scale.log.grad[0], oracle[f"{name}.out.grad_log_scale"])


def test_clip_term_equals_clip_and_has_its_own_view(tmp_path):
    slip, clip = (build_method(name, tmp_path) for name in ("slip", "clip"))
    slip.load_state_dict(clip.state_dict(), strict=False)
    assert slip.view_plan.images == {"image": WEAK, "ssl_1": STRONG, "ssl_2": STRONG}
    batch = make_batch(slip.view_plan, 6)
    (ours, _), (theirs,) = (m.objective(m.encode(batch, STEP), {}, GATHER, STEP) for m in (slip, clip))
    torch.testing.assert_close(ours.total, theirs.total)


def test_ssl_head_takes_features_before_the_projection(tmp_path):
    """NT-Xent has gradients for the trunk, but not for CLIP's projection or the text tower."""
    slip = build_method("slip", tmp_path)
    _, ssl = slip.objective(slip.encode(make_batch(slip.view_plan, 6), STEP), {}, GATHER, STEP)
    ssl.total.backward()
    trained = {name for name, p in slip.named_parameters() if p.grad is not None}
    assert not any(name.startswith(("text.", "image.projection", "log_")) for name in trained)
    assert any(name.startswith("image.trunk") for name in trained)


def test_feature_spread_is_logged(tmp_path):
    slip = build_method("slip", tmp_path)
    result = forward_backward(slip, make_batch(slip.view_plan, 6), STEP, WORLD)
    slip.after_step(result.features, result.targets, GATHER, STEP)
    assert 0 < slip.scalars()["ssl_features_std"].item() < 1.1


def test_recipes():
    assert recipe("slip")(7_000).method_config.ssl_hidden == 512
    assert recipe("slip")(2_000_000).method_config == SLIPConfig(multi_positive=True)
    paper = recipe("slip-cc3m")(3_000_000)
    assert (paper.optimizer.lr, paper.optimizer.weight_decay, paper.batch_size) == (3e-3, 0.1, 4096)


@pytest.mark.parametrize("invalid", [{"ssl_temperature": 0}, {"ssl_scale": -1}, {"ssl_hidden": 0}])
def test_invalid_settings_are_rejected(invalid):
    with pytest.raises(UserError, match=next(iter(invalid))):
        SLIPConfig(**invalid)
