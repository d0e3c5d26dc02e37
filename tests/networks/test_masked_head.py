import math

import pytest
import torch
from torch.nn import functional as F

from coalign.networks.masked_head import MaskedLanguageHead


def test_starts_near_chance_on_normalised_features():
    torch.manual_seed(0)
    head, tokens = MaskedLanguageHead(512, 2000), F.layer_norm(torch.randn(64, 512), (512,))
    logits = head(tokens)
    assert logits.shape == (64, 2000)
    assert F.cross_entropy(logits, torch.randint(2000, (64,))).item() == pytest.approx(math.log(2000), abs=0.4)
