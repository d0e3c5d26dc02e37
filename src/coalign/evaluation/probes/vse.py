"""Retrieval with frozen image features: VSE++ (Faghri et al. 2018) trains a linear projection and a GRU over words, as in MCT's Tables 4
and 6."""

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

Captions = Callable[[int], Sequence[str]]

WORD_DIM, EMBED_DIM = 300, 1024
MARGIN, BATCH_SIZE = 0.2, 128
LEARNING_RATES = (2e-4, 2e-5)  # of Adam, for half of the epochs each
EPOCHS = 30
MIN_COUNT = 4  # occurrences in the training captions of a word in the vocabulary
_WORD = re.compile(r"[^\W_]+")


def split_words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class WordGRU(nn.Module):
    """Texts -> the last state of a GRU over their words, normalized [text, EMBED_DIM].

    Id 0 stands for unknown words, and for a text without words.
    """

    def __init__(self, captions: Iterable[str]) -> None:
        super().__init__()
        counts = Counter(word for caption in captions for word in split_words(caption))
        vocabulary = sorted(word for word, count in counts.items() if count >= MIN_COUNT)
        self.word_ids = {word: i + 1 for i, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary) + 1, WORD_DIM)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.gru = nn.GRU(WORD_DIM, EMBED_DIM, batch_first=True)

    def forward(self, texts: Sequence[str]) -> Tensor:
        ids = [[self.word_ids.get(word, 0) for word in split_words(text)] or [0] for text in texts]
        lengths = torch.tensor([len(text_ids) for text_ids in ids])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(text_ids) for text_ids in ids], batch_first=True)
        packed = pack_padded_sequence(self.embedding(padded), lengths, batch_first=True, enforce_sorted=False)
        return F.normalize(self.gru(packed)[1][0], dim=1)


def max_hinge_loss(images: Tensor, texts: Tensor, same_image: Tensor) -> Tensor:
    """Returns VSE++'s loss (its Eq. 6) of normalized pairs [pair, dim]: the hinge of each image's and text's hardest negative, summed.

    `same_image`, bool [pair, pair], marks pairs of the same image, which are not negatives of each other.
    """
    cosines = images @ texts.T
    positives = cosines.diagonal()
    image_hinges = (MARGIN + cosines - positives[:, None]).clamp(min=0).masked_fill(same_image, 0)
    text_hinges = (MARGIN + cosines - positives[None]).clamp(min=0).masked_fill(same_image, 0)
    return image_hinges.amax(1).sum() + text_hinges.amax(0).sum()


def vse(
    train: ImageEmbeds,
    test: ImageEmbeds,
    train_captions: Captions,
    test_captions: Captions,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> Evaluation:
    """Trains on the features [image, width] and all captions of `train`, and evaluates retrieval on `test`.

    The captions are functions of the sample index.

    Raises UserError if fewer than two training images have captions.
    """
    pairs = [(row, text) for row, index in enumerate(train.indices) for text in train_captions(index)]
    if len({row for row, _ in pairs}) < 2:
        raise UserError("There is nothing to train on: fewer than two training images have captions.")
    mean, std = train.embeds.mean(0), train.embeds.std(0, unbiased=False).clamp(min=1e-6)

    def standardize(features: Tensor) -> Tensor:
        return (features - mean) / std

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = WordGRU(text for _, text in pairs)
        projector = nn.Linear(train.embeds.shape[1], EMBED_DIM)
        parameters = [*text_encoder.parameters(), *projector.parameters()]
        features, rows = standardize(train.embeds), torch.tensor([row for row, _ in pairs])
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATES[0])
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = LEARNING_RATES[epoch >= epochs / 2]
            for batch in torch.randperm(len(pairs)).split(BATCH_SIZE):
                image_rows = rows[batch]
                images = F.normalize(projector(features[image_rows]), dim=1)
                texts = text_encoder([pairs[i][1] for i in batch.tolist()])
                loss = max_hinge_loss(images, texts, image_rows[:, None] == image_rows[None])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 2.0)
                optimizer.step()
    with torch.no_grad():
        embeds = F.normalize(projector(standardize(test.embeds)), dim=1)
        model = DualEncoder(lambda pixels: pixels, text_encoder, 1, "VSE++")
        return retrieve(model, ImageEmbeds(embeds, test.indices, test.bad), test_captions)
