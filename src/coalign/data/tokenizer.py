"""Byte-pair tokenizers: CLIP's own, and small ones trained on one's own captions. Both run in the `tokenizers` library.

Every tokenizer here numbers its tokens alike: ordinary tokens 0 … vocab_size - 3, then the start token, then the end
token (so the end token is the largest id, which pooling at the largest id relies on), and, beyond the vocabulary, the
mask token, which `encode` never gives.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalign.errors import UserError

# The library would otherwise start threads, which then do not survive the fork of a loader worker. Set before it is
# imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    from torch import Tensor

START, END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_PATTERN = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean_text(text: str) -> str:
    """CLIP's cleaning: repair mis-decoded Unicode, resolve HTML entities, one space between words, lower case."""
    # On printable ASCII without an ampersand the first two steps change nothing, and they are most of the cost.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Text to token ids and back. Cheap to call, and picklable for loader workers."""

    def __init__(self, backend: Backend, name: str) -> None:
        """`backend` must hold the start and the end token as its two last ids; `UserError` if it does not."""
        self.name = name
        self.vocab_size = backend.get_vocab_size()
        self.start_id = self.vocab_size - 2
        self.end_id = self.vocab_size - 1
        self.mask_id = self.vocab_size
        self._backend = backend
        backend.encode_special_tokens = True  # what looks like one in a caption is words
        if (backend.token_to_id(START), backend.token_to_id(END)) != (self.start_id, self.end_id):
            raise UserError(
                f"The tokenizer {name} does not end with the tokens {START} and {END}: "
                "make one with `coalign data tokenizer`."
            )

    def encode(self, text: str, context_length: int) -> list[int]:
        """start … end, at most `context_length` ids; a longer text loses its tail but keeps the end token."""
        if context_length < 2:
            raise ValueError(f"context_length {context_length} leaves no room for the start and the end token")
        ids = self._backend.encode(clean_text(text), add_special_tokens=False).ids
        return [self.start_id, *ids[: context_length - 2], self.end_id]

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """ids int64 [batch, longest] padded with 0, and lengths int64 [batch], start and end token included."""
        return pad([self.encode(text, context_length) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """The (cleaned) text of ids; start and end tokens are left out, a mask shows as [MASK]."""
        pieces: list[str] = []
        run: list[int] = []
        for token in [*ids, self.mask_id]:
            if token != self.mask_id:
                run += [token] if token < self.start_id else []
                continue
            pieces.append(self._backend.decode(run).strip())
            run = []
        return " [MASK] ".join(pieces).strip()

    def save(self, path: str | Path) -> None:
        """One JSON file, which `load_tokenizer` and the `tokenizers` library read."""
        Path(path).write_text(self.to_str(), encoding="utf-8")

    def to_str(self) -> str:
        """What `save` writes."""
        return self._backend.to_str()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "json": self.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Tokenizer.__init__(self, Backend.from_str(state["json"]), state["name"])


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token lists to ids int64 [batch, longest], padded with 0, and lengths int64 [batch]."""
    import torch

    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
    for target, row in zip(ids, rows):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, lengths


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """ "clip", "hf:NAME" for that of a Hugging Face model (NAME of the hub or a folder), or the path of a JSON file that `Tokenizer.save`
    wrote; `UserError` for anything else."""
    if spec == "clip":
        return _clip_tokenizer()
    if str(spec).startswith("hf:"):
        return _of_hugging_face(str(spec).removeprefix("hf:"))
    path = Path(spec)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f'There is no tokenizer {spec}: give "clip" or a JSON file made by `coalign data tokenizer`.'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The tokenizer file {spec} cannot be read ({error}): make it with `coalign data tokenizer`."
        ) from None
    try:
        backend = Backend.from_str(text)
    except Exception:  # the library raises plain Exception for whatever is wrong
        raise UserError(f"The file {spec} holds no tokenizer: make one with `coalign data tokenizer`.") from None
    return Tokenizer(backend, path.stem)


def train_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-casing byte-level BPE of at most `vocab_size` tokens (fewer if the captions hold no more); nothing is
    ever out of vocabulary.

    The same captions give the same tokenizer, in any order.
    """
    if vocab_size < 258:
        raise UserError(
            f"A vocabulary of {vocab_size} tokens is too small: 256 bytes and the start and end tokens make 258."
        )
    backend = Backend(models.BPE())
    # Unlike CLIP's, words are marked by their leading space: a vocabulary with word ends would need every byte twice.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    counted = 0

    def cleaned() -> Iterable[str]:
        nonlocal counted
        for caption in captions:
            text = clean_text(caption)
            counted += bool(text)
            yield text

    backend.train_from_iterator(cleaned(), trainer)
    if not counted:
        raise UserError("There are no captions to train a tokenizer on: check the data with `coalign data check`.")
    model = json.loads(backend.to_str())["model"]
    vocab = dict(model["vocab"])
    vocab |= {START: len(vocab), END: len(vocab) + 1}
    backend.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, f"bpe-{len(vocab)}")


@cache
def _clip_tokenizer() -> Tokenizer:
    """CLIP's vocabulary (49,408 tokens) from the file of merges that open_clip ships, found without importing
    open_clip."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError(
            "CLIP's vocabulary comes with open_clip_torch, which is not installed: run `pip install open_clip_torch`."
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


def _of_hugging_face(name: str) -> Tokenizer:
    """Its tokens with their own numbers, then our start and end token, which stand for its own (extra "hf")."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(f'The tokenizer hf:{name} needs the extra "hf": pip install "coalign[hf]".') from None
    try:
        backend = AutoTokenizer.from_pretrained(name).backend_tokenizer
    except Exception as error:  # the hub's client has many: no network, no such file, none of the `tokenizers` library
        raise UserError(f"The tokenizer hf:{name} could not be loaded: {str(error).splitlines()[0]}") from error
    backend = Backend.from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.add_special_tokens([START, END])
    return Tokenizer(backend, Path(name).name)


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in CLIP's order: printable Latin-1 first, then the
    others, shifted by 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = set(range(256)).difference(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(len(others))]
