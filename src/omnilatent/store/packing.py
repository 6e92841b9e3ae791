"""Codes packed to as few bits as they need.

- `bits_for`: the bits of one code of a codebook.
- `pack`, `unpack`: rows of codes ↔ rows of bytes.

Codes follow one another in a row without gaps, each with its least significant bit first, the first code in the
lowest bits of the first byte; a row's last byte is filled up with zeros. So a row takes ⌈n · bits / 8⌉ bytes, and
rows can be read one by one.
"""

from __future__ import annotations

import numpy as np

MOST_BITS = 32


def bits_for(codebook_size: int) -> int:
    """⌈log₂ K⌉, at least 1.

    Raises:
        ValueError: the codebook is empty or has more than 2³² codes.
    """
    bits = max(1, (codebook_size - 1).bit_length())
    if codebook_size < 1 or bits > MOST_BITS:
        raise ValueError(f"a codebook of {codebook_size} codes: expected 1 to 2**{MOST_BITS}")
    return bits


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Integer codes `(n, count)` in [0, K) → uint8 `(n, ⌈count · bits / 8⌉)`.

    Raises:
        ValueError: a code is outside the codebook, or no integer.
    """
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes are integers of shape (n, count); got {codes.dtype} {codes.shape}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codebook_size:
        raise ValueError(f"codes from {codes.min()} to {codes.max()}; the codebook has 0 to {codebook_size - 1}")
    bits = bits_for(codebook_size)
    as_bytes = np.ascontiguousarray(codes.astype("<u4")).view(np.uint8).reshape(*codes.shape, 4)
    each = np.unpackbits(as_bytes, axis=-1, count=bits, bitorder="little")  # (n, count, bits)
    return np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, count: int, codebook_size: int) -> np.ndarray:
    """The inverse: uint8 `(n, bytes)` → int64 `(n, count)`."""
    bits = bits_for(codebook_size)
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits are uint8 of shape (n, {packed_bytes(count, bits)}); got "
                         f"{packed.dtype} {packed.shape}")
    flat = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    whole = np.zeros((len(packed), count, 32), np.uint8)
    whole[..., :bits] = flat.reshape(len(packed), count, bits)
    return np.packbits(whole, axis=-1, bitorder="little").view("<u4")[..., 0].astype(np.int64)
