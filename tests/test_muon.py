"""Muon: parity with torch's own on matrices, AdamW on the rest, convolutions as matrices."""

import copy

import torch
from torch import nn

from omnilatent.training.muon import Muon, is_matrix, orthogonal


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 8) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(16, 24, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_on_matrices_it_is_torchs_muon() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False))
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    train(Muon(ours.parameters(), lr=0.01, weight_decay=0.1), ours)
    train(torch.optim.Muon(theirs.parameters(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    for mine, other, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() < 0.1 * moved  # torch iterates in bf16 on a CPU too


def test_on_the_rest_it_is_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    theirs = copy.deepcopy(ours)
    assert not any(is_matrix(p) for p in ours.parameters())
    train(Muon(ours.parameters(), lr=0.01, weight_decay=0.1), ours)
    train(torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1), theirs)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_updates_are_orthogonal_whatever_the_gradients_scale() -> None:
    torch.manual_seed(0)
    wide, tall = torch.randn(3, 16, 144) * 1e-5, torch.randn(3, 144, 16) * 1e5
    for matrices in (wide, tall):
        values = torch.linalg.svdvals(orthogonal(matrices))
        assert 0.6 < values.min() and values.max() < 1.3
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        exact = left @ right
        assert (orthogonal(matrices) - exact).norm() / exact.norm() < 0.3


def test_a_convolution_is_the_matrix_of_its_filters_in_any_layout() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 32, 3, bias=False)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    flat = nn.Parameter(plain.weight.detach().reshape(32, -1).clone())
    gradient = torch.randn(32, 16, 3, 3)
    plain.weight.grad, last.weight.grad = gradient, gradient.to(memory_format=torch.channels_last)
    flat.grad = gradient.reshape(32, -1)
    for parameter in (plain.weight, last.weight, flat):
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(plain.weight, last.weight)
    torch.testing.assert_close(plain.weight.reshape(32, -1), flat)


def test_its_state_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 16))
    optimizer = Muon(model.parameters(), lr=0.01)
    train(optimizer, model, 3)
    twin = copy.deepcopy(model)
    restored = Muon(twin.parameters(), lr=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, 3)
    train(restored, twin, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
