import math

import pytest
import torch
from torch.nn import functional as F

from coalign.losses import contrastive, tiled
from coalign.losses.contrastive import info_nce


def clip_loss(image, text, log_scale):
    rows = torch.arange(len(image))
    scale = log_scale.exp().reshape(1)
    return (info_nce(image, text, rows, scale) + info_nce(text, image, rows, scale)) / (2 * len(image))


def leaves(*tensors, dtype=torch.float64):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["openclip_clip", "slip_clip"])
def test_equals_official_code(oracles, name, dtype, tolerance):
    oracle = oracles("contrastive")
    image, text, log_scale = leaves(*(oracle[f"{name}.in.{x}"] for x in ("image", "text", "log_scale")), dtype=dtype)
    # SLIP's loss normalizes its inputs
    normalize = (lambda x: F.normalize(x, dim=-1)) if name == "slip_clip" else (lambda x: x)
    loss = clip_loss(normalize(image), normalize(text), log_scale)
    loss.backward()
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(loss.detach(), oracle[f"{name}.out.loss"], **close)
    for value, key in ((image, "image"), (text, "text"), (log_scale, "log_scale")):
        torch.testing.assert_close(value.grad, oracle[f"{name}.out.grad_{key}"], **close)


def test_half_precision_inputs_are_computed_in_float32(oracles):
    oracle = oracles("contrastive")
    image, text = (oracle[f"openclip_clip.in.{x}"].bfloat16() for x in ("image", "text"))
    scale = oracle["openclip_clip.in.log_scale"].float()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = clip_loss(image, text, scale)
    expected = clip_loss(image.double(), text.double(), scale.double()).item()
    assert under_autocast.item() == pytest.approx(expected, rel=1e-6)  # bfloat16 products are off by 1e-3
    assert clip_loss(image, text, scale).item() == pytest.approx(expected, rel=1e-6)


def naive(queries, keys, positives, scale, ignored):
    total = 0.0
    for i, p in enumerate(positives.tolist()):
        denominator = 0.0
        for j in range(len(keys)):
            if ignored is None or not ignored[i, j]:
                denominator = denominator + torch.exp(scale * (queries[i] * keys[j]).sum())
        total = total - torch.log(torch.exp(scale * (queries[i] * keys[p]).sum()) / denominator)
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_equals_naive_loops(monkeypatch, masked):
    torch.manual_seed(0)
    queries, keys = leaves(F.normalize(torch.randn(3, 5), dim=-1), F.normalize(torch.randn(7, 5), dim=-1))
    positives, scale = torch.tensor([2, 3, 4]), torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    ignored = labels = None
    if masked:
        ids = torch.tensor([1, 2, 5, 5, 6, 5, 7])
        labels = ids[positives], ids
        ignored = ids[positives, None] == ids
        ignored[torch.arange(3), positives] = False
        assert ignored.sum() == 4  # rows 0 and 1 share their label with two columns each
    monkeypatch.setattr(tiled, "TILE", 2)
    inputs = (queries, keys, scale)
    ours = info_nce(queries, keys, positives, scale, labels)
    theirs = naive(queries, keys, positives, scale[0], ignored)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("number", [1, 2, 4096])
@pytest.mark.parametrize("kind", ["random", "identical", "zero"])
def test_degenerate_inputs_are_finite_at_low_temperature(number, kind):
    torch.manual_seed(0)
    x = {"random": torch.randn(number, 8), "identical": torch.ones(number, 8), "zero": torch.zeros(number, 8)}[kind]
    image, text = leaves(x, x.flip(0), dtype=torch.float32)
    log_scale = torch.tensor(math.log(100.0), requires_grad=True)
    loss = clip_loss(F.normalize(image, dim=-1), F.normalize(text, dim=-1), log_scale)
    loss.backward()
    assert all(torch.isfinite(value).all() for value in (loss, image.grad, text.grad, log_scale.grad))
    if kind != "random":
        assert loss.item() == pytest.approx(math.log(number), abs=1e-4)


