"""What a search draws, how a run takes it, and the curve of the best of k trials."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from coalign.config import RoleConfig
from coalign.methods import recipe, recipes
from coalign.methods.search import Search, Settings, best_of, with_settings
from coalign.methods.table import parts
from coalign.types import AugmentationPolicy


def test_draws_depend_on_the_search_alone_and_stay_in_its_ranges():
    search = Search(epochs=(20, 40), trials=200)
    draws = search.draws()
    assert draws == Search(epochs=(1,), trials=200).draws()
    assert draws[:12] == Search(epochs=(20, 40)).draws()
    assert draws != replace(search, seed=1).draws()
    for name in ("lr_factor", "weight_decay", "crop"):
        low, high = getattr(search, name)
        values = [getattr(each, name) for each in draws]
        assert low <= min(values) < max(values) <= high
    assert np.median([each.lr_factor for each in draws]) == pytest.approx(1, rel=0.25)  # log-uniform


def test_the_first_trial_can_have_the_arms_own_settings():
    search = Search(epochs=(1,), trials=4, own_first=True)
    first, *others = search.draws()
    assert others == replace(search, own_first=False).draws()[:3]
    before = recipe("clip")(10_000)
    roles = {"image": RoleConfig(lr=5e-3, weight_decay=0.3)}
    before = replace(before, optimizer=replace(before.optimizer, roles=roles, schedule="constant"))
    assert with_settings(before, first) == before


@pytest.mark.parametrize("name", recipes())
def test_settings_change_rates_weight_decay_and_crops_only(name):
    before = recipe(name)(10_000)
    config = with_settings(before, Settings(2.0, 0.05, 1.5))
    old, new = before.optimizer, config.optimizer
    for role in ("image", "text", "scale"):
        was, now = old.for_role(role), new.for_role(role)
        assert now.lr == pytest.approx(2 * was.lr)
        assert now.weight_decay == 0.05
    assert new.schedule == "constant"
    views = {name: view for name, view in vars(before.method_config).items() if isinstance(view, AugmentationPolicy)}
    assert views
    for view, policy in views.items():
        if policy.crop_scale is not None:
            smallest = pytest.approx(policy.crop_scale[0] ** 1.5)
            policy = replace(policy, crop_scale=getattr(config.method_config, view).crop_scale)
            assert policy.crop_scale[0] == smallest
        assert getattr(config.method_config, view) == policy
    same = replace(config, optimizer=old, method_config=before.method_config)
    assert same == before


def test_rates_of_roles_keep_their_ratio():
    before = recipe("clip")(10_000)
    before = replace(
        before, optimizer=replace(before.optimizer, roles={"image": RoleConfig(lr=5e-3, weight_decay=0.3)})
    )
    found = with_settings(before, Settings(0.5, 0.02, 1.0)).optimizer
    assert (found.lr, found.roles["image"].lr) == (before.optimizer.lr / 2, 2.5e-3)
    assert found.for_role("image").weight_decay == found.weight_decay == 0.02


def test_crops_of_a_locked_encoder_are_left_alone():
    locked = replace(recipe("clip")(10_000), image_tower="a tower", image_tuning="locked")
    drawn = Settings(2.0, 0.05, 1.5)
    assert with_settings(locked, drawn).method_config == locked.method_config
    assert with_settings(replace(locked, feature_views=2), drawn).method_config != locked.method_config


def test_the_best_of_k_is_the_mean_over_all_subsets():
    scores = [0.3, 0.1, 0.7, 0.7, 0.0]
    expected = [np.mean([max(subset) for subset in combinations(scores, k)]) for k in range(1, 6)]
    assert best_of(scores) == pytest.approx(expected)


def test_parts_of_headline_metrics():
    assert parts("retrieval_test.r10") == ("retrieval_test.image_to_text.r10", "retrieval_test.text_to_image.r10")
    for name in ("retrieval.image_to_text.r10", "foils.mean_per_kind", "probe.acc1"):
        assert parts(name) == (name,)
