"""Reference for the tiled losses: the definition with the whole similarity matrix, and comparison of gradients."""

import torch
from torch.nn import functional as F

from coalign.losses import tiled

EMPTY = -1e30  # values below this are sums over nothing


def dense(queries, keys, scale, rows, columns):
    """Computes `negatives_logsumexp` from the whole matrix."""
    logits = queries @ keys.T * scale
    shared = (rows[:, None] == columns[None]).any(2)
    return logits.masked_fill(shared, tiled.masked_logit(logits.dtype)).logsumexp(1)


def leaf(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()


def assert_same(ours, theirs, inputs, exact=None, tolerance=1e-10):
    valid = theirs > EMPTY
    assert torch.equal(ours > EMPTY, valid)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(ours[valid], theirs[valid], **close)
    upstream = torch.randn(len(ours), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((values[valid] * upstream[valid]).sum(), leaves)
        for values, leaves in ((ours, inputs), (theirs, exact or inputs))
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, **close)
