"""Two processes: batches are padded to the global batch, and the all-gather checks shapes and dtypes."""

from dataclasses import replace

import pytest
import torch
from helpers.processes import on_two_processes

from coalign.training.distributed import RankGather, World, pad_to_global_batch
from coalign.training.step import evaluate_loss
from coalign.types import NOT_MASKED, Batch, LossTerm, StepInfo, TextView

# tensors of rank 0 and rank 1, and what the error says
MISMATCHES = [
    (torch.zeros(4, 5, 16), torch.zeros(4, 7, 16), "equal trailing dimensions", "[5, 16]", "[7, 16]"),
    (torch.zeros(4, 6, 2), torch.zeros(4, 4, 3), "equal trailing dimensions", "[6, 2]", "[4, 3]"),
    (torch.zeros(4, 6), torch.zeros(4, 2, 3), "equal trailing dimensions", "[6]", "[2, 3]"),
    (torch.zeros(4), torch.zeros(4, 1), "equal trailing dimensions", "[]", "[1]"),
    (torch.zeros(4, 6), torch.zeros(3, 6), "the same number of rows", "[4, 6]", "[3, 6]"),
    (torch.zeros(4, 6), torch.zeros(4, 6).double(), "the same dtype", "torch.float32", "torch.float64"),
    (torch.zeros(4, 6).int(), torch.zeros(4, 6), "the same dtype", "torch.int32", "torch.float32"),
]


def ragged_batch(rank):
    """One sample per rank: captions of 3 and 5 tokens, paraphrases of 4 and 2 tokens with labels, and 1 and 2 tags."""
    caption, paraphrase, tags = ([3, 5][rank], [4, 2][rank], [1, 2][rank])
    texts = {
        "caption": TextView(torch.full((1, caption), 7), torch.tensor([caption])),
        "paraphrase": TextView(
            torch.full((1, paraphrase), 8), torch.tensor([paraphrase]), torch.full((1, paraphrase), 9)
        ),
    }
    row = torch.zeros(1, dtype=torch.int64)
    return Batch(row, {}, texts, row, row.bool(), tags=torch.full((1, tags), 6))


class SumOfIds:
    """Stands in for a method that gathers a token axis."""

    def encode(self, batch, step):
        return {"ids": batch.texts["caption"].ids}

    def encode_targets(self, batch, step):
        return {}

    def objective(self, features, targets, gather, step):
        return [LossTerm("sum", gather(features["ids"]).sum().double(), 1)]


def collectives(world, _):
    """Returns this rank's errors and gathered rows, the tensors of its padded batch, and a validation loss."""
    gather, rows = RankGather(world), torch.arange(6.0).view(2, 3) + 10 * world.rank
    gathered, errors = [gather(rows)], []
    for *tensors, _, _, _ in MISMATCHES:
        with pytest.raises(ValueError, match="Gather requires") as error:
            gather(tensors[world.rank])
        errors.append(str(error.value))
        gathered.append(gather(rows))  # the ranks stay in step after an error
    batch = ragged_batch(world.rank)
    padded = pad_to_global_batch(batch, world)
    fields = [(view.ids, view.lengths, view.labels) for view in padded.texts.values()]
    return errors, gathered, [*fields, padded.tags], evaluate_loss(SumOfIds(), batch, StepInfo(0, 1), world, None)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(collectives, tmp_path_factory.mktemp("collectives"))


def test_gather_raises_on_all_ranks_if_shapes_or_dtypes_differ(ranks):
    expected = [
        f"Gather requires {what} on all ranks, but rank 0 has {first} and rank 1 has {second}."
        for _, _, what, first, second in MISMATCHES
    ]
    for errors, gathered, _, _ in ranks:
        assert errors == expected
        for rows in gathered:
            assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]


def test_captions_and_tags_are_padded_to_the_longest_of_the_global_batch(ranks):
    (caption, paraphrase, tags), (other_caption, other_paraphrase, other_tags) = (fields for _, _, fields, _ in ranks)
    assert [tensor.tolist() for tensor in caption[:2]] == [[[7, 7, 7, 0, 0]], [3]]
    assert [tensor.tolist() for tensor in other_caption[:2]] == [[[7] * 5], [5]]
    assert caption[2] is None
    assert [tensor.tolist() for tensor in paraphrase] == [[[8] * 4], [4], [[9] * 4]]
    assert [tensor.tolist() for tensor in other_paraphrase] == [[[8, 8, 0, 0]], [2], [[9, 9, NOT_MASKED, NOT_MASKED]]]
    assert (tags.tolist(), other_tags.tolist()) == ([[6, -1]], [[6, 6]])


def test_validation_batches_are_padded(ranks):
    assert [loss for *_, loss in ranks] == [7 * (3 + 5)] * 2


def test_nothing_is_padded_in_a_single_process_or_without_captions():
    batch, device = ragged_batch(0), torch.device("cpu")
    assert pad_to_global_batch(batch, World(0, 1, device)) is batch
    batch = replace(batch, texts={}, tags=None)
    assert pad_to_global_batch(batch, World(0, 2, device)) is batch  # without communication: there is no process group
