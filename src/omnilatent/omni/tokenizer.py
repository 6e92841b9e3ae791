"""Strings to token ids and back, saved with the model.

- `ByteTokenizer`: UTF-8 bytes, the default: every string has exactly one form, and comes back as it was.
- `LibraryTokenizer`: any tokenizer of Hugging Face (a `tokenizer.json`) or a sentencepiece model.
- `open_tokenizer`: what `save` wrote.

Ids 0, 1 and 2 are padding, reserved and the end; a tokenizer's own ids come after them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError, library
from ..hub import read_json
from .text import PAD

OFFSET = 3
FILE = "tokenizer.json"  # ours says its kind, Hugging Face's is as that library writes it
SENTENCEPIECE = "tokenizer.model"


class Tokenizer(Protocol):
    """What the model needs."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids from 3 on, the end not among them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse; ids below 3 say nothing."""

    def save(self, folder: Path) -> None:
        """Write what `open_tokenizer` reads."""


class ByteTokenizer:
    """Each byte of the UTF-8 form is a token, 3 more than its value."""

    vocab_size = 256 + OFFSET

    def encode(self, text: str) -> list[int]:
        return [byte + OFFSET for byte in text.encode("utf-8", errors="surrogatepass")]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        data = bytes(i - OFFSET for i in ids if OFFSET <= i < self.vocab_size)
        try:
            return data.decode("utf-8", errors="surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps({"omnilatent": "bytes"}) + "\n", encoding="utf-8")


class LibraryTokenizer:
    """Args: `file`, a `tokenizer.json` of Hugging Face's tokenizers or a sentencepiece `.model`."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if not self.file.exists():
            raise UserError(f"{file} is not there: give a tokenizer.json or a sentencepiece .model.")
        self._pieces = self.file.suffix == ".model"
        opened = (library("sentencepiece", "tokenizers").SentencePieceProcessor if self._pieces
                  else library("tokenizers", "tokenizers").Tokenizer.from_file)
        try:
            self._own: Any = opened(str(self.file))
        except Exception as failure:  # these libraries raise bare ones
            what = "sentencepiece model" if self._pieces else "tokenizer of Hugging Face"
            raise UserError(f"{file} is no {what} ({failure}): copy it again from its source.") from failure
        self._bytes = self.file.read_bytes()  # a run's own file goes with the checkpoint that it lies in
        self.vocab_size = (self._own.vocab_size() if self._pieces else self._own.get_vocab_size()) + OFFSET

    def encode(self, text: str) -> list[int]:
        ids = self._own.encode(text) if self._pieces else self._own.encode(text, add_special_tokens=False).ids
        return [i + OFFSET for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._own.decode([int(i) - OFFSET for i in ids if i >= OFFSET])

    def save(self, folder: Path) -> None:
        (folder / (SENTENCEPIECE if self._pieces else FILE)).write_bytes(self._bytes)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (folder / SENTENCEPIECE).exists():
        return LibraryTokenizer(folder / SENTENCEPIECE)
    file = folder / FILE
    if not file.exists():
        raise UserError(f"{folder} lacks its tokenizer ({FILE} or {SENTENCEPIECE}), without which its text means nothing: copy "
                        "it from where the model was saved.")
    return ByteTokenizer() if read_json(file).get("omnilatent") == "bytes" else LibraryTokenizer(file)


def pad(texts: Sequence[Sequence[int]]) -> Tensor:
    """Ids of several texts, int64 `(b, longest)`, filled with 0 at the right."""
    longest = max(1, max(map(len, texts), default=1))
    return torch.tensor([[*ids, *[PAD] * (longest - len(ids))] for ids in texts], dtype=torch.int64)
