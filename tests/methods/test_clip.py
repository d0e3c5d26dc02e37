import math

import pytest
import torch
from helpers.builders import build_method, make_batch

from coalign.training.distributed import RankGather, World
from coalign.types import StepInfo

GATHER, STEP = RankGather(World(0, 1, torch.device("cpu"))), StepInfo(0, 10)


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
