"""Tokenizers, based on the `tokenizers` library: CLIP's, small ones trained on captions, and those of Hugging Face encoders.

CLIP's and trained ones have the same order of ids: ordinary tokens 0 … vocab_size - 3, then the start token, then the end token, so that
the end token has the largest id. The mask token follows at id vocab_size, outside the vocabulary. A tokenizer of a Hugging Face encoder
keeps its own ids and special tokens, such as [CLS], [SEP] and [MASK], so that the encoder gets what it was trained with. `encode` never
returns a mask token.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalign.data.text.cleaning import caption_normalizer, clean_text, is_plain
from coalign.errors import UserError

# Set before the import: the library's threads do not survive the fork of a data loading worker.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    from torch import Tensor

START, END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"
CLIP_VOCABULARY = 49408
_CLIP_MERGES = 49152 - 256 - 2
_COMPARED = ("A Café’s “Bücher”, ½ price!", "TWO  red apples &amp; a &lt;b&gt;", "狗在雪地里跑", "supercalifragilistic")
_PLAIN = "".join(f" {chr(code)} " for code in range(32, 127) if chr(code) != "&")
_CLIP_PATTERN = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


# files of which a Hugging Face tokenizer has at least one
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


class Tokenizer:
    """Converts text to token ids and back. Can be pickled for data loading workers.

    Attributes:
        vocab_size: One more than the largest id.
        start_id, end_id: Ids of the tokens around each text.
        mask_id: Id of the mask token; None if the tokenizer has none.
        special_ids: Ids that stand for no text.
        hugging_face: Whether it is the one of a Hugging Face encoder, which has its own ids and rules.
        repairs: Whether text is cleaned as CLIP does, in Python. Tokenizers trained on captions clean by a normalizer in their file.
    """

    def __init__(self, backend: Backend, name: str) -> None:
        """Raises UserError if `backend` has no start and end token."""
        self.name = name
        self._backend = backend
        backend.encode_special_tokens = True  # encode special tokens in a caption as ordinary text
        backend.no_truncation()  # which the file of an export may set, as well as padding
        backend.no_padding()
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        last = self.vocab_size - 2, self.vocab_size - 1
        self.hugging_face = (backend.token_to_id(START), backend.token_to_id(END)) != last
        normalizer = None if self.hugging_face else backend.normalizer
        cleans = normalizer is not None and normalizer.normalize_str("&amp;") == "&"  # not in files of older versions
        self.repairs = not self.hugging_face and not cleans
        self._normalizer = normalizer if cleans else None
        # for plain text, `clean_text` returns the same much faster
        self._is_fast = self._normalizer is not None and self._normalizer.normalize_str(_PLAIN) == clean_text(_PLAIN)
        if cleans:
            backend.normalizer = None
        self.mask_id: int | None
        if not self.hugging_face:
            around: tuple[int, ...] = last
            self.special_ids, self.mask_id = around, self.vocab_size
        else:
            special = {key: token.content for key, token in backend.get_added_tokens_decoder().items() if token.special}
            self.special_ids, around = tuple(sorted(special)), tuple(backend.encode("").ids)
            self.mask_id = next((key for key, content in special.items() if "mask" in content.lower()), None)
            if len(around) != 2 or not set(around) <= set(special):
                raise UserError(
                    f"The tokenizer {name} does not add a start and an end token to each text; use the tokenizer of an encoder like BERT, "
                    "or create one with `coalign data tokenizer`."
                )
        self.start_id, self.end_id = around

    def encode(self, text: str, context_length: int) -> list[int]:
        """Returns at most `context_length` ids from start to end token. A longer text is truncated before the end token."""
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}, but must be at least 2 for the start and end tokens")
        return [self.start_id, *self._encode(text)[: context_length - 2], self.end_id]

    def num_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text that is not truncated, including the start and end tokens."""
        return len(self._encode(text)) + 2

    def _encode(self, text: str) -> list[int]:
        if self.repairs or (self._is_fast and is_plain(text)):
            text = clean_text(text)
        else:
            text = text.encode("utf-8", "replace").decode()
            text = self._normalizer.normalize_str(text) if self._normalizer else text
        return self._backend.encode(text, add_special_tokens=False).ids

    def equals(self, other: Tokenizer) -> bool:
        """Whether both have the same vocabulary and rules, as far as a few texts show."""
        if self._backend.get_vocab() != other._backend.get_vocab():
            return False
        return all(self.encode(text, 77) == other.encode(text, 77) for text in _COMPARED)

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """Returns ids, int64 [batch, longest], padded with 0, and lengths, int64 [batch], including the start and end tokens."""
        return pad([self.encode(text, context_length) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the cleaned text of token ids, without start and end tokens, with [MASK] for mask tokens."""
        pieces: list[str] = []
        tokens: list[int] = []  # since the last mask
        for token in ids:
            if token == self.mask_id:
                pieces.append(self._backend.decode(tokens).strip())
                tokens = []
            elif token not in self.special_ids:
                tokens.append(token)
        pieces.append(self._backend.decode(tokens).strip())
        return " [MASK] ".join(pieces).strip()

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to a JSON file that `load_tokenizer` and the `tokenizers` library can read."""
        Path(path).write_text(self.to_str(), encoding="utf-8")

    def to_str(self) -> str:
        """Returns the content of the file that `save` writes."""
        if self._normalizer is None:
            return self._backend.to_str()
        complete = Backend.from_str(self._backend.to_str())
        complete.normalizer = self._normalizer
        return complete.to_str()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "json": self.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Tokenizer.__init__(self, Backend.from_str(state["json"]), state["name"])


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns token lists as ids, int64 [batch, longest], padded with 0, and their lengths, int64 [batch]."""
    import torch

    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
    for target, row in zip(ids, rows):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, lengths


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Loads a tokenizer: "clip", "hf:NAME" for a Hugging Face model on the hub or in a folder, or a file written by `Tokenizer.save`.

    Raises UserError if there is no such tokenizer.
    """
    if spec == "clip":
        return _clip_tokenizer()
    if str(spec).startswith("hf:"):
        return _hugging_face_tokenizer(str(spec).removeprefix("hf:"))
    path = Path(spec)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f'The tokenizer {spec} does not exist: use "clip" or a file created by `coalign data tokenizer`.'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The tokenizer file {spec} cannot be read ({error}): create one with `coalign data tokenizer`."
        ) from None
    try:
        backend = Backend.from_str(text)
    except Exception:  # the library raises a plain Exception for all errors
        raise UserError(f"{spec} is not a tokenizer file: create one with `coalign data tokenizer`.") from None
    return Tokenizer(backend, path.stem)


def train_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a lowercasing byte-level BPE tokenizer of at most `vocab_size` tokens, or fewer if the captions have fewer pairs to merge.

    It cleans texts by `caption_normalizer`, which is part of its file. No text is out of vocabulary, and the result does not depend on the
    order of the captions. Raises UserError if `vocab_size` is below 258 or all captions are empty.
    """
    if vocab_size < 258:
        raise UserError(
            f"The vocabulary size is {vocab_size}, but must be at least 258: 256 bytes and the start and end tokens."
        )
    backend = Backend(models.BPE())
    # Unlike in CLIP, words are marked by a leading space: with end-of-word tokens, the vocabulary would need every byte twice.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    num_captions, normalizer = 0, caption_normalizer()

    def cleaned() -> Iterable[str]:
        nonlocal num_captions
        for caption in captions:
            text = normalizer.normalize_str(caption)
            num_captions += bool(text)
            yield text

    backend.train_from_iterator(cleaned(), trainer)
    if not num_captions:
        raise UserError("There are no captions to train a tokenizer on: check the dataset with `coalign data check`.")
    model = json.loads(backend.to_str())["model"]
    vocab = dict(model["vocab"])
    vocab |= {START: len(vocab), END: len(vocab) + 1}
    backend.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
    backend.decoder, backend.normalizer = decoders.ByteLevel(), normalizer
    return Tokenizer(backend, f"bpe-{len(vocab)}")


def has_tokenizer(spec: str) -> bool:
    """Whether `spec` is not "hf:FOLDER" of a folder without a tokenizer, for which transformers would make up one."""
    folder = Path(spec.removeprefix("hf:"))
    return not (spec.startswith("hf:") and folder.is_dir()) or any((folder / file).is_file() for file in _VOCABULARIES)


@cache
def _clip_tokenizer() -> Tokenizer:
    """Builds CLIP's tokenizer (49,408 tokens) from the merges shipped with open_clip, without importing open_clip."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError(
            "The vocabulary of CLIP is part of open_clip_torch, which is not installed: run `pip install open_clip_torch`."
        )
    with gzip.open(Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _CLIP_MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    alphabet = _byte_characters()
    tokens = [
        *alphabet,
        *(character + _WORD_END for character in alphabet),
        *(left + right for left, right in merges),
        START,
        END,
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=_WORD_END))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_WORD_END, " ")])
    return Tokenizer(backend, "clip")


def _hugging_face_tokenizer(name: str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face encoder, from the hub or a folder."""
    if not has_tokenizer(f"hf:{name}"):
        raise UserError(f"The folder {name} has no tokenizer; give the one of its model with --tokenizer.")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(f'The tokenizer hf:{name} requires the "hf" extra: pip install "coalign[hf]".') from None
    try:
        backend = AutoTokenizer.from_pretrained(name).backend_tokenizer
    except Exception as error:  # many kinds: no network, no such file, not a fast tokenizer
        raise UserError(f"The tokenizer hf:{name} could not be loaded: {str(error).splitlines()[0]}") from error
    return Tokenizer(Backend.from_str(backend.to_str()), Path(name).name)


def _byte_characters() -> list[str]:
    """The 256 characters that represent bytes in byte-level BPE, in CLIP's order: printable Latin-1, then the others shifted by 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = set(range(256)).difference(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(len(others))]
