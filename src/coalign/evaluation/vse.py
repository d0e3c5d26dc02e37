"""Retrieval by image features alone: a linear map of them and a GRU over words learn a common space (VSE++, Faghri et al. 2018), as MCT
compares image encoders (its Tables 4 and 6)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from coalign.errors import UserError
from coalign.evaluation.embed import Evaluation, ImageEmbeds
from coalign.evaluation.retrieval import retrieve
from coalign.types import DualEncoder

WORD_DIM, EMBED_DIM = 300, 1024
MARGIN, BATCH_SIZE = 0.2, 128
RATES = (2e-4, 2e-5)  # Adam's, for half of the epochs each
EPOCHS = 30
LEAST_COUNT = 4  # of a word in the training captions
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class WordGRU(nn.Module):
    """Texts -> the last state of a GRU over their words, normalised [text, EMBED_DIM]. Unknown words are one word, and so is no word."""

    def __init__(self, captions: Iterable[str]) -> None:
        super().__init__()
        counts = Counter(word for caption in captions for word in words_of(caption))
        known = sorted(word for word, count in counts.items() if count >= LEAST_COUNT)
        self.number = {word: i + 1 for i, word in enumerate(known)}
        self.embedding = nn.Embedding(len(known) + 1, WORD_DIM)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.gru = nn.GRU(WORD_DIM, EMBED_DIM, batch_first=True)

    def forward(self, texts: Sequence[str]) -> Tensor:
        ids = [[self.number.get(word, 0) for word in words_of(text)] or [0] for text in texts]
        lengths = torch.tensor([len(own) for own in ids])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(own) for own in ids], batch_first=True)
        packed = pack_padded_sequence(self.embedding(padded), lengths, batch_first=True, enforce_sorted=False)
        return F.normalize(self.gru(packed)[1][0], dim=1)


def hardest_hinges(images: Tensor, texts: Tensor, same: Tensor) -> Tensor:
    """VSE++'s loss (its Eq. 6): of each image and each text of a batch of pairs, normalised [pair, dim], the hinge of the hardest negative,
    summed. Where `same` [pair, pair] is true, two rows are of one image, and no negatives of each other."""
    cosines = images @ texts.T
    own = cosines.diagonal()
    by_image = (MARGIN + cosines - own[:, None]).clamp(min=0).masked_fill(same, 0)
    by_text = (MARGIN + cosines - own[None]).clamp(min=0).masked_fill(same, 0)
    return by_image.amax(1).sum() + by_text.amax(0).sum()


def vse(
    train: ImageEmbeds, test: ImageEmbeds, captions: Callable[[int], Sequence[str]], epochs: int = EPOCHS, seed: int = 0
) -> Evaluation:
    """Learns from the features [image, width] of `train` and all their captions, and searches among those of `test`. UserError where the
    training part has less than two images with captions."""
    pairs = [(row, text) for row, index in enumerate(train.indices) for text in captions(index)]
    if len({row for row, _ in pairs}) < 2:
        raise UserError("There is nothing to learn from: less than two training images have captions.")
    mean, deviation = train.embeds.mean(0), train.embeds.std(0, unbiased=False).clamp(min=1e-6)

    def standard(features: Tensor) -> Tensor:
        return (features - mean) / deviation

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = WordGRU(text for _, text in pairs)
        project = nn.Linear(train.embeds.shape[1], EMBED_DIM)
        features, rows = standard(train.embeds), torch.tensor([row for row, _ in pairs])
        optimiser = torch.optim.Adam([*words.parameters(), *project.parameters()], lr=RATES[0])
        for epoch in range(epochs):
            optimiser.param_groups[0]["lr"] = RATES[epoch >= epochs / 2]
            for chosen in torch.randperm(len(pairs)).split(BATCH_SIZE):
                of = rows[chosen]
                images = F.normalize(project(features[of]), dim=1)
                loss = hardest_hinges(images, words([pairs[i][1] for i in chosen.tolist()]), of[:, None] == of[None])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([*words.parameters(), *project.parameters()], 2.0)
                optimiser.step()
    with torch.no_grad():
        embeds = F.normalize(project(standard(test.embeds)), dim=1)
        model = DualEncoder(lambda pixels: pixels, words, 1, "VSE++")
        return retrieve(model, ImageEmbeds(embeds, test.indices, test.bad), captions)
