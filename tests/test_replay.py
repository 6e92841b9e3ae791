"""Recorded work: what is added to gradients, what is let go, and on a GPU the same numbers as plain calls."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from omnilatent import LatentNeuralHook
from omnilatent.nn.replay import Replayed
from omnilatent.omni.cached import CachedDecoder
from omnilatent.omni.config import OmniModelConfig
from omnilatent.omni.model import OmniLatentModel


def two_layers(device: str = "cpu") -> tuple[nn.ModuleList, Replayed]:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(device)

    def learn(key: int, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = layers[key](data["x"]).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    return layers, Replayed(learn, layers.parameters(), eager=2)


def test_gradients_are_added_up_and_those_that_got_none_have_none() -> None:
    layers, replayed = two_layers()
    x = torch.rand(3, 4)
    for _ in range(2):
        replayed.clear()
        replayed(0, {"x": x})
        replayed(0, {"x": x})
        replayed.drop_untouched()
        (alone,) = torch.autograd.grad(layers[0](x).square().mean(), [layers[0].weight])
        torch.testing.assert_close(layers[0].weight.grad, 2 * alone)
        assert layers[1].weight.grad is None
        replayed.clear()
        replayed(1, {"x": x})
        replayed.drop_untouched()
        assert layers[0].weight.grad is None and layers[1].weight.grad.abs().sum() > 0


def test_parameters_keep_nothing_alive_and_frozen_ones_are_passed_over() -> None:
    layers, replayed = two_layers()
    layers[1].requires_grad_(False)
    again = Replayed(replayed.function, layers.parameters())
    again.clear()
    again(0, {"x": torch.rand(3, 4)})
    watched = weakref.ref(again)
    again.close()
    assert all(p.grad is None for p in layers.parameters())
    del again
    gc.collect()
    assert watched() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is recorded")
def test_a_recording_gives_what_a_plain_call_gives() -> None:
    layers, replayed = two_layers("cuda")
    twins = copy.deepcopy(layers)  # gradients of the same layers on another stream would be in the way
    for seed in range(6):
        x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).cuda()
        replayed.clear()
        losses = [replayed(key, {"x": x})["loss"] for key in (0, 1, 0)]
        replayed.drop_untouched()
        plain = [layer(x).square().mean() for layer in twins]
        torch.testing.assert_close(torch.stack(losses), torch.stack([plain[0], plain[1], plain[0]]))
        (alone,) = torch.autograd.grad(plain[0], [twins[0].weight])
        torch.testing.assert_close(layers[0].weight.grad, 2 * alone)


@torch.no_grad()
def test_a_decoder_with_slots_writes_what_one_whose_memory_grows_writes() -> None:
    torch.manual_seed(0)
    model = OmniLatentModel(OmniModelConfig(hidden_dim=32, num_layers=2, num_heads=2, modalities=("text", "image"), vocab_size=40,
                                            image_size=(32, 32))).eval()
    model.register_hook(LatentNeuralHook("h", 2, 32, [0, 1], gate_bias_init=1.0, voice=4))
    nn.init.normal_(model.hooks["h"].up)
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    source, other = model.read({"text": ids}), model.read({"text": ids.flip(0)})
    decoder = CachedDecoder(model, other.memory, 6)
    for position in range(6):
        decoder.next(torch.full((2, 1, 32), torch.nan if position else 1.0), position)
    decoder.begin(source.memory)  # nothing of the other text stays, not even what is no number
    for position, x in enumerate(model.text_part().shifted(torch.tensor([[3, 4, 5], [9, 8, 7]])).split(1, 1)):
        written = model.text_part().shifted(torch.tensor([[3, 4, 5], [9, 8, 7]]))[:, : position + 1]
        whole = model.text_part().logits(model.write_on(source.memory, written, 0)[0])[:, -1]
        torch.testing.assert_close(decoder.next(x, position), whole, atol=1e-5, rtol=1e-4)
