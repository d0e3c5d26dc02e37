import pytest
import torch
from torch import nn

from coalign.losses.masked import masked_image_loss


def as_loops(tokens, masked, patches, head):
    """Returns each sample's sum of the mean squared error of its masked patches, value by value, and their number."""
    totals, counts = [], []
    for sample, sample_mask, pixels in zip(tokens, masked.tolist(), patches):
        total, count = torch.zeros((), dtype=tokens.dtype), 0
        for token, is_masked, values in zip(sample, sample_mask, pixels.tolist()):
            if is_masked:
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                targets = [(v - mean) / (variance + 1e-6) ** 0.5 for v in values]
                total = total + sum((p - t) ** 2 for p, t in zip(head(token), targets)) / len(values)
                count += 1
        totals.append(total)
        counts.append(count)
    return torch.stack(totals), counts


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(6, 12).double()


def test_equals_loops(head):
    masked = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    patches = torch.randn(3, 4, 12, dtype=torch.float64) * 3 + 7
    tokens = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    # per sample, so that every sample's gradient is checked
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    results = []
    for compute in (masked_image_loss, as_loops):
        totals, counts = compute(tokens, masked, patches, head)
        gradients = torch.autograd.grad((totals * weights).sum(), [tokens, *head.parameters()])
        results.append([totals.detach(), torch.as_tensor(counts), *gradients])
    for ours, loops in zip(*results):
        torch.testing.assert_close(ours, loops)


def test_only_masked_patches_pass_through_the_head(head):
    inputs = []
    masked = torch.tensor([[False, True, True], [False, False, True]])
    tokens, patches = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    masked_image_loss(tokens, masked, patches, lambda x: inputs.append(x) or head(x))
    assert torch.equal(inputs[0], tokens[[0, 0, 1], [1, 2, 2]])


def test_targets_are_normalized_per_patch(head):
    masked, tokens = torch.ones(2, 1, dtype=torch.bool), torch.randn(2, 1, 6, dtype=torch.float64)
    flat = masked_image_loss(tokens, masked, torch.full((2, 1, 12), 5.0, dtype=torch.float64), head)[0]
    torch.testing.assert_close(flat, head(tokens[:, 0]).square().mean(-1))  # all targets are zero
    patches = torch.randn(2, 1, 12, dtype=torch.float64)
    brighter = masked_image_loss(tokens, masked, patches + 3, head)[0]
    torch.testing.assert_close(brighter, masked_image_loss(tokens, masked, patches, head)[0])


def test_no_masked_patches_have_zero_loss_and_gradient(head):
    tokens = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    patches = torch.randn(2, 3, 12, dtype=torch.float64)
    total, count = masked_image_loss(tokens, torch.zeros(2, 3, dtype=torch.bool), patches, head)
    assert total.tolist() == [0, 0]
    assert count.tolist() == [0, 0]
    total.sum().backward()
    assert tokens.grad.abs().sum() == 0
    assert head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    torch.manual_seed(0)
    head, masked = nn.Linear(64, 192).to(dtype), torch.ones(4, 9, dtype=torch.bool)
    tokens, patches = torch.randn(4, 9, 64).to(dtype), torch.randn(4, 9, 192)
    total, _ = masked_image_loss(tokens, masked, patches, head)
    assert total.dtype == torch.float32
    expected = masked_image_loss(tokens.float(), masked, patches, head.float())[0]
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)
