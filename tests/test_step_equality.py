"""A step's gradient depends only on the global batch: whole, in unequal micro-batches, or on two processes. Covers every method."""

from importlib.util import find_spec

import pytest
import torch
from helpers.builders import BATCH_NORM, build_method
from helpers.processes import on_two_processes
from helpers.steps import (
    ALONE,
    MODELS,
    assert_complete,
    assert_equal_steps,
    batch_for,
    half_steps,
    rank_share,
    run_step,
    takes,
)
from helpers.token_wise import TokenWise

from coalign.methods import METHODS, config_class
from coalign.methods.clip.method import CLIP
from coalign.training.distributed import World

CONTROL = "foreign_parameters"  # UniCLIP's control for whole batches: the head takes the parameters of the previous row


def boolean_flips(name):
    """Returns changes to a method's configuration: none, and each boolean option flipped."""
    values = vars(config_class(name)())
    options = [option for option, value in values.items() if isinstance(value, bool) and option != CONTROL]
    return [{}, *({option: not values[option]} for option in options)]


CASES = [(name, "transformer", changes) for name in METHODS for changes in boolean_flips(name)]
CASES += [(name, "batch norm", {}) for name in METHODS if takes(name, BATCH_NORM)]
CASES += [(name, "hugging face", {}) for name in ("clip", "declip") if find_spec("transformers")]
# each slice draws its own dropout, see `test_dropout`
CASES += [("clip-strong", "transformer", {"text_dropout": 0.0, "multi_positive": on}) for on in (False, True)]


class WrongCount(CLIP):
    """A planted bug: each rank counts 1 regardless of its number of rows, so the loss depends on the number of ranks."""

    def objective(self, features, targets, gather, step):
        terms = super().objective(features, targets, gather, step)
        for term in terms:
            term.count = 1
        return terms


@pytest.mark.parametrize(("name", "model", "changes"), CASES)
def test_micro_batches(tmp_path, name, model, changes):
    method = build_method(name, tmp_path, MODELS[model], **changes)
    batch = batch_for(method)
    whole = run_step(method, batch, ALONE)
    assert_complete(method, whole)
    method = build_method(name, tmp_path, MODELS[model], **changes)
    assert_equal_steps(whole, run_step(method, batch, ALONE, [slice(0, 4), slice(4, 6), slice(6, 8)]))


def test_captions_of_the_two_ranks_differ_in_length(tmp_path):
    """So that `test_two_processes` covers the padding to the global batch."""
    batch = batch_for(build_method("clip", tmp_path))
    halves = [rank_share(batch, World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    assert [half.texts["caption"].ids.shape[1] for half in halves] == [12, 11]


def test_two_processes(tmp_path):
    cases = [(*case, None, slices) for case in CASES for slices in (None, [slice(0, 2), slice(2, 4)])]
    cases += [("clip", "transformer", {}, TokenWise, slices) for slices in (None, [slice(0, 1), slice(1, 4)])]
    cases.append(("clip", "transformer", {}, WrongCount, None))
    ranks = on_two_processes(half_steps, tmp_path, cases)
    for number, (name, model, changes, cls, _) in enumerate(cases):
        method = build_method(name, tmp_path, MODELS[model], cls=cls, **changes)
        whole = run_step(method, batch_for(method), ALONE)
        for rank in ranks:
            if cls is WrongCount:
                with pytest.raises(AssertionError):
                    assert_equal_steps(whole, rank[number])
            else:
                assert_equal_steps(whole, rank[number])


def test_dropout(tmp_path):
    """Two slices on one process, which encodes each of them twice, equal the slices of two processes, which encode theirs once."""
    halves = on_two_processes(half_steps, tmp_path, [("clip-strong", "transformer", {}, None, None)])
    method = build_method("clip-strong", tmp_path)
    sliced = run_step(method, batch_for(method), ALONE, [slice(0, 4), slice(4, 8)])
    for (step,) in halves:
        assert_equal_steps(sliced, step)
    for changes in ({"text_dropout": 0.0}, {"text_dropout": 0.3}):
        method = build_method("clip-strong", tmp_path, **changes)
        assert run_step(method, batch_for(method), ALONE, [slice(0, 4), slice(4, 8)])[0] != pytest.approx(sliced[0])