def test_only_the_positive_remains_if_all_labels_are_shared():
    ids = torch.zeros(4, dtype=torch.long)
    rows = torch.arange(4)
    x = F.normalize(torch.randn(4, 8), dim=-1)
    assert info_nce(x, x, rows, 50.0, (ids, ids)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 1, 3, 2, 1])])
def test_whole_batch_equals_sum_over_local_rows(monkeypatch, labels):
    """With the whole batch, both directions share their products; with local rows, they do not."""
    monkeypatch.setattr(tiled, "TILE", 2)
    torch.manual_seed(0)
    inputs = images, texts, scale = leaves(*F.normalize(torch.randn(2, 5, 4), dim=-1), torch.tensor([9.0]))
    rows = torch.arange(5)

    def part(local):
        pair = None if labels is None else (labels[local], labels)
        return contrastive.clip_loss(images[local], texts[local], images, texts, rows[local], scale, pair)

    whole, parts = part(slice(None)), part(slice(0, 2)) + part(slice(2, 5))
    torch.testing.assert_close(whole, parts)
    for a, b in zip(torch.autograd.grad(whole, inputs), torch.autograd.grad(parts, inputs)):
        torch.testing.assert_close(a, b)


def smoothed(logits, candidates, smoothing):
    """Sums torch's cross-entropy with label smoothing over the rows, each among its candidates. Row i's positive is column i."""
    total = 0.0
    for i, row in enumerate(candidates):
        columns = row.nonzero().squeeze(1)
        target = (columns == i).nonzero().squeeze()
        total = total + F.cross_entropy(logits[i, columns], target, label_smoothing=smoothing)
    return total


@pytest.mark.parametrize("shared", [None, "captions", "captions and groups", "all captions"])
def test_label_smoothing_equals_torch(monkeypatch, shared):
    """Values and gradients, over the whole batch and over the sum of its parts."""
    monkeypatch.setattr(tiled, "TILE", 2)
    torch.manual_seed(0)
    inputs = images, texts, scale = leaves(*F.normalize(torch.randn(2, 7, 4), dim=-1), torch.tensor([9.0]))
    rows, labels, candidates = torch.arange(7), None, torch.ones(7, 7, dtype=torch.bool)
    if shared:
        captions = torch.tensor([3, 1, 3, 2, 1, 3, 5]) if "all" not in shared else torch.full([7], 2**62)
        labels = torch.stack([captions, torch.tensor([4, 3, 4, 4, 1, 2, 5])], 1) if "groups" in shared else captions
        equal = labels[:, None] == labels[None]
        candidates = ~(equal if equal.ndim == 2 else equal.any(2)) | torch.eye(7, dtype=torch.bool)

    def part(local, smoothing=0.3):
        pair = None if labels is None else (labels[local], labels)
        return contrastive.clip_loss(images[local], texts[local], images, texts, rows[local], scale, pair, smoothing)

    logits = scale * images @ texts.T
    expected = (smoothed(logits, candidates, 0.3) + smoothed(logits.T, candidates, 0.3)) / 2
    if shared != "all captions":
        assert expected != part(slice(None), 0.0)
    for ours in (part(slice(None)), part(slice(0, 2)) + part(slice(2, 7))):
        torch.testing.assert_close(ours, expected)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs, retain_graph=True)):
            torch.testing.assert_close(a, b)


def test_label_smoothing_is_computed_in_float32():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 300, 16), dim=-1).bfloat16()
    rows, labels = torch.arange(300), torch.randint(200, (300,))
    arguments = (rows, 100.0, (labels, labels), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = contrastive.clip_loss(image, text, image, text, *arguments)
    image, text = image.double(), text.double()
    expected = contrastive.clip_loss(image, text, image, text, *arguments)
    assert under_autocast.item() == pytest.approx(expected.item(), rel=1e-6)
