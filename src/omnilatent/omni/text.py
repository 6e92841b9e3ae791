"""Text as token ids: an embedding in, the same embedding out, written one token after the other.

- `TextModality`: the tokens of a source, the causal tokens of a target, logits.
- `PAD`, `END`: ids with a meaning of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .tokens import Tokens, sequence

PAD, END = 0, 2


class TextModality(nn.Module):
    """Ids `(b, n)` int64 in 0 … vocabulary − 1; 0 is padding, which nothing sees, and only stands at the right."""

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.name, self.vocabulary = "text", vocabulary
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.begin = nn.Parameter(torch.randn(dim) * 0.02)
        self.scale = dim**0.5 * 0.02  # what makes the embedding's entries, drawn small for the logits, as large as tokens

    def check(self, data: Tensor) -> None:
        """Raise a ValueError that says what was expected and what came."""
        if data.dtype not in (torch.int64, torch.int32) or data.ndim != 2 or data.numel() == 0:
            raise ValueError(f"text is token ids (b, tokens), int64, at least one; got {data.dtype} {tuple(data.shape)}")
        if not torch.compiler.is_compiling() and not (data.is_cuda and torch.cuda.is_current_stream_capturing()):
            low, high = (int(v) for v in torch.aminmax(data))
            if low < 0 or high >= self.vocabulary:
                raise ValueError(f"text has the ids 0 to {self.vocabulary - 1}; got {low if low < 0 else high}: take the "
                                 "tokenizer that the model was trained with")
            if bool(((data[:, :-1] == PAD) & (data[:, 1:] != PAD)).any()):
                raise ValueError("text is padded with 0 at the right; got a token after a 0")

    def encode(self, data: Tensor) -> Tokens:
        """Ids as a source."""
        return Tokens(self.embed(data), sequence(data.shape[1], data.device), data != PAD)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) / self.scale

    def shifted(self, ids: Tensor) -> Tensor:
        """Ids `(b, n)` → what comes before each and before the end, as vectors `(b, n + 1, dim)`."""
        begin = self.begin.expand(len(ids), 1, -1)
        return torch.cat((begin.to(self.embedding.weight.dtype), self.embed(ids)), 1)

    def labels(self, ids: Tensor) -> Tensor:
        """Ids `(b, n)` → what is to be written `(b, n + 1)`: the text, then its end, then −100."""
        longer = torch.cat((ids, ids.new_full((len(ids), 1), PAD)), 1)
        wanted = longer.masked_fill(longer == PAD, -100)
        return wanted.scatter(1, (ids != PAD).sum(1, keepdim=True), END)

    def logits(self, x: Tensor) -> Tensor:
        """`(b, n, dim)` → `(b, n, vocabulary)`."""
        return nn.functional.linear(x, self.embedding.weight)
