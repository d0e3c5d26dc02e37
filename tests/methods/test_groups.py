"""Data with groups, for every method: a group's pairs are not negatives of each other, whatever the ranks and slices."""

from dataclasses import replace

import pytest
import torch
from helpers.builders import build_method
from helpers.processes import on_two_processes
from helpers.steps import ALONE, BATCH, STEP, assert_equal_steps, batch_for, rank_share, run_step

from coalign.methods import METHODS
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward

CONTRASTS = {"clip", "ssl", "mvs", "nns", "contrastive", "contrastive_original", "mp_nce", "filip", "itc", "cmc"}
CONTRASTS |= {"j_ii", "j_tag", "j_cc", "j_ic", "j_ci"}
NO_NEGATIVES = {"image_ss", "text_ss", "mlm", "positive", "negative", "noisy"}
NO_NEGATIVES |= {"mlm_text", "mlm_joint", "mim_image", "mim_joint"}


def grouped(batch, groups):
    """Returns the batch with groups and distinct captions."""
    return replace(batch, group_ids=torch.tensor(groups), caption_ids=torch.arange(100, 100 + len(batch)))


def two_steps(method, batch):
    """Returns the terms of the second step: queues hold the batch of the first."""
    for _ in range(2):
        result = forward_backward(method, batch, STEP, ALONE)
        method.after_step(result.features, result.targets, RankGather(ALONE), STEP)
    return result.terms


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_group_has_no_negatives(tmp_path, name):
    method = build_method(name, tmp_path)
    terms = two_steps(method, grouped(batch_for(method), [7] * BATCH))
    contrasts = terms.keys() & CONTRASTS
    assert contrasts
    assert terms.keys() <= CONTRASTS | NO_NEGATIVES
    assert [terms[term] for term in contrasts] == pytest.approx([0] * len(contrasts), abs=1e-12)
    terms = two_steps(build_method(name, tmp_path), grouped(batch_for(method), range(BATCH)))
    assert min(terms[term] for term in contrasts) > 0.01


GROUPS = [3, 40, 40, 3, 41, 40, 5, 3]  # across slices and ranks


def half_steps_of_groups(world, folder):
    steps = []
    for name in METHODS:
        method = build_method(name, folder)
        share = rank_share(grouped(batch_for(method), GROUPS), world)
        steps.append(run_step(method, share, world, [slice(0, 1), slice(1, 4)]))
    return steps


def test_groups_span_slices_and_processes(tmp_path):
    ranks = on_two_processes(half_steps_of_groups, tmp_path)
    for number, name in enumerate(METHODS):
        method = build_method(name, tmp_path)
        whole = run_step(method, grouped(batch_for(method), GROUPS), ALONE)
        for rank in ranks:
            assert_equal_steps(whole, rank[number])
