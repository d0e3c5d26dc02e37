import pytest
import torch

from coalign.networks.open_clip_parts import Transformer
from coalign.networks.transformer import group_by_length, pack, run_blocks

WIDTH, HEADS = 24, 3


def transformer(**options):
    torch.manual_seed(0)
    blocks = Transformer(WIDTH, 3, HEADS, ls_init_value=0.5, **options).double()
    for parameter in blocks.parameters():  # zero-initialized biases would hide that they are ignored
        torch.nn.init.normal_(parameter, std=0.3)
    return blocks


def gradients(outputs, blocks, x):
    """Returns gradients of a sum that weights every output differently."""
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    return torch.autograd.grad((outputs * weights).sum(), [x, *blocks.parameters()])


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 2, 3], [1] * 4, sorted([3, 4, 9, 30] * 20), [7]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_packed_blocks_equal_open_clip(lengths, causal, reads):
    blocks = transformer()
    x = torch.randn(sum(lengths), WIDTH, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor(lengths).cumsum(0)
    which = ends - 1 if causal else ends - torch.tensor(lengths)
    packing = pack(lengths, x.device)
    ours = run_blocks(blocks, x, packing, causal, which if reads else None)
    expected = []
    for sequence in x.split(lengths):
        mask = torch.full((len(sequence), len(sequence)), -torch.inf, dtype=x.dtype).triu_(1) if causal else None
        expected.append(blocks(sequence[None], attn_mask=mask)[0])
    theirs = torch.cat(expected)[which] if reads else torch.cat(expected)
    torch.testing.assert_close(ours, theirs)
    for mine, their in zip(gradients(ours, blocks, x), gradients(theirs, blocks, x)):
        torch.testing.assert_close(mine, their, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    "lengths", [[5], [5] * 80, list(range(3, 77)), [4] * 60 + [77], sorted(list(range(3, 77)) * 9)]
)
def test_length_groups(lengths):
    groups = group_by_length(lengths)
    assert sum(group.size for group in groups) == len(lengths)
    assert sum(group.num_tokens for group in groups) == sum(lengths)
    assert all(group.size >= 16 for group in groups[:-1])
    first = 0
    for group in groups:
        members = lengths[first : first + group.size]
        assert (max(members), sum(members)) == (group.longest, group.num_tokens)
        assert group.longest <= max(2 * members[0], members[min(15, group.size - 1)])
        first += group.size


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_attention_on_cpu_is_computed_in_float32(causal):
    """Result and gradients equal float32 attention on the same values, rounded once."""
    torch.manual_seed(0)
    lengths = [3, 5, 5]
    packing = pack(lengths, torch.device("cpu"))
    projected = torch.randn(sum(lengths), 3 * 8, dtype=torch.bfloat16, requires_grad=True)
    exact = projected.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = packing.attend(projected, None, heads=2, causal=causal)
    expected = packing.attend(exact, None, heads=2, causal=causal)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected.bfloat16())
    ours.backward(torch.ones_like(ours))
    expected.backward(torch.ones_like(expected))
    assert torch.equal(projected.grad, exact.grad.bfloat16())
