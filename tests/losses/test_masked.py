import pytest
import torch
from torch.nn import functional as F

from coalign.losses.masked import masked_language_loss
from coalign.networks.heads import MaskedLanguageHead


def as_loops(tokens, labels, head):
    """Returns each sample's sum of -log p(original), token by token."""
    totals = []
    for sample, sample_labels in zip(tokens, labels):
        total = torch.zeros((), dtype=tokens.dtype)
        for token, label in zip(sample, sample_labels.tolist()):
            if label != -100:
                logits = head(token[None])[0]
                total = total - (logits[label] - logits.exp().sum().log())
        totals.append(total)
    return torch.stack(totals)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return MaskedLanguageHead(6, 11).double()


def test_equals_loops(head):
    labels = torch.tensor([[-100, 3, -100, 0], [-100] * 4, [10, 10, -100, 2]])
    tokens = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    # per sample, so that every sample's gradient is checked
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    results = []
    for totals in (masked_language_loss(tokens, labels, head)[0], as_loops(tokens, labels, head)):
        gradients = torch.autograd.grad((totals * weights).sum(), [tokens, *head.parameters()])
        results.append([totals.detach(), *gradients])
    for ours, loops in zip(*results):
        torch.testing.assert_close(ours, loops)
    assert masked_language_loss(tokens, labels, head)[1].tolist() == [2, 0, 3]


def test_mean_over_masked_tokens_equals_declip(oracles):
    oracle, name = oracles("declip"), "declip_full"
    word, labels = oracle[f"{name}.in.word"].requires_grad_(), oracle[f"{name}.in.mlm_labels"]
    weight, bias = oracle[f"{name}.par.mlm_weight"], oracle[f"{name}.par.mlm_bias"]
    total, count = masked_language_loss(word, labels, lambda tokens: F.linear(tokens, weight, bias))
    loss = total.sum() / count.sum()
    torch.testing.assert_close(loss, oracle[f"{name}.out.text_mlm_loss"], rtol=1e-9, atol=0)
    (0.2 * loss).backward()
    torch.testing.assert_close(word.grad, oracle[f"{name}.out.grad_word"], rtol=1e-9, atol=1e-12)


def test_only_masked_tokens_pass_through_the_head(head):
    inputs = []
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    tokens = torch.randn(2, 3, 6, dtype=torch.float64)
    masked_language_loss(tokens, labels, lambda x: inputs.append(x) or head(x))
    assert torch.equal(inputs[0], tokens[[0, 0, 1], [1, 2, 2]])


def test_no_masked_tokens_have_zero_loss_and_gradient(head):
    tokens = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    total, count = masked_language_loss(tokens, torch.full((2, 3), -100), head)
    assert total.tolist() == [0, 0]
    assert count.tolist() == [0, 0]
    total.sum().backward()
    assert tokens.grad.abs().sum() == 0
    assert head.decoder.weight.grad.abs().sum() == 0


def test_all_tokens_masked(head):
    tokens, labels = torch.randn(2, 3, 6, dtype=torch.float64), torch.randint(11, (2, 3))
    total, count = masked_language_loss(tokens, labels, head)
    assert count.tolist() == [3, 3]
    expected = F.cross_entropy(head(tokens.flatten(0, 1)), labels.flatten(), reduction="sum")
    torch.testing.assert_close(total.sum(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    head = MaskedLanguageHead(64, 1000).to(dtype)
    tokens, labels = torch.randn(4, 8, 64).to(dtype), torch.randint(1000, (4, 8))
    total, _ = masked_language_loss(tokens, labels, head)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, masked_language_loss(tokens.float(), labels, head.float())[0], rtol=1e-2, atol=0)
