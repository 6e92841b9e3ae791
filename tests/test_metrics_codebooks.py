"""Codebook usage against distributions whose entropy is known."""

import math

import pytest
import torch
from omnilatent.metrics.codebooks import CodebookUsage


def test_equal_use_gives_the_whole_codebook() -> None:
    usage = CodebookUsage(16)
    for part in torch.arange(64).reshape(4, 4, 4) % 16:
        usage.update(part)
    assert (usage.used, usage.total) == (16, 64)
    assert usage.entropy_bits == pytest.approx(4) and usage.perplexity == pytest.approx(16)


def test_a_skewed_distribution() -> None:
    usage = CodebookUsage(1000)
    usage.update(torch.tensor([7] * 6 + [3] * 2, dtype=torch.int32))
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert usage.used == 2 and usage.entropy_bits == pytest.approx(expected)
    assert usage.perplexity == pytest.approx(2**expected)


def test_one_code_is_no_information() -> None:
    usage = CodebookUsage(8)
    usage.update(torch.zeros(5, 5, dtype=torch.long))
    assert (usage.used, usage.entropy_bits, usage.perplexity) == (1, 0.0, 1.0)


def test_soft_assignments_and_strangers_are_refused() -> None:
    usage = CodebookUsage(8)
    with pytest.raises(ValueError, match="hard assignments"):
        usage.update(torch.rand(4, 8))
    with pytest.raises(ValueError, match="from 0 to 7; got 8"):
        usage.update(torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="got -1"):
        usage.update(torch.tensor([0, -1]))
    assert usage.total == 0
    with pytest.raises(ValueError, match="no codes"):
        _ = usage.entropy_bits
