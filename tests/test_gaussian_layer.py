"""`GaussianConv2d`: its filters against an integral, its gradients, `nn.Conv2d`'s sizes, the fit, and what it keeps."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from omnilatent import GaussianConv2d
from omnilatent.nn.gaussian_kernels import PIXEL, best_amplitudes, gaussian_kernels

ONE = torch.float64


def gaussian(mu: tuple[float, float], sigma: tuple[float, float], theta: float) -> list[Tensor]:
    """The arguments of `gaussian_kernels` for one filter of one Gaussian of height 1."""
    return [torch.tensor([mu], dtype=ONE), torch.tensor([sigma], dtype=ONE).log(), torch.tensor([theta], dtype=ONE),
            torch.ones(1, dtype=ONE)]


@pytest.mark.parametrize(("mu", "sigma", "theta"), [
    ((0.3, -0.8), (1.4, 0.7), 0.5), ((-1.1, 0.2), (0.3, 0.9), -1.2), ((0.0, 0.0), (0.05, 0.05), 0.0)])
def test_filters_are_the_integral_of_a_gaussian_over_the_pixels_window(mu: tuple, sigma: tuple, theta: float) -> None:
    """∫ N(q; μ, R diag(σ²) Rᵀ) N(p − q; 0, PIXEL²) dq by a fine sum; up to the height, which is 1 in the middle."""
    step = min(0.02, min(sigma) / 4)
    line = torch.arange(-6, 6, step, dtype=ONE)
    x, y = torch.meshgrid(line, line, indexing="xy")
    c, s = math.cos(theta), math.sin(theta)
    u, v = c * (x - mu[0]) + s * (y - mu[1]), -s * (x - mu[0]) + c * (y - mu[1])
    density = torch.exp(-0.5 * ((u / sigma[0]) ** 2 + (v / sigma[1]) ** 2)) / (2 * math.pi * sigma[0] * sigma[1])
    found = torch.empty(5, 5, dtype=ONE)
    for row in range(5):
        for column in range(5):
            window = torch.exp(-0.5 * ((x - (column - 2)) ** 2 + (y - (row - 2)) ** 2) / PIXEL**2)
            found[row, column] = (density * window).sum() * step**2 / (2 * math.pi * PIXEL**2)
    height = 1 / (2 * math.pi * math.prod(math.sqrt(w**2 + PIXEL**2) for w in sigma))
    assert torch.allclose(gaussian_kernels(*gaussian(mu, sigma, theta), (5, 5)), found / height, atol=1e-6)


def test_no_filter_is_so_narrow_that_it_falls_between_the_pixels() -> None:
    """The sum over the pixels of a Gaussian of width 0 swings by ±1.4 % along an axis as it moves, at most."""
    sums = [float(gaussian_kernels(*gaussian((x / 20, 0.25), (1e-4, 1e-4), 0.0), (15, 15)).sum()) for x in range(20)]
    swing = 2 * math.exp(-2 * math.pi**2 * PIXEL**2)
    assert max(sums) / min(sums) == pytest.approx((1 + swing) / (1 - swing), rel=1e-3) and swing < 0.015


def test_the_gradient_is_the_derivative() -> None:
    torch.manual_seed(0)
    layer = GaussianConv2d(2, 3, (3, 4)).double()
    parts = [p.requires_grad_() for p in (layer.mu, layer.log_sigma, layer.theta, layer.amplitude)]
    assert torch.autograd.gradcheck(lambda *p: gaussian_kernels(*p, (3, 4)), parts)
    images = torch.randn(1, 2, 6, 6, dtype=ONE, requires_grad=True)
    assert torch.autograd.gradcheck(layer, images)


def test_autocast_rounds_the_convolution_but_not_the_filters() -> None:
    torch.manual_seed(0)
    layer, images = GaussianConv2d(2, 4, 5), torch.randn(1, 2, 8, 8)
    exact = layer.kernel()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.kernel(), exact) and layer(images).dtype == torch.bfloat16


def test_every_parameter_learns_from_the_first_step() -> None:
    torch.manual_seed(0)
    layer = GaussianConv2d(3, 16, 5)
    layer(torch.randn(8, 3, 12, 12)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad != 0).all(), name
    assert layer.theta.grad.std() > 0.01 * layer.amplitude.grad.std(), "the angle is not stuck"
    layer.zero_grad()
    with torch.no_grad():
        layer.log_sigma[..., 1] = layer.log_sigma[..., 0]
    layer(torch.randn(8, 3, 12, 12)).square().mean().backward()
    assert layer.theta.grad.abs().max() < 1e-6, "a round Gaussian has no angle: the test above can fail"


@pytest.mark.parametrize(("channels", "size", "groups"), [((1, 64), 5, 1), ((16, 32), 3, 4), ((8, 8), (5, 3), 8)])
def test_white_noise_comes_out_as_from_conv2d(channels: tuple[int, int], size: int, groups: int) -> None:
    torch.manual_seed(0)
    arguments = (*channels, size)
    ours = GaussianConv2d(*arguments, groups=groups, bias=False)
    plain = nn.Conv2d(*arguments, groups=groups, bias=False)
    noise = torch.randn(4, channels[0], 40, 40)
    with torch.no_grad():
        variance, usual = float(ours(noise).var()), float(plain(noise).var())
    assert variance == pytest.approx(1 / 3, rel=0.1) and variance == pytest.approx(usual, rel=0.3)
    assert 0.2 < float((ours.amplitude > 0).float().mean()) < 0.8, "both signs"


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 2}, {"stride": (1, 3), "padding": (0, 2)}, {"groups": 2}, {"padding": "same"},
    {"bias": False, "padding": "valid"}])
def test_it_drops_into_the_place_of_conv2d(options: dict) -> None:
    torch.manual_seed(0)
    ours, plain = GaussianConv2d(4, 6, (5, 3), **options), nn.Conv2d(4, 6, (5, 3), **options)
    assert ours.kernel().shape == plain.weight.shape
    images = torch.randn(2, 4, 11, 13)
    with torch.no_grad():
        plain.weight.copy_(ours.kernel())
        if ours.bias is not None:
            plain.bias.copy_(ours.bias)
    assert torch.allclose(ours(images), plain(images), atol=1e-6)
    per_filter = 6 * ours.num_gaussians
    assert sum(p.numel() for p in ours.parameters()) == per_filter * plain.weight[..., 0, 0].numel() + (
        6 if options.get("bias", True) else 0)


def test_sums_of_gaussians_are_found_again() -> None:
    torch.manual_seed(1)
    source = GaussianConv2d(2, 4, 5, num_gaussians=2, stride=2, padding=1)
    plain = nn.Conv2d(2, 4, 5, stride=2, padding=1)
    with torch.no_grad():
        plain.weight.copy_(source.kernel())
    fitted, residual = GaussianConv2d.from_conv2d(plain, num_gaussians=2)
    assert residual < 1e-2
    with torch.no_grad():
        left = (fitted.kernel() - plain.weight).square().sum() / plain.weight.square().sum()
    assert residual == pytest.approx(float(left), rel=1e-3)
    images = torch.randn(2, 2, 12, 12)
    assert fitted(images).shape == plain(images).shape and torch.equal(fitted.bias, plain.bias)
    assert GaussianConv2d.from_conv2d(nn.Conv2d(2, 4, 5), 1, steps=100)[1] > 0.2, "noise is no single Gaussian"
    for wrong in (nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match="only dilation 1 and zeros can be fitted"):
            GaussianConv2d.from_conv2d(wrong)


def test_amplitudes_by_least_squares() -> None:
    torch.manual_seed(0)
    units, target = torch.randn(7, 3, 25), torch.randn(7, 25)
    expected = torch.linalg.lstsq(units.mT, target[..., None]).solution[..., 0]
    assert torch.allclose(best_amplitudes(units, target), expected, atol=1e-4)


@torch.no_grad()
def test_filters_are_kept_in_eval_and_never_stale() -> None:
    torch.manual_seed(0)
    layer, other = GaussianConv2d(1, 2, 5).eval(), GaussianConv2d(1, 2, 5)
    assert layer.kernel() is layer.kernel(), "kept"
    before = layer.kernel().clone()
    layer.theta.add_(0.5)  # as an optimiser or an average does
    assert not torch.equal(layer.kernel(), before)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.kernel(), other.kernel())
    layer.load_state_dict({name: 2 * value for name, value in other.state_dict().items()}, assign=True)
    assert not torch.allclose(layer.kernel(), other.kernel())
    assert layer.double().kernel().dtype == torch.float64 and layer.half().kernel().dtype == torch.float16
    layer.float()
    twin = copy.deepcopy(layer)
    twin.mu.zero_()
    assert not torch.equal(twin.kernel(), layer.kernel())
    parameters = list(layer.parameters())
    before = layer.kernel().clone()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters) + 0.1, parameters)
    assert not torch.equal(layer.kernel(), before)
    layer.train()
    assert layer.kernel() is not layer.kernel(), "computed anew while it trains"
    layer.eval()
    with torch.enable_grad():
        layer.kernel().sum().backward()  # kept filters would have no gradient
        assert layer.mu.grad is not None
    with torch.inference_mode():
        inside = layer(torch.ones(1, 1, 5, 5))
    with torch.enable_grad():
        images = torch.ones(1, 1, 5, 5, requires_grad=True)
        layer.requires_grad_(False)(images).sum().backward()
    assert torch.allclose(inside, layer(torch.ones(1, 1, 5, 5))) and images.grad is not None


@pytest.mark.parametrize(("arguments", "options", "sentence"), [
    ((0, 4, 3), {}, "in_channels 0, .*each is at least 1"), ((1, 4, 3), {"num_gaussians": 0}, "num_gaussians 0"),
    ((3, 4, 3), {"groups": 2}, "in_channels 3 and out_channels 4 must divide by groups 2")])
def test_impossible_layers_are_refused(arguments: tuple, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianConv2d(*arguments, **options)
